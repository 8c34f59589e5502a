"""Carry-over against waiting for every group, on scripted episodes of long-tailed length and latency.

Both sides play the same stream of groups with the same slots, and learn from at least `rollout.carry_min_groups` groups
a step. Without carry-over that many start in each step, and all are waited for. With it `rollout.groups_per_step` are
under way. There is no update: a step is its rollout. The sides take turns; a repetition is some steps of one side.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import count

import jax
import numpy as np

from aem_jax.bench.config import BenchConfig, Mode
from aem_jax.bench.measure import Measurement, summarise
from aem_jax.bench.rollout import byte_chat, open_rollout
from aem_jax.bench.sampler import random_policy
from aem_jax.envs.protocol import Task
from aem_jax.rollout import Carried, Rollout, RolloutConfig, RolloutStats, group_attempts
from aem_jax.trajectory import Trajectory


def measure_carry(config: BenchConfig) -> list[Measurement]:
    """Episodes per second and the device's busy share, of each mode, waiting and with carry-over.

    Raises:
        ConfigError: the mean response length gives no valid number of stop ids.
    """
    model = random_policy(config.model)
    chat = byte_chat(config, model)
    with ExitStack() as stack:
        sides: dict[str, _Side] = {}
        for mode in config.modes:
            for name, settings in _settings(config, mode).items():
                _, rollout = open_rollout(config, settings, model, chat, stack)
                sides[f"{name}, {mode}"] = _Side(settings, _play(config, rollout, model.params))
        for side in sides.values():
            side.play()  # the first step: nothing is under way before it
        for _ in range(config.repeats):
            for side in sides.values():
                side.repetitions.append([side.play() for _ in range(config.carry_steps)])
    results = [_result(config, name, side) for name, side in sides.items()]
    for index in range(1, len(results), 2):  # each mode has a pair
        ratio = {"times_as_fast_as_waiting": results[index].median / results[index - 1].median}
        results[index] = replace(results[index], facts={**results[index].facts, **ratio})
    return results


@dataclass
class _Step:
    """One step: the episodes that end it, and its counts."""

    trajectories: list[Trajectory]
    carried: Carried
    stats: RolloutStats
    number: int


@dataclass
class _Side:
    """One mode, with or without carry-over.

    Attributes:
        settings: its rollout.
        play: plays the next step.
        repetitions: the measured steps.
    """

    settings: RolloutConfig
    play: Callable[[], _Step]
    repetitions: list[list[_Step]] = field(default_factory=list)


def _settings(config: BenchConfig, mode: Mode) -> dict[str, RolloutConfig]:
    """The two rollouts of a mode."""
    rollout = replace(config.rollout, mode=mode, num_cohorts=config.rollout.num_cohorts if mode == "lockstep" else 1)
    least = rollout.carry_min_groups or -(-rollout.groups_per_step * 3 // 4)
    return {
        # A step that needs all its groups has none to carry.
        "waiting": replace(rollout, groups_per_step=least, carry_min_groups=least),
        "carry-over": replace(rollout, carry_min_groups=least),
    }


def _play(config: BenchConfig, rollout: Rollout, params: object) -> Callable[[], _Step]:
    size = rollout.config.groups_per_step
    task = lambda number: Task(f"{number}", "scripted", {"seed": config.seed + number})
    tasks = lambda step, round: [task(step * size + index) for index in range(size)]
    attempts = group_attempts(tasks, jax.random.key(config.seed), rollout.config)
    carried, steps = Carried(), count()

    def play() -> _Step:
        nonlocal carried
        step = next(steps)
        trajectories, carried, stats = rollout.carry_on(params, carried, attempts, step)
        return _Step(trajectories, carried, stats, step)

    return play


def _result(config: BenchConfig, name: str, side: _Side) -> Measurement:
    """Rate and facts of one side."""
    settings, steps = side.settings, [step for steps in side.repetitions for step in steps]
    stats = sum((step.stats for step in steps), RolloutStats())
    turns = [len(t.turns) for step in steps for t in step.trajectories]
    ages = [
        step.number - turn.versions
        for step in steps
        for t in step.trajectories
        for turn in t.turns
        if turn.versions is not None
    ]
    facts = {
        "device_busy": stats.device_busy_s / stats.total_s,
        "seconds_a_step": stats.total_s / len(steps),
        "groups_a_step": len(turns) / settings.group_size / len(steps),
        "groups_carried": float(np.mean([len(step.carried.groups) for step in steps])),
        "age_mean": float(np.concatenate(ages).mean()),
        "age_max": float(np.concatenate(ages).max()),
        "recomputed_share": stats.recomputed_tokens / (stats.prefill_tokens + stats.sampled_tokens),
        "waited_for_environments": stats.environment_s / stats.total_s,
        "turns_mean": float(np.mean(turns)),
        "turns_max": max(turns),
        "env_errors": stats.env_errors,
    }
    shape = (
        f"{config.model}, {settings.carry_min_groups} of {settings.groups_per_step} × {settings.group_size} episodes, "
        f"{settings.num_slots} slots, at most {settings.carry_max_age} steps old, {config.scripted.min_turns}–"
        f"{config.scripted.max_turns} turns, latency 0–{config.scripted.latency_ms:g} ms"
    )
    # Repetitions differ in their number of episodes, so each counts with its seconds per episode.
    seconds = [
        sum(step.stats.total_s for step in steps) / sum(len(step.trajectories) for step in steps)
        for steps in side.repetitions
    ]
    return summarise("carry", f"episodes, {name}", shape, "episodes/s", 1.0, seconds, facts=facts)
