"""Which of the episodes played a step learns from, and what is taken off the return of long ones.

    play round 0, 1, ... until num_groups groups teach something, or max_rounds are played
    learn from the first num_groups of them, in the order they were played

A group whose outcomes are all equal has advantages of 0 in every group-relative estimator: it costs an update and
teaches nothing. DAPO (arXiv 2503.14476, §3.2) leaves it out and plays more; GRPO++ (DeepSWE) plays more tasks than it
needs in the one round that it has. Both are a number of rounds and a number of tasks in each.

Round r of step s plays tasks and draws samples that follow from s and r alone, and what is decided follows from
trajectories, which are the same in all processes. So there is no state: a resumed run chooses what an unbroken one
chooses. A batch that is not full has fewer filled rows, not another shape.

Left out: filling up with filtered groups when the rounds are over. Their advantages are 0, but they would count in the
loss's means and in its KL.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import jax
import numpy as np

from aem_jax.rollout.stats import RolloutStats, check_some_played, none_played
from aem_jax.trajectory import Ending, Task, Trajectory

Outcome = Callable[[Trajectory], float]
"""What is compared inside a group: its return, or its success."""

BROKEN_TASKS = 24
"""Tasks of a step that must all fail before the fault is taken for the environment's, not these tasks'. Where half of
all tasks are void, 24 of them in a row are as rare as 1 step in 16 million."""

Length = Callable[[Trajectory], Sequence[int]]
"""Tokens that are held against a limit, for each turn."""


@dataclass(frozen=True)
class SelectionConfig:
    """Which of the episodes played a step learns from; by default from all."""

    filter_equal_outcomes: bool = False
    """Leave out groups whose episodes all had the same outcome: they have no advantage to learn from."""
    outcome: Literal["return", "success"] = "return"
    """What must differ inside a group: the environment's return, or whether the task was solved."""
    oversample: float = 1.0
    """With filter_equal_outcomes: tasks played in each round, as a multiple of rollout.groups_per_step (GRPO++: 2)."""
    max_rounds: int = 1
    """With filter_equal_outcomes: most rounds of a step (DAPO: 10). A round more is played while there are fewer than
    rollout.groups_per_step groups to learn from; after the last the step goes on with those that there are."""
    truncated: Literal["learn", "mask", "drop"] = "learn"
    """Compact filtering, of episodes that ended at a limit (turns, tokens). mask (GRPO++): out of the loss and of AEM's
    groups, but their returns count in their group's statistics. drop: out of these too, as if they had not been played;
    not where running out of turns is how a task is lost: what is left of a group then has equal outcomes."""
    overlong_penalty: float = 0.0
    """Soft overlong penalty: what a response (or an episode) at its limit loses, in units of reward; 0: off."""
    overlong_buffer: int = 0
    """Tokens before the limit over which the penalty rises from 0, along a line."""
    overlong_of: Literal["response", "episode"] = "response"
    """What is too long: a response, of rollout.response_tokens, or with rollout.context append all that an episode said
    and heard, of rollout.context_tokens."""

    def __post_init__(self) -> None:
        if not self.oversample >= 1 or self.max_rounds < 1:
            raise ValueError(
                f"expected selection.oversample >= 1 and selection.max_rounds >= 1, got {self.oversample} and "
                f"{self.max_rounds}"
            )
        if not self.filter_equal_outcomes and (self.oversample > 1 or self.max_rounds > 1):
            raise ValueError(
                f"expected selection.filter_equal_outcomes with selection.oversample {self.oversample} and "
                f"selection.max_rounds {self.max_rounds}, got False; without it groups beyond groups_per_step would be "
                "thrown away"
            )
        if self.overlong_penalty < 0 or (self.overlong_penalty > 0) != (self.overlong_buffer > 0):
            raise ValueError(
                "expected selection.overlong_penalty and selection.overlong_buffer both above 0, or both 0 (off), got "
                f"{self.overlong_penalty} and {self.overlong_buffer}"
            )

    def tasks_per_round(self, num_groups: int) -> int:
        """Tasks that are played in each round to learn from `num_groups`."""
        return math.ceil(self.oversample * num_groups)


