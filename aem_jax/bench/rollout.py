"""Complete episodes: the rollout and its environment servers, on scripted episodes of long-tailed length.

Episode lengths, latencies and observations are scripted (`envs.testing.scripted`). Response lengths come from a set of
stop ids that random weights sample by chance (`ByteChat`). All modes of the rollout play the same episodes with the
same keys, in turn, in one process.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from statistics import median
from typing import Any

import jax
import numpy as np

from aem_jax.bench.chat import ByteChat
from aem_jax.bench.config import BenchConfig, Mode
from aem_jax.bench.measure import Measurement, summarise
from aem_jax.bench.sampler import Random, random_policy
from aem_jax.compilations import compilations
from aem_jax.config.components import known_model
from aem_jax.envs.protocol import Task
from aem_jax.envs.serving.pool import EnvPool, PoolConfig
from aem_jax.errors import ConfigError
from aem_jax.plan.costs import Costs, costs
from aem_jax.plan.hlo import read
from aem_jax.rollout import Rollout, RolloutConfig, RolloutStats
from aem_jax.sampler import Sampler, SamplingConfig
from aem_jax.trajectory import Trajectory


def measure_rollout(config: BenchConfig) -> list[Measurement]:
    """Episodes and sampled tokens per second, of each mode.

    Raises:
        ConfigError: the mean response length gives no valid number of stop ids.
    """
    model = random_policy(config.model)
    chat = byte_chat(config, model)
    with ExitStack() as stack:
        runs = {mode: _warm_run(config, mode, model, chat, stack) for mode in config.modes}
        for run in runs.values():
            run.play(config.seed + 1)  # other tasks, so that the measured ones are new
        for _ in range(config.repeats):
            for run in runs.values():
                before = compilations()
                run.sampler.reset_calls()
                run.trajectories, stats = run.play(config.seed)
                run.compiled += compilations() - before
                run.stats.append(stats)
        first = config.modes[0]
        for mode in config.modes[1:]:
            # Both times of a ratio are of the same round, because the machine's other load affects both.
            ratios = [a.total_s / b.total_s for a, b in zip(runs[first].stats, runs[mode].stats)]
            runs[mode].facts[f"times_as_fast_as_{first}"] = median(ratios)
        return [result for mode in config.modes for result in _results(config, mode, runs[mode])]


def byte_chat(config: BenchConfig, model: Random) -> ByteChat:
    """The tokenizer, whose stop ids end random responses.

    Raises:
        ConfigError: the mean response length gives no valid number of stop ids.
    """
    try:
        return ByteChat(model.policy.config.vocab_size, config.response_mean)
    except ValueError as error:
        raise ConfigError(f"--response-mean: {error}") from None


def open_rollout(
    config: BenchConfig, settings: RolloutConfig, model: Random, chat: ByteChat, stack: ExitStack
) -> tuple["CountedSampler", Rollout]:
    """Starts the servers of a rollout of scripted episodes, and compiles its programs."""
    servers = PoolConfig(num_servers=config.servers, sessions_per_server=-(-settings.num_slots // config.servers))
    pool = stack.enter_context(EnvPool(servers, ("scripted", asdict(config.scripted))))
    policy, params, mesh = model
    sampler = CountedSampler(
        policy,
        SamplingConfig(),
        chat.stop_ids,
        capacity=settings.context_tokens,
        slack=settings.slack,
        windows=settings.windows,
        mesh=mesh,
    )
    rollout = Rollout(sampler, chat, pool, settings)
    rollout.warm_up(params)
    return sampler, rollout


@dataclass
class _ModeRun:
    """The rollout of one mode and its results.

    Attributes:
        sampler: records its calls.
        play: seed of tasks and tokens -> trajectories, statistics.
        stats: of each round.
        compiled: programs compiled in the rounds.
        trajectories: of the latest round.
        facts: other results.
    """

    sampler: "CountedSampler"
    play: Callable[[int], tuple[list[Trajectory], RolloutStats]]
    stats: list[RolloutStats] = field(default_factory=list)
    compiled: int = 0
    trajectories: Sequence[Trajectory] = ()
    facts: dict[str, float] = field(default_factory=dict)


def _warm_run(config: BenchConfig, mode: Mode, model: Random, chat: ByteChat, stack: ExitStack) -> _ModeRun:
    """Starts the servers and compiles the programs of a mode."""
    settings = _settings(config.rollout, mode)
    sampler, rollout = open_rollout(config, settings, model, chat, stack)
    params = model.params

    def play(seed: int) -> tuple[list[Trajectory], RolloutStats]:
        first = seed * settings.groups_per_step
        tasks = [Task(f"{n}", "scripted", {"seed": n}) for n in range(first, first + settings.groups_per_step)]
        return rollout(params, tasks, jax.random.key(seed))

    return _ModeRun(sampler, play)


def _settings(config: RolloutConfig, mode: Mode) -> RolloutConfig:
    """The settings of a mode; only lockstep has cohorts."""
    return replace(config, mode=mode, num_cohorts=config.num_cohorts if mode == "lockstep" else 1)


def _results(config: BenchConfig, mode: Mode, run: _ModeRun) -> list[Measurement]:
    """Rates and facts of one mode."""
    settings, stats, trajectories = _settings(config.rollout, mode), run.stats, run.trajectories
    turns = [len(trajectory.turns) for trajectory in trajectories]
    responses = [len(turn.response_ids) for trajectory in trajectories for turn in trajectory.turns]
    facts = {
        **run.facts,
        "device_busy": median(round_.device_busy_s / round_.total_s for round_ in stats),
        "waited_for_environments_s": median(round_.environment_s for round_ in stats),
        "recompiles": run.compiled,
        "env_errors": sum(round_.env_errors for round_ in stats),
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
    seconds, dtype = [round_.total_s for round_ in stats], known_model(config.model).dtype
    result = partial(summarise, "rollout", shape=shape, seconds=seconds, cost=run.sampler.costs(), dtype=dtype)
    return [
        result(f"episodes, {mode}", unit="episodes/s", work=len(trajectories), facts=facts),
        result(f"sampled tokens, {mode}", unit="tokens/s", work=stats[-1].sampled_tokens),
    ]


class CountedSampler(Sampler):
    """A sampler that records its calls, from which the FLOPs and bytes of a rollout follow without a profiler.

    A decode counts as many steps as its longest slot sampled tokens. Forks and rewinds are not counted: they copy
    prompts and change lengths, at little cost.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._extend = _Recorded(self._extend)
        self._decode = _Recorded(self._decode, counts=lambda out: out[1].counts)

    def reset_calls(self) -> None:
        """Removes the recorded calls."""
        for program in (self._extend, self._decode):
            program.calls.clear()

    def costs(self) -> Costs:
        """Costs on one device of all recorded calls; compiles each program that was called once more."""
        total = Costs()
        for program in (self._extend, self._decode):
            total.add(program.costs())
        return total


