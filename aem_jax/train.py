"""The training loop: tasks → rollout → batch → credit → update, on one mesh."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from aem_jax.batch import Batch, BatchLayout, collate, place
from aem_jax.compilations import compilations
from aem_jax.credit import Credit
from aem_jax.envs.protocol import Task
from aem_jax.learner import TrainState
from aem_jax.rollout import Carried, Rollout, RolloutStats, group_attempts
from aem_jax.selection import Rule, StepEpisodes, play_carried, play_rounds, returned
from aem_jax.trajectory import Ending, Trajectory

Metrics = dict[str, Any]


@dataclass(frozen=True)
class TrainConfig:
    """Number of steps, and steps between checkpoints."""

    num_steps: int = 150
    """Training steps: one rollout and its update each."""
    save_every: int = 10
    """Steps between checkpoints."""

    def __post_init__(self) -> None:
        if self.num_steps < 0 or self.save_every < 1:
            raise ValueError(f"expected num_steps >= 0 and save_every >= 1, got {self.num_steps} and {self.save_every}")


def train(
    state: TrainState,
    *,
    rollout: Rollout,
    tasks: Callable[[int, int], Sequence[Task]],
    rule: Rule,
    layout: BatchLayout,
    mesh: Mesh,
    reshard: Callable[[Any], Any],
    credit: Callable[..., tuple[Credit, Metrics]],
    update: Callable[..., tuple[TrainState, Metrics]],
    key: jax.Array,
    seed: int,
    num_steps: int,
    reference: Callable[[Batch], Any] | None = None,
    values: Callable[[Any, Batch], Any] | None = None,
    carried: Carried | None = None,
    prepare: Callable[[Sequence[Task]], None] | None = None,
    measure: Callable[[TrainState, int, Sequence[Trajectory], jax.Array], Metrics] = lambda *_: {},
    on_step: Callable[[TrainState, int, Metrics, StepEpisodes, Credit], None],
    should_stop: Callable[[], bool] = lambda: False,
) -> TrainState:
    """Trains from `state.step` to `num_steps`. The first step compiles; the steps after it compile nothing.

    Args:
        state: the learner's state; donated.
        rollout: plays the episodes.
        tasks: (step, round) -> tasks to play, from `task_groups`.
        rule: selects the episodes to learn from.
        layout: sizes of a batch.
        mesh: the device mesh.
        reshard: the learner's parameters -> the sampled parameters, in the decode layout.
        credit: from `make_credit`.
        update: from `make_update`.
        key: the run's PRNG key. Step i uses `fold_in(key, i)`, so a resumed run samples as an uninterrupted one.
        seed: with the step, decides which trajectories share a minibatch.
        num_steps: the step to end at.
        reference: batch -> log-probabilities of the reference policy; None without a KL penalty.
        values: (the learner's parameters, batch) -> values of the batch's responses; None without a value head.
        carried: the groups under way at `state.step`; None without carry-over.
        prepare: `TaskSuite.prepare`; None if there is nothing to prepare.
        measure: (state before the update, step, its episodes, its key) -> further metrics; may compile.
        on_step: called after each step with (state, step, metrics, its episodes, credit of those learnt from).
        should_stop: called after each step; True ends the training.

    Returns:
        The last state.
    """
    first = int(state.step)
    if prepare and first < num_steps:
        prepare(tasks(first, 0))
    rollout.warm_up(reshard(state.params))
    attempts = group_attempts(tasks, key, rollout.config)
    for step in range(first, num_steps):
        start, compiled = time.perf_counter(), compilations()
        if prepare and step + 1 < num_steps:
            prepare(tasks(step + 1, 0))
        step_key = jax.random.fold_in(key, step)
        # The resharded parameters get no name, so that their memory is free during the update.
        if carried is None:
            episodes = play_rounds(rollout, tasks, rule, reshard(state.params), step, step_key)
        else:
            episodes = play_carried(rollout.carry_on, attempts, rule, reshard(state.params), step, carried)
        rolled_out, carried = time.perf_counter(), episodes.carried
        version = None if carried is None else step
        batch = place(collate(episodes.trajectories, layout, seed=(seed, step), step=version), mesh)
        advantages, credit_stats = credit(batch, step_key, values(state.params, batch) if values else None)
        reference_logprobs = reference(batch) if reference else None
        measuring, known = time.perf_counter(), compilations()
        measured = measure(state, step, episodes.trajectories, step_key)
        measure_s = time.perf_counter() - measuring if measured else 0.0
        compiled += compilations() - known
        state, learner_stats = update(state, batch, advantages.tokens, reference_logprobs, values=advantages.values)
        credit_stats, learner_stats = jax.device_get((credit_stats, learner_stats))
        metrics = {
            **rollout_metrics(episodes.played, episodes.stats),
            **gateway_metrics(episodes.stats, rollout.config.context),
            **episodes.metrics,
            **carry_metrics(episodes, step, rollout.config.carry_max_age),
            **credit_stats,
            **learner_metrics(learner_stats),
            **measured,
            "compile/recompiles": 0 if step == first else compilations() - compiled,
            **timings(episodes.stats, start, rolled_out, measure_s, time.perf_counter()),
        }
        on_step(state, step, metrics, episodes, advantages)
        if should_stop():
            break
    return state


def timings(stats: RolloutStats, start: float, rolled_out: float, measure_s: float, end: float) -> Metrics:
    """Seconds and rates of one step, from its clock readings and the seconds of its measurements."""
    return {
        "throughput/tokens_per_s": (stats.sampled_tokens + stats.prefill_tokens) / (end - start),
        "throughput/episodes_per_s": stats.episodes / stats.total_s,
        # Which prefixes are in the cache depends on the clock, unless episodes run in lockstep.
        "throughput/prompt_tokens": stats.prompt_tokens,
        "throughput/prefill_tokens": stats.prefill_tokens,
        "throughput/padded_tokens": stats.padded_tokens,
        "time/rollout": rolled_out - start,
        "time/rollout_device": stats.device_busy_s,
        "throughput/device_utilization": stats.device_busy_s / stats.total_s,
        "time/rollout_environment": stats.environment_s,
        **({"time/measure": measure_s} if measure_s else {}),
        "time/update": end - rolled_out - measure_s,
        "time/step": end - start,
    }


def rollout_metrics(trajectories: Sequence[Trajectory], stats: RolloutStats) -> Metrics:
    """Statistics of the episodes, without those that the environment broke or whose first prompt was too long."""
    intact = [t for t in trajectories if not t.is_left_out]
    turns = [turn for t in intact for turn in t.turns]
    mean = lambda values: float(np.mean(values)) if len(values) else float("nan")
    by_task_type = {
        f"rollout/success/{task_type}": mean([t.success for t in intact if t.task.task_type == task_type])
        for task_type in sorted({t.task.task_type for t in intact})
    }
    outcomes: dict[int, set[float]] = {}
    for t in intact:
        outcomes.setdefault(t.group, set()).add(returned(t))
    return {
        "rollout/success": mean([t.success for t in intact]),
        "rollout/score": mean([t.score for t in intact]),
        "rollout/return": mean([t.total_reward for t in intact]),
        **by_task_type,
        "rollout/valid_action": mean([turn.valid_action for turn in turns]),
        "rollout/turns": mean([len(t.turns) for t in intact]),
        "rollout/response_tokens": mean([len(turn.response_ids) for turn in turns]),
        "rollout/truncated": mean([t.ending is Ending.TRUNCATED for t in intact]),
        "rollout/mixed_groups": mean([len(different) > 1 for different in outcomes.values()]),
        "rollout/retries": stats.retries,
        "rollout/env_errors": stats.env_errors,
        "rollout/overlong_prompts": stats.overlong_prompts,
    }


def gateway_metrics(stats: RolloutStats, context: str) -> Metrics:
    """How requests of agents continue one another; empty for other environments."""
    return {"gateway/branches": stats.branches, "gateway/rematched": stats.rematched} if context == "tree" else {}


def carry_metrics(episodes: StepEpisodes, step: int, max_age: int) -> Metrics:
    """What goes on in the next step, and the ages of the tokens learnt from; empty without carry-over."""
    carried = episodes.carried
    if carried is None:
        return {}
    learnt = [t for t in episodes.trajectories if t.in_loss and t.ending is not Ending.ENV_ERROR]
    versions = [turn.versions for t in learnt for turn in t.turns if turn.versions is not None]
    ages = step - np.concatenate([np.zeros(0, np.int32), *versions])
    return {
        "carry/groups": len(carried.groups),
        "carry/episodes": len(carried.episodes) + len(carried.queue),
        "carry/tokens": carried.num_sampled,
        "carry/recomputed_tokens": episodes.stats.recomputed_tokens,
        "carry/age_mean": float(ages.mean()) if len(ages) else float("nan"),
        "carry/age_max": int(ages.max(initial=0)),
        **{f"carry/share_age_{age}": float(np.mean(ages == age)) for age in range(max_age + 1) if len(ages)},
    }


def learner_metrics(stats: Metrics) -> Metrics:
    """The learner's statistics under their names in `metrics.jsonl`."""
    parity = {
        name.replace("parity_", "parity/", 1): value for name, value in stats.items() if name.startswith("parity_")
    }
    rest = {f"learner/{name}": value for name, value in stats.items() if not name.startswith("parity_")}
    return {**parity, **rest}


def transcripts(trajectories: Sequence[Trajectory], credit: Credit, step: int, count: int = 10) -> list[dict[str, Any]]:
    """Up to `count` episodes for people to read, successful and failed alternating, with the credit of each turn."""
    base, alpha = (np.asarray(x) for x in jax.device_get((credit.base, credit.coefficients)))
    starts, first = [], 0
    for t in trajectories:
        starts.append(first)
        first += 0 if t.ending is Ending.ENV_ERROR else len(t.turns)
    intact = [(t, at) for t, at in zip(trajectories, starts, strict=True) if t.ending is not Ending.ENV_ERROR]
    successful, failed = ([pair for pair in intact if pair[0].success is value] for value in (True, False))
    mixed = [pair for pairs in zip(successful, failed, strict=False) for pair in pairs]
    chosen = [*mixed, *successful[len(mixed) // 2 :], *failed[len(mixed) // 2 :]][:count]
    return [
        {
            "task_id": t.task.id,
            "task_type": t.task.task_type,
            "success": t.success,
            "score": t.score,
            "ending": t.ending.value,
            "step": step,
            "turns": [
                {
                    "observation": turn.observation,
                    "response": turn.response,
                    # As sampled, because the credit has no entropies of turns outside the loss.
                    "entropy": float(np.mean(turn.entropies)) if len(turn.entropies) else None,
                    "alpha": float(alpha[at + k]),
                    "advantage": float(base[at + k]),
                    "reward": turn.reward,
                    "valid_action": turn.valid_action,
                }
                for k, turn in enumerate(t.turns)
            ],
        }
        for t, at in chosen
    ]