def as_it_is(trajectory: Trajectory) -> Trajectory:
    """The episode itself: truncated or not, it is learnt from."""
    return trajectory


@dataclass(frozen=True)
class Rule:
    """What is chosen, as functions.

    Attributes:
        num_groups: groups to learn from, at most.
        max_rounds: rounds to play, at most.
        outcome: what must differ inside a group; None takes every group.
        truncated: what becomes of an episode that ended at a limit; None leaves it out.
        penalise: what becomes of an episode that is learnt from; None leaves it as it is.
    """

    num_groups: int
    max_rounds: int = 1
    outcome: Outcome | None = None
    truncated: Callable[[Trajectory], Trajectory | None] = as_it_is
    penalise: Callable[[Trajectory], Trajectory] | None = None


@dataclass(frozen=True)
class Selected:
    """What is learnt from.

    Attributes:
        trajectories: in the order they came in; groups are numbered from 0, without gaps.
        groups: how many these are of.
        filtered: groups with equal outcomes, left out.
        surplus: groups beyond `num_groups`.
        masked: episodes of the groups chosen that are out of the loss, broken ones not counted.
    """

    trajectories: list[Trajectory]
    groups: int
    filtered: int
    surplus: int
    masked: int


@dataclass(frozen=True)
class Played:
    """A step's episodes.

    Attributes:
        trajectories: to learn from.
        everything: all that was played; a group has a number of its own, whatever its round.
        stats: the rounds' counts and seconds, added up.
        metrics: what was chosen, by name.
    """

    trajectories: list[Trajectory]
    everything: list[Trajectory]
    stats: RolloutStats
    metrics: dict[str, Any] = field(default_factory=dict)


def select(trajectories: Sequence[Trajectory], rule: Rule) -> Selected:
    """The first groups that teach something, renumbered.

    A group does when two of its episodes differ in outcome, and one is in the loss. Episodes broken by their
    environment (`ENV_ERROR`) make no difference, nor do truncated ones that are left out: no advantage comes of them.
    Broken episodes stay in their group, as `collate` wants them: it masks them.

    Args:
        trajectories: groups in any numbering, which also is their order.
        rule: what is chosen.

    Returns:
        What is learnt from, not yet penalised. There may be fewer than `num_groups` groups, or none.
    """
    groups: dict[int, list[Trajectory]] = {}
    for each in trajectories:
        groups.setdefault(each.group, []).append(each)
    treat = lambda t: rule.truncated(t) if t.ending is Ending.TRUNCATED else t
    kept = {group: [t for t in map(treat, members) if t is not None] for group, members in sorted(groups.items())}
    taught = [group for group, members in kept.items() if rule.outcome is None or _differ(members, rule.outcome)]
    chosen = taught[: rule.num_groups]
    return Selected(
        trajectories=[replace(t, group=number) for number, group in enumerate(chosen) for t in kept[group]],
        groups=len(chosen),
        filtered=len(kept) - len(taught),
        surplus=len(taught) - len(chosen),
        masked=sum(len(groups[group]) - sum(t.in_loss for t in kept[group]) for group in chosen),
    )


def _differ(members: Sequence[Trajectory], outcome: Outcome) -> bool:
    whole = [t for t in members if t.ending is not Ending.ENV_ERROR]
    return len(set(map(outcome, whole))) > 1 and any(t.in_loss for t in whole)


