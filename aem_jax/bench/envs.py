"""Environment servers over their wire: sessions that step at once, through the pool that a rollout uses."""

from collections.abc import Callable, Mapping
from typing import Any

from aem_jax.bench.config import BenchConfig
from aem_jax.bench.measure import Measurement, summarise, timed
from aem_jax.envs.serving.pool import EnvPool, PoolConfig

ROUNDS = 50
"""Steps of each session in one repetition."""

HOUSEHOLD: Mapping[str, Any] = {"generate": {"seed": 0, "split": "train", "index": 0, "max_steps": ROUNDS + 1}}


def run(config: BenchConfig) -> list[Measurement]:
    """Steps a second of a household, and of an environment that does nothing: what the wire alone costs."""
    commands = ("<action>look</action>", "<action>inventory</action>")
    return [
        _steps(config, "alfworld", {}, HOUSEHOLD, lambda round_: commands[round_ % 2]),
        _steps(config, "echo", {"length": ROUNDS + 1}, {}, lambda round_: "hello"),
    ]


def _steps(
    config: BenchConfig, name: str, settings: Mapping[str, Any], task: Mapping[str, Any], say: Callable[[int], str]
) -> Measurement:
    sessions = range(config.sessions)
    with EnvPool(PoolConfig(num_servers=1, sessions_per_server=config.sessions), (name, settings)) as pool:

        def rounds() -> None:
            for future in [pool.reset(session, task) for session in sessions]:
                future.result()
            for round_ in range(ROUNDS):
                for future in [pool.step(session, say(round_)) for session in sessions]:
                    future.result()

        shape = f"1 server, {config.sessions} sessions, reset every {ROUNDS} steps"
        seconds = timed(rounds, repeats=config.repeats)
        return summarise("envs", name, shape, "steps/s", config.sessions * ROUNDS, seconds)
