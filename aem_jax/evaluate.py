"""Success on a fixed set of tasks, with its interval: of the policy, of a scripted expert, of chance."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any, NamedTuple

import jax

from aem_jax.envs.play import Act, play, play_each
from aem_jax.envs.protocol import Environment
from aem_jax.rollout import Rollout, check_some_played
from aem_jax.trajectory import Ending, Task, Trajectory


@dataclass(frozen=True)
class EvaluationConfig:
    """What is evaluated and when."""

    size: int = 128
    """Tasks of each fixed evaluation set."""
    splits: tuple[str, ...] = ("valid_seen", "valid_unseen")
    """Splits evaluated before and after training."""
    every: int = 0
    """Steps between evaluations of the first split during training; 0 means only before and after."""
    baselines: bool = True
    """Also play the scripted experts and a random agent."""


@dataclass(frozen=True)
class Rate:
    """A share of successes with its 95 % interval (Wilson)."""

    success: float
    low: float
    high: float
    count: int


@dataclass(frozen=True)
class Evaluation:
    """What an agent reached on one set.

    Attributes:
        set: name of the set, with its hash.
        split: the split that it is drawn from.
        rate: success over all tasks that the environment did not break.
        by_kind: success by task type.
        mean_score: the task's own score an episode, in [0, 1]; the success where it has none.
        mean_turns: turns an episode.
        mean_return: undiscounted return an episode.
        env_errors: episodes left out because their environment broke.
    """

    set: str
    split: str
    rate: Rate
    by_kind: dict[str, Rate]
    mean_score: float
    mean_turns: float
    mean_return: float
    env_errors: int = 0

    def record(self, step: int, phase: str) -> dict[str, Any]:
        """One line of `evaluations.jsonl`."""
        means = {name: getattr(self, name) for name in ("mean_score", "mean_turns", "mean_return")}
        by_kind = {kind: asdict(rate) for kind, rate in self.by_kind.items()}
        return {
            "step": step,
            "phase": phase,
            "set": self.set,
            "split": self.split,
            **asdict(self.rate),
            "by_kind": by_kind,
            **means,
            "env_errors": self.env_errors,
        }


class _Outcome(NamedTuple):
    kind: str
    won: bool
    score: float
    turns: int
    total: float


def rate(wins: Sequence[bool]) -> Rate:
    """Share of wins with its 95 % interval, of Wilson's score test; of nothing, (nan, 0, 1).

        (k + z²/2 ± z √(k (n − k) / n + z²/4)) / (n + z²),    z = Φ⁻¹(0.975)

    Written out: scipy.stats has it, and takes half a second to import.
    """
    if not wins:
        return Rate(float("nan"), 0.0, 1.0, 0)
    count, won, z = len(wins), sum(wins), NormalDist().inv_cdf(0.975)
    centre, half = won + z**2 / 2, z * math.sqrt(won * (count - won) / count + z**2 / 4)
    low, high = ((centre + sign * half) / (count + z**2) for sign in (-1, 1))
    return Rate(won / count, max(low, 0.0), min(high, 1.0), count)


def _summary(name: str, split: str, outcomes: Sequence["_Outcome"], env_errors: int) -> Evaluation:
    kinds = sorted({each.kind for each in outcomes})
    count = max(len(outcomes), 1)
    return Evaluation(
        set=name,
        split=split,
        rate=rate([each.won for each in outcomes]),
        by_kind={kind: rate([each.won for each in outcomes if each.kind == kind]) for kind in kinds},
        mean_score=math.fsum(each.score for each in outcomes) / count,
        mean_turns=sum(each.turns for each in outcomes) / count,
        mean_return=math.fsum(each.total for each in outcomes) / count,
        env_errors=env_errors,
    )


def evaluate_policy(
    rollout: Rollout, params: Any, tasks: Sequence[Task], key: jax.Array, *, name: str, split: str
) -> tuple[Evaluation, list[Trajectory]]:
    """Plays each task once with the policy, sampled as the rollout samples.

    Args:
        rollout: the engine.
        params: decode-layout parameters.
        tasks: the fixed set.
        key: PRNG key; the same key gives the same episodes.
        name: the set's name.
        split: its split.

    Raises:
        EnvError: none could be played; with the first error.
    """
    trajectories, stats = rollout(params, tasks, key, group_size=1)
    check_some_played(trajectories, stats, name)
    whole = [t for t in trajectories if t.ending is not Ending.ENV_ERROR]
    outcomes = [_Outcome(t.task.kind, t.won, t.score, len(t.turns), t.total_reward) for t in whole]
    return _summary(name, split, outcomes, len(trajectories) - len(whole)), trajectories


def evaluate_agent(
    env: Environment, make_act: Callable[[Task], Act], tasks: Sequence[Task], *, max_turns: int, name: str, split: str
) -> Evaluation:
    """Plays each task once with a scripted agent, in this process.

    Args:
        env: the environment.
        make_act: a fresh agent for a task.
        tasks: the fixed set.
        max_turns: turns after which an episode counts as lost.
        name: the set's name.
        split: its split.

    Raises:
        EnvError: the environment broke all of them; with the first error.
    """
    outcomes, broken = [], 0
    for task, exchanges in play_each(tasks, lambda task: play(env, task.payload, make_act(task), max_turns)):
        if exchanges is None:
            broken += 1
            continue
        won, score = (exchanges[-1].result.won, exchanges[-1].result.score) if exchanges else (False, 0.0)
        outcomes.append(_Outcome(task.kind, won, score, len(exchanges), math.fsum(e.result.reward for e in exchanges)))
    return _summary(name, split, outcomes, broken)