def play_rounds(
    rollout: Callable[..., tuple[list[Trajectory], RolloutStats]],
    tasks: Callable[[int, int], Sequence[Task]],
    rule: Rule,
    params: Any,
    step: int,
    key: jax.Array,
) -> Played:
    """Plays a step's episodes and chooses from them.

    Round 0 samples with `key`, round r with `fold_in(key, 2^32 − r)`: counted from the top, because the keys of round
    0's episodes are what folding in 0, 1, ... would give.

    Args:
        rollout: (params, tasks, key) -> (trajectories, stats).
        tasks: (step, round) -> what is played.
        rule: what is chosen.
        params: decode-layout parameters.
        step: training step.
        key: its PRNG key.

    Returns:
        At least one round's episodes. Where the rounds are over before there are `num_groups` groups, those that there
        are. Leading rounds in which no episode could be played do not count, and nothing of them is learnt.

    Raises:
        EnvError: no episode of `BROKEN_TASKS` tasks or more could be played; with the first error.
    """
    everything: list[Trajectory] = []
    stats, rounds, next_group, begin = RolloutStats(), 0, 0, 0
    while True:
        given = tasks(step, rounds)
        found, more = rollout(params, given, jax.random.fold_in(key, 2**32 - rounds) if rounds else key)
        everything += [replace(t, group=next_group + t.group) for t in found]
        stats, rounds, next_group = stats + more, rounds + 1, next_group + len(given)
        if next_group >= BROKEN_TASKS:
            check_some_played(everything, stats, f"step {step}")
        if none_played(everything):
            begin = len(everything)  # perhaps these tasks alone are broken: others are played in their place
            continue
        selected = select(everything[begin:], rule)
        if rounds >= rule.max_rounds or selected.groups >= rule.num_groups:
            break
    chosen = selected.trajectories
    learnt = [rule.penalise(t) for t in chosen] if rule.penalise else chosen
    taken = math.fsum(t.total_reward for t in learnt) - math.fsum(t.total_reward for t in chosen)
    metrics = {
        "selection/rounds": rounds,
        "selection/groups": selected.groups,
        "selection/filtered_groups": selected.filtered,
        "selection/surplus_groups": selected.surplus,
        "selection/masked_truncated": selected.masked,
        "selection/overlong_penalty": taken / max(len(chosen), 1),
    }
    return Played(learnt, everything, stats, metrics)


def returned(trajectory: Trajectory) -> float:
    """The environment's return as an outcome: in float32, as advantages see it. In float64, 0.1 + 0.2
    and 0.3 would be two outcomes."""
    return float(np.float32(trajectory.total_reward))


def succeeded(trajectory: Trajectory) -> float:
    """Whether the task was solved, as an outcome."""
    return float(trajectory.success)


def mask_loss(trajectory: Trajectory) -> Trajectory:
    """The episode for the statistics of its group alone."""
    return replace(trajectory, in_loss=False)


def response_lengths(trajectory: Trajectory) -> list[int]:
    """Sampled tokens of each response: what `rollout.response_tokens` limits."""
    return [len(turn.response_ids) for turn in trajectory.turns]


def episode_lengths(trajectory: Trajectory) -> list[int]:
    """All tokens of an episode, heard and said, at its last turn, and 0 before: what `rollout.context_tokens` limits in
    the append context."""
    total = sum(len(turn.observation_ids) + len(turn.response_ids) for turn in trajectory.turns)
    return [0] * (len(trajectory.turns) - 1) + [total] * bool(trajectory.turns)


def soft_overlong(trajectory: Trajectory, *, length: Length, limit: int, buffer: int, penalty: float) -> Trajectory:
    """DAPO's soft overlong punishment (arXiv 2503.14476, equation 13), on the reward of each turn.

        r'_k = r_k − penalty · clip( (n_k − (limit − buffer)) / buffer, 0, 1 )

    n_k is the turn's length, so an episode's return loses the sum over its turns. DAPO has one response an episode,
    penalty 1, limit 20480 and buffer 4096. A response cut at its budget has n_k = limit and loses all of `penalty`.

    Args:
        trajectory: an episode.
        length: n_k of each turn, in tokens: `response_lengths` or `episode_lengths`.
        limit: tokens at which all of `penalty` is lost.
        buffer: tokens before that over which it rises, in [1, limit].
        penalty: in units of reward.

    Returns:
        The same episode with other rewards.

    Raises:
        ValueError: buffer outside [1, limit].
    """
    if not 1 <= buffer <= limit:
        raise ValueError(f"expected a buffer of 1 to {limit} tokens (the limit), got {buffer}")
    share = lambda n: min(max((n - (limit - buffer)) / buffer, 0.0), 1.0)
    turns = zip(trajectory.turns, length(trajectory), strict=True)
    return replace(trajectory, turns=tuple(replace(turn, reward=turn.reward - penalty * share(n)) for turn, n in turns))
