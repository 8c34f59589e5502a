"""Whole episodes: the rollout's engine and its environment servers, on scripted episodes of long-tailed length.

Episode lengths, latencies and observations are scripted (`envs.testing.scripted`), response lengths come from a set of
stop ids that random weights hit by chance (`ByteChat`). All modes of the engine play the same episodes with the same
keys, in turn, in one process.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from aem_jax.bench.ceilings import ceilings
from aem_jax.bench.chat import ByteChat
from aem_jax.bench.config import BenchConfig, Mode
from aem_jax.bench.counted import CountedSampler
from aem_jax.bench.measure import Measurement, summarise
from aem_jax.bench.roofline import roofline
from aem_jax.compilations import compilations
from aem_jax.config.components import known_model
from aem_jax.envs.protocol import Task
from aem_jax.envs.serving.pool import EnvPool, PoolConfig
from aem_jax.errors import ConfigError
from aem_jax.models import Policy
from aem_jax.rollout import Rollout, RolloutConfig, RolloutStats
from aem_jax.sampler import SamplingConfig
from aem_jax.trajectory import Trajectory


@dataclass
class _Player:
    """One mode at work.

    Attributes:
        sampler: that counts.
        play: seed of tasks and tokens -> trajectories, statistics.
        seconds: of each round.
        stats: of each round.
        compiled: programs compiled in the rounds.
        last: the trajectories of the latest round.
        facts: what is known beside these.
    """

    sampler: CountedSampler
    play: Callable[[int], tuple[list[Trajectory], RolloutStats]]
    seconds: list[float] = field(default_factory=list)
    stats: list[RolloutStats] = field(default_factory=list)
    compiled: int = 0
    last: Sequence[Trajectory] = ()
    facts: dict[str, float] = field(default_factory=dict)


def run(config: BenchConfig) -> list[Measurement]:
    """Episodes and sampled tokens a second, of each mode.

    Raises:
        ConfigError: stop ids that cannot be.
    """
    policy = Policy(known_model(config.model))
    try:
        chat = ByteChat(policy.config.vocab_size, config.response_mean)
    except ValueError as error:
        raise ConfigError(f"--response-mean: {error}") from None
    dtype = jnp.dtype(policy.config.dtype)
    params = jax.jit(lambda key: jax.tree.map(lambda leaf: leaf.astype(dtype), policy.init(key)))(jax.random.key(0))
    with ExitStack() as stack:
        players = {mode: _player(config, mode, policy, params, chat, stack) for mode in config.modes}
        for player in players.values():
            player.play(config.seed + 1)  # other tasks: nothing that is measured has been played before
        for _ in range(config.repeats):
            for player in players.values():
                before = compilations()
                player.sampler.forget()
                player.last, stats = player.play(config.seed)
                player.compiled += compilations() - before
                player.seconds.append(stats.total_s)
                player.stats.append(stats)
        first = config.modes[0]
        for mode in config.modes[1:]:
            # of one round each: what the machine did meanwhile, it did to both
            ratios = [a / b for a, b in zip(players[first].seconds, players[mode].seconds)]
            players[mode].facts[f"times_as_fast_as_{first}"] = median(ratios)
        return [each for mode in config.modes for each in _report(config, mode, players[mode])]


def _settings(config: RolloutConfig, mode: Mode) -> RolloutConfig:
    """Those of a mode; only lock-step has cohorts."""
    return replace(config, mode=mode, num_cohorts=config.num_cohorts if mode == "lockstep" else 1)


def _player(config: BenchConfig, mode: Mode, policy: Policy, params: Any, chat: ByteChat, stack: ExitStack) -> _Player:
    """A rollout that is ready: servers started, programs compiled."""
    settings = _settings(config.rollout, mode)
    servers = PoolConfig(num_servers=config.servers, sessions_per_server=-(-settings.num_slots // config.servers))
    pool = stack.enter_context(EnvPool(servers, ("scripted", asdict(config.scripted))))
    sampler = CountedSampler(
        policy,
        SamplingConfig(),
        chat.stop_ids,
        capacity=settings.context_tokens,
        slack=settings.slack,
        windows=settings.windows,
    )
    rollout = Rollout(sampler, chat, pool, settings)
    rollout.warm_up(params)

    def play(seed: int) -> tuple[list[Trajectory], RolloutStats]:
        first = seed * settings.groups_per_step
        tasks = [Task(f"{n}", "scripted", {"seed": n}) for n in range(first, first + settings.groups_per_step)]
        return rollout(params, tasks, jax.random.key(seed))

    return _Player(sampler, play)


def _report(config: BenchConfig, mode: Mode, player: _Player) -> list[Measurement]:
    """Rates and facts of one mode."""
    settings, stats, last = _settings(config.rollout, mode), player.stats, player.last
    turns = [len(each.turns) for each in last]
    responses = [len(turn.response_ids) for each in last for turn in each.turns]
    middle = lambda value: median(map(value, stats))
    facts = {
        **player.facts,
        "device_busy": middle(lambda each: each.device_busy_s / each.total_s),
        "waited_for_environments_s": middle(lambda each: each.environment_s),
        "recompiles": player.compiled,
        "env_errors": sum(each.env_errors for each in stats),
        "prefill_tokens": float(stats[-1].prefill_tokens),
        "turns_mean": float(np.mean(turns)),
        "turns_max": max(turns),
        "response_tokens_mean": float(np.mean(responses)),
        "response_tokens_max": max(responses),
    }
    shape = (
        f"{config.model}, {settings.groups_per_step} × {settings.group_size} episodes, {settings.num_slots} slots in "
        f"{settings.num_cohorts} cohorts, latency 0–{config.scripted.latency_ms:g} ms"
    )
    cost = player.sampler.costs()
    line = roofline(cost, ceilings(known_model(config.model).dtype))
    made = partial(summarise, "rollout", shape=shape, seconds=player.seconds, roofline=line)
    return [
        made(f"episodes, {mode}", unit="episodes/s", work=len(last), facts=facts),
        made(f"sampled tokens, {mode}", unit="tokens/s", work=stats[-1].sampled_tokens),
    ]
