"""Success on a fixed set of tasks, with its interval: of the policy, or of a scripted agent."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, NamedTuple

import jax

from aem_jax.envs.play import Act, play, play_each
from aem_jax.envs.protocol import Environment, Task
from aem_jax.metrics import Evaluation, Rate
from aem_jax.rollout import Rollout, check_some_played
from aem_jax.trajectory import Ending, Trajectory


@dataclass(frozen=True)
class EvaluationConfig:
    """Evaluation sets, and when they are played."""

    size: int = 128
    """Tasks of each fixed evaluation set."""
    splits: tuple[str, ...] = ("valid_seen", "valid_unseen")
    """Splits to evaluate before and after training."""
    every: int = 0
    """Steps between evaluations of the first split in training; 0: none then."""
    baselines: bool = True
    """Also evaluate the scripted experts, a random agent, and the model of --model.path before its warm start."""

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"expected evaluation.size of at least 1, got {self.size}")
        if self.every < 0:
            raise ValueError(f"expected evaluation.every of at least 0 (never), got {self.every}")


class _Outcome(NamedTuple):
    task_type: str
    success: bool
    score: float
    turns: int
    total: float


def rate(successes: Sequence[bool]) -> Rate:
    """Share of successes with its 95 % interval, of Wilson's score test; without episodes, (nan, 0, 1).

        (k + z²/2 ± z √(k (n − k) / n + z²/4)) / (n + z²),    z = Φ⁻¹(0.975)

    Written out, because importing scipy.stats takes half a second.
    """
    if not successes:
        return Rate(float("nan"), 0.0, 1.0, 0)
    n, k, z = len(successes), sum(successes), NormalDist().inv_cdf(0.975)
    centre, half = k + z**2 / 2, z * math.sqrt(k * (n - k) / n + z**2 / 4)
    low, high = ((centre + sign * half) / (n + z**2) for sign in (-1, 1))
    return Rate(k / n, max(low, 0.0), min(high, 1.0), n)


def _summary(
    name: str, split: str, outcomes: Sequence[_Outcome], env_errors: int, overlong_prompts: int = 0
) -> Evaluation:
    by_task_type = {task_type: [] for task_type in sorted({outcome.task_type for outcome in outcomes})}
    for outcome in outcomes:
        by_task_type[outcome.task_type].append(outcome.success)
    count = max(len(outcomes), 1)
    return Evaluation(
        set=name,
        split=split,
        rate=rate([outcome.success for outcome in outcomes]),
        by_task_type={task_type: rate(successes) for task_type, successes in by_task_type.items()},
        mean_score=math.fsum(outcome.score for outcome in outcomes) / count,
        mean_turns=sum(outcome.turns for outcome in outcomes) / count,
        mean_return=math.fsum(outcome.total for outcome in outcomes) / count,
        env_errors=env_errors,
        overlong_prompts=overlong_prompts,
    )


def evaluate_policy(
    rollout: Rollout, params: Any, tasks: Sequence[Task], key: jax.Array, *, name: str, split: str
) -> tuple[Evaluation, list[Trajectory]]:
    """Plays each task once with the policy, at the rollout's sampling parameters.

    Args:
        rollout: the rollout.
        params: decode-layout parameters.
        tasks: the fixed set.
        key: PRNG key; the same key gives the same episodes.
        name: the set's name.
        split: its split.

    Raises:
        EnvError: the environment broke all episodes; with the first error.
    """
    trajectories, stats = rollout(params, tasks, key, group_size=1)
    check_some_played(trajectories, stats, name)
    counted = [t for t in trajectories if not t.is_left_out]
    outcomes = [_Outcome(t.task.task_type, t.success, t.score, len(t.turns), t.total_reward) for t in counted]
    broken = sum(t.ending is Ending.ENV_ERROR for t in trajectories)
    return _summary(name, split, outcomes, broken, len(trajectories) - len(counted) - broken), trajectories


def evaluate_agent(
    env: Environment, make_act: Callable[[Task], Act], tasks: Sequence[Task], *, max_turns: int, name: str, split: str
) -> Evaluation:
    """Plays each task once with a scripted agent, in this process.

    Args:
        env: the environment.
        make_act: a new agent for each task.
        tasks: the fixed set.
        max_turns: turns after which an episode counts as failed.
        name: the set's name.
        split: its split.

    Raises:
        EnvError: the environment broke all episodes; with the first error.
    """
    outcomes, broken = [], 0
    for task, exchanges in play_each(tasks, lambda task: play(env, task.payload, make_act(task), max_turns)):
        if exchanges is None:
            broken += 1
            continue
        success, score = (exchanges[-1].result.won, exchanges[-1].result.score) if exchanges else (False, 0.0)
        outcomes.append(
            _Outcome(task.task_type, success, score, len(exchanges), math.fsum(e.result.reward for e in exchanges))
        )
    return _summary(name, split, outcomes, broken)
