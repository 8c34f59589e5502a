"""Training, as one sentence: tasks -> trajectories -> batch -> credit -> update, on one mesh, step after step."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from aem_jax.batch import Batch
from aem_jax.compilations import compilations
from aem_jax.credit import Credit
from aem_jax.learner import TrainState
from aem_jax.rollout import RolloutStats
from aem_jax.selection import Played, returned
from aem_jax.trajectory import Ending, Trajectory

Metrics = dict[str, Any]


@dataclass(frozen=True)
class TrainConfig:
    """How long to train and what to keep."""

    num_steps: int = 150
    """Training steps: one rollout and its update each."""
    save_every: int = 10
    """Steps between checkpoints."""

    def __post_init__(self) -> None:
        if self.num_steps < 0 or self.save_every < 1:
            raise ValueError(f"expected num_steps >= 0 and save_every >= 1, got {self.num_steps} and {self.save_every}")


@dataclass(frozen=True)
class Parts:
    """The functions that a step is made of; which ones is decided at the rim.

    Attributes:
        warm_up: compiles what playing calls, from parameters in the decode layout.
        play: (parameters in the decode layout, step, key) -> the step's episodes, and which of them to learn from.
        reshard: learner's parameters -> decode layout.
        collate: (trajectories, step) -> batch on the mesh.
        credit: (batch, the step's PRNG key, values) -> (Credit, statistics).
        update: (state, batch, advantages, reference, values=what a value head learns from) -> (state, statistics).
        reference: batch -> logprobs of the reference policy, or None when KL is off.
        finish: called with (state, step, metrics, trajectories, credit) after each step, with the trajectories learnt
            from: evaluates, writes, saves.
        stop: whether to leave after this step.
        values: (learner's parameters, batch) -> values of the batch's responses, or None without a value head.
    """

    warm_up: Callable[[Any], None]
    play: Callable[[Any, int, jax.Array], Played]
    reshard: Callable[[Any], Any]
    collate: Callable[[Sequence[Trajectory], int], Batch]
    credit: Callable[[Batch, jax.Array, Any], tuple[Credit, Metrics]]
    update: Callable[..., tuple[TrainState, Metrics]]
    reference: Callable[[Batch], Any] | None
    finish: Callable[[TrainState, int, Metrics, Sequence[Trajectory], Credit], None]
    stop: Callable[[], bool]
    values: Callable[[Any, Batch], Any] | None = None


def train(state: TrainState, parts: Parts, key: jax.Array, num_steps: int) -> TrainState:
    """Trains from `state.step` to `num_steps`. The first step warms up: none after it compiles anything.

    Args:
        state: the learner's state; donated.
        parts: what a step is made of.
        key: the run's PRNG key; step i uses `fold_in(key, i)`, so a resumed run draws what an unbroken one draws.
        num_steps: where to end.

    Returns:
        The last state.
    """
    first = int(state.step)
    parts.warm_up(parts.reshard(state.params))
    for step in range(first, num_steps):
        start, compiled = time.perf_counter(), compilations()
        # What is laid out for sampling gets no name here: its memory is free again when the update needs it.
        episode_key = jax.random.fold_in(key, step)
        episodes = parts.play(parts.reshard(state.params), step, episode_key)
        rolled_out, played = time.perf_counter(), episodes.stats
        batch = parts.collate(episodes.trajectories, step)
        values = parts.values(state.params, batch) if parts.values else None
        credit, credit_stats = parts.credit(batch, episode_key, values)
        reference = parts.reference(batch) if parts.reference else None
        state, learner_stats = parts.update(state, batch, credit.tokens, reference, values=credit.values)
        credit_stats, learner_stats = jax.device_get((credit_stats, learner_stats))
        end = time.perf_counter()
        metrics = {
            **rollout_metrics(episodes.everything, played),
            **episodes.metrics,
            **credit_stats,
            **learner_metrics(learner_stats),
            "compile/recompiles": 0 if step == first else compilations() - compiled,
            "throughput/tokens_per_s": (played.sampled_tokens + played.heard_tokens) / (end - start),
            "throughput/episodes_per_s": played.episodes / played.total_s,
            "time/rollout": rolled_out - start,
            "time/rollout_device": played.device_busy_s,
            "throughput/device_utilization": played.device_busy_s / played.total_s,
            "time/rollout_environment": played.environment_s,
            "time/update": end - rolled_out,
            "time/step": end - start,
        }
        parts.finish(state, step, metrics, episodes.trajectories, credit)
        if parts.stop():
            break
    return state


def rollout_metrics(trajectories: Sequence[Trajectory], played: RolloutStats) -> Metrics:
    """Success, return and the like, over the episodes that the environment did not break."""
    whole = [t for t in trajectories if t.ending is not Ending.ENV_ERROR]
    turns = [turn for t in whole for turn in t.turns]
    mean = lambda values: float(np.mean(values)) if len(values) else float("nan")
    by_task_type = {
        f"rollout/success/{task_type}": mean([t.success for t in whole if t.task.task_type == task_type])
        for task_type in sorted({t.task.task_type for t in whole})
    }
    outcomes: dict[int, set[float]] = {}
    for t in whole:
        outcomes.setdefault(t.group, set()).add(returned(t))
    return {
        "rollout/success": mean([t.success for t in whole]),
        "rollout/score": mean([t.score for t in whole]),
        "rollout/return": mean([t.total_reward for t in whole]),
        **by_task_type,
        "rollout/valid_action": mean([turn.valid_action for turn in turns]),
        "rollout/turns": mean([len(t.turns) for t in whole]),
        "rollout/response_tokens": mean([len(turn.response_ids) for turn in turns]),
        "rollout/truncated": mean([t.ending is Ending.TRUNCATED for t in whole]),
        "rollout/mixed_groups": mean([len(found) > 1 for found in outcomes.values()]),
        "rollout/retries": played.retries,
        "rollout/env_errors": played.env_errors,
        "rollout/overlong_prompts": played.overlong_prompts,
    }


def learner_metrics(stats: Metrics) -> Metrics:
    """The learner's statistics under their names in `metrics.jsonl`."""
    parity = {f"parity/{name}": stats[f"parity_{name}"] for name in ("max", "mean")}
    rest = {f"learner/{name}": value for name, value in stats.items() if not name.startswith("parity_")}
    return {**parity, **rest}


def transcripts(trajectories: Sequence[Trajectory], credit: Credit, step: int, count: int = 10) -> list[dict[str, Any]]:
    """Episodes to look at, successful and failed by turns, each turn with its entropy, alpha and base advantage."""
    base, alpha = (np.asarray(x) for x in jax.device_get((credit.base, credit.coefficients)))
    starts, first = [], 0
    for t in trajectories:
        starts.append(first)
        first += 0 if t.ending is Ending.ENV_ERROR else len(t.turns)
    whole = [(t, at) for t, at in zip(trajectories, starts, strict=True) if t.ending is not Ending.ENV_ERROR]
    successful, failed = ([pair for pair in whole if pair[0].success is value] for value in (True, False))
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
                    # as sampled: what is out of the loss has none in the credit
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