@dataclass
class _Calls:
    """The calls of one program.

    Attributes:
        arguments: as shapes, so that no array is kept alive.
        static: the static arguments.
        times: number of calls.
        counts: i32[n], the sampled tokens of each slot, of each call of a decode.
    """

    arguments: tuple[Any, ...]
    static: Mapping[str, Any]
    times: int = 0
    counts: list[jax.Array] = field(default_factory=list)


class _Recorded:
    """A jitted function of (params, …) that records its calls.

    Args:
        jitted: the function.
        counts: its result -> the sampled tokens of each slot; None for a function that is no decode.
    """

    def __init__(self, jitted: Any, counts: Callable[[Any], jax.Array] | None = None) -> None:
        self._jitted, self._counts = jitted, counts
        self.calls: dict[Any, _Calls] = {}

    def __call__(self, params: Any, *arguments: Any, **static: Any) -> Any:
        leaves, structure = jax.tree.flatten(arguments)
        key = (structure, tuple(leaf.shape for leaf in leaves), *static.items())
        calls = self.calls.get(key)
        if calls is None:
            calls = self.calls[key] = _Calls(jax.tree.map(_shape, (params, *arguments)), static)
        out = self._jitted(params, *arguments, **static)
        calls.times += 1
        if self._counts is not None:
            calls.counts.append(self._counts(out))
        return out

    def __getattr__(self, name: str) -> Any:  # lower, _cache_size
        return getattr(self._jitted, name)

    def costs(self) -> Costs:
        total = Costs()
        for calls in self.calls.values():
            module = read(self._jitted.lower(*calls.arguments, **calls.static).compile())
            if self._counts is None:
                total.add(costs(module), calls.times)
                continue
            # The cost of a loop is linear in its rounds, so one and two rounds give the cost of any number.
            steps = sum(int(np.max(np.asarray(counts))) for counts in calls.counts)
            total.add(costs(module, 1), 2 * calls.times - steps)
            total.add(costs(module, 2), steps - calls.times)
        return total


def _shape(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = leaf.sharding if isinstance(leaf, jax.Array) else None  # the program places arrays of the host
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
