"""Selection of the episodes that a step learns from, and the overlong penalty on their rewards.

    play round 0, 1, ... until num_groups groups have a learning signal, or max_rounds are played
    learn from the first num_groups of them, in the order they were played

A group whose outcomes are all equal has advantages of 0 in every group-relative estimator, so it costs an update
without any signal. DAPO (arXiv 2503.14476, §3.2) filters such groups and plays more; GRPO++ (DeepSWE) plays more tasks
than it needs in its one round. Both are a number of rounds and a number of tasks in each.

Selection has no state. The tasks and samples of round r of step s depend on s and r alone, and the choice depends on
the trajectories alone, which are equal in all processes. So a resumed run makes the same choice as an uninterrupted
one. A batch with fewer groups has fewer filled rows, not another shape.

Left out: filling the batch with filtered groups after the last round. Their advantages are 0, but they would count in
the loss's means and in its KL.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import jax
import numpy as np

from aem_jax.envs.protocol import Task
from aem_jax.rollout.carry import Carried, GroupAttempts
from aem_jax.rollout.stats import RolloutStats, check_some_played, none_played
from aem_jax.trajectory import Ending, Trajectory

Outcome = Callable[[Trajectory], float]
"""The number compared inside a group: an episode's return, or its success."""

BROKEN_TASKS = 24
"""Number of a step's tasks that must all break before the run stops with an environment error. Where half of all tasks
are broken, 24 in a row happen in 1 step of 16 million."""

Length = Callable[[Trajectory], Sequence[int]]
"""Tokens that the overlong penalty compares with its limit, for each turn."""


@dataclass(frozen=True)
class SelectionConfig:
    """Selection of the episodes that a step learns from; by default all."""

    filter_equal_outcomes: bool = False
    """Filter groups whose episodes all have the same outcome: their group-relative advantages are 0."""
    outcome: Literal["return", "success"] = "return"
    """The outcome that must differ inside a group: the environment's return, or success."""
    oversample: float = 1.0
    """filter_equal_outcomes: tasks played in each round, as a multiple of rollout.groups_per_step (GRPO++: 2)."""
    max_rounds: int = 1
    """filter_equal_outcomes: maximum number of rounds in a step (DAPO: 10). Rounds are played until
    rollout.groups_per_step groups are left; after the last round the step learns from fewer."""
    truncated: Literal["learn", "mask", "drop"] = "learn"
    """Compact filtering of episodes that ended at a limit (turns, tokens). mask (GRPO++): not in the loss and in AEM's
    groups, but in their group's return statistics. drop: not in these either. Do not use drop where failed tasks end at
    the turn limit: the rest of a group then has equal outcomes."""
    overlong_penalty: float = 0.0
    """Soft overlong penalty: reward taken off a response (or an episode) at its limit; 0 disables."""
    overlong_buffer: int = 0
    """Soft overlong penalty: tokens before the limit over which it rises linearly from 0."""
    overlong_of: Literal["response", "episode"] = "response"
    """Soft overlong penalty: the length that counts, a response's against rollout.response_tokens, or (rollout.context
    append) all tokens of an episode against rollout.context_tokens."""

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
        """Tasks played in each round, to learn from `num_groups` groups."""
        return math.ceil(self.oversample * num_groups)


def keep(trajectory: Trajectory) -> Trajectory:
    """The episode, unchanged."""
    return trajectory


@dataclass(frozen=True)
class Rule:
    """`SelectionConfig` as functions.

    Attributes:
        num_groups: maximum number of groups to learn from.
        max_rounds: maximum number of rounds to play.
        outcome: the outcome that must differ inside a group; None keeps every group.
        truncated: maps an episode that ended at a limit; one mapped to None is left out.
        penalise: maps an episode that is learnt from; None for no penalty.
    """

    num_groups: int
    max_rounds: int = 1
    outcome: Outcome | None = None
    truncated: Callable[[Trajectory], Trajectory | None] = keep
    penalise: Callable[[Trajectory], Trajectory] | None = None


@dataclass(frozen=True)
class Selected:
    """The selected episodes, and counts.

    Attributes:
        trajectories: in the order of the input; groups are numbered from 0, without gaps.
        groups: number of selected groups.
        filtered: groups with equal outcomes, left out.
        surplus: groups beyond `num_groups`, left out.
        masked: episodes of the selected groups that are not in the loss, without broken ones.
    """

    trajectories: list[Trajectory]
    groups: int
    filtered: int
    surplus: int
    masked: int


@dataclass(frozen=True)
class StepEpisodes:
    """A step's episodes.

    Attributes:
        trajectories: the selected episodes, after the penalty.
        played: all episodes; groups are numbered over all rounds.
        stats: the rounds' counts and seconds, added up.
        metrics: `selection/…`.
        carried: the groups that go on in the next step; None without carry-over.
    """

    trajectories: list[Trajectory]
    played: list[Trajectory]
    stats: RolloutStats
    metrics: dict[str, Any] = field(default_factory=dict)
    carried: Carried | None = None


def select(trajectories: Sequence[Trajectory], rule: Rule) -> Selected:
    """The first groups with a learning signal, renumbered.

    A group has a signal if two of its episodes differ in outcome and one of them is in the loss. Episodes that
    statistics leave out (`Trajectory.is_left_out`) and truncated ones that the rule drops do not count, since they have
    no advantage. The former stay in their group; `collate` masks them.

    Args:
        trajectories: episodes; the numbers of their groups give the groups' order.
        rule: the selection.

    Returns:
        The selected episodes before the penalty; fewer than `num_groups` groups, or none, where there are no more.
    """
    groups: dict[int, list[Trajectory]] = {}
    for trajectory in trajectories:
        groups.setdefault(trajectory.group, []).append(trajectory)
    compact = lambda t: rule.truncated(t) if t.ending is Ending.TRUNCATED else t
    kept = {group: [t for t in map(compact, members) if t is not None] for group, members in sorted(groups.items())}
    mixed = [group for group, members in kept.items() if rule.outcome is None or _differ(members, rule.outcome)]
    chosen = mixed[: rule.num_groups]
    return Selected(
        trajectories=[replace(t, group=number) for number, group in enumerate(chosen) for t in kept[group]],
        groups=len(chosen),
        filtered=len(kept) - len(mixed),
        surplus=len(mixed) - len(chosen),
        masked=sum(len(groups[group]) - sum(t.in_loss for t in kept[group]) for group in chosen),
    )


def _differ(members: Sequence[Trajectory], outcome: Outcome) -> bool:
    played = [t for t in members if not t.is_left_out]
    return len(set(map(outcome, played))) > 1 and any(t.in_loss for t in played)


def play_rounds(
    rollout: Callable[..., tuple[list[Trajectory], RolloutStats]],
    tasks: Callable[[int, int], Sequence[Task]],
    rule: Rule,
    params: Any,
    step: int,
    key: jax.Array,
) -> StepEpisodes:
    """Plays a step's rounds and selects from their episodes.

    Round 0 samples with `key`, round r with `fold_in(key, 2^32 − r)`: the keys of round 0's episodes are already
    fold_in(key, 0), fold_in(key, 1), ….

    Args:
        rollout: (params, tasks, key) -> (trajectories, stats).
        tasks: (step, round) -> the round's tasks.
        rule: the selection.
        params: decode-layout parameters.
        step: training step.
        key: its PRNG key.

    Returns:
        At least one round's episodes; fewer than `num_groups` groups where `max_rounds` had no more. Leading rounds in
        which the environment broke all episodes are played again with other tasks, and are not learnt from.

    Raises:
        EnvError: the environment broke all episodes of `BROKEN_TASKS` tasks or more; with the first error.
    """
    played: list[Trajectory] = []
    stats, rounds, next_group, start = RolloutStats(), 0, 0, 0
    while True:
        round_tasks, round_key = tasks(step, rounds), jax.random.fold_in(key, 2**32 - rounds) if rounds else key
        trajectories, round_stats = rollout(params, round_tasks, round_key)
        played += [replace(t, group=next_group + t.group) for t in trajectories]
        stats, rounds, next_group = stats + round_stats, rounds + 1, next_group + len(round_tasks)
        if next_group >= BROKEN_TASKS:
            check_some_played(played, stats, f"step {step}")
        if none_played(played):
            start = len(played)  # these tasks may be the broken ones: play others in their place
            continue
        selected = select(played[start:], rule)
        if rounds >= rule.max_rounds or selected.groups >= rule.num_groups:
            return _learnt(selected, played, stats, rounds, rule)


def play_carried(
    carry_on: Callable[..., tuple[list[Trajectory], Carried, RolloutStats]],
    attempts: GroupAttempts,
    rule: Rule,
    params: Any,
    step: int,
    carried: Carried,
) -> StepEpisodes:
    """Plays a step's groups with carry-over, and selects from the complete ones, in the order in which they started.

    Args:
        carry_on: `Rollout.carry_on`.
        attempts: the episodes of each group of the run.
        rule: the selection; one round.
        params: decode-layout parameters.
        step: training step.
        carried: the groups that the step before left under way.

    Returns:
        The episodes of complete groups, and the groups under way. Groups all of whose episodes the environment broke
        are not learnt from; if all complete groups are such, others are played in their place.

    Raises:
        EnvError: as `play_rounds`.
    """
    played: list[Trajectory] = []
    stats, rounds = RolloutStats(), 0
    while True:
        trajectories, carried, more = carry_on(params, carried, attempts, step)
        played, stats, rounds = played + trajectories, stats + more, rounds + 1
        if len({t.group for t in played}) >= BROKEN_TASKS:
            check_some_played(played, stats, f"step {step}")
        if not none_played(trajectories):
            return replace(_learnt(select(trajectories, rule), played, stats, rounds, rule), carried=carried)


def _learnt(selected: Selected, played: list[Trajectory], stats: RolloutStats, rounds: int, rule: Rule) -> StepEpisodes:
    """The step's episodes after the penalty, with the selection's metrics."""
    chosen = selected.trajectories
    penalised = [rule.penalise(t) for t in chosen] if rule.penalise else chosen
    changes = [
        after.total_reward - before.total_reward
        for before, after in zip(chosen, penalised, strict=True)
        if not before.is_left_out
    ]
    metrics = {
        "selection/rounds": rounds,
        "selection/groups": selected.groups,
        "selection/filtered_groups": selected.filtered,
        "selection/surplus_groups": selected.surplus,
        "selection/masked_truncated": selected.masked,
        "selection/overlong_penalty": math.fsum(changes) / max(len(changes), 1),
    }
    return StepEpisodes(penalised, played, stats, metrics)


def returned(trajectory: Trajectory) -> float:
    """The environment's return as an outcome, in float32 as the estimators have it. In float64, 0.1 + 0.2 and 0.3 would
    be two outcomes."""
    return float(np.float32(trajectory.total_reward))


def succeeded(trajectory: Trajectory) -> float:
    """Success as an outcome."""
    return float(trajectory.success)


def mask_loss(trajectory: Trajectory) -> Trajectory:
    """The episode without its tokens in the loss; its return stays in the statistics of its group."""
    return replace(trajectory, in_loss=False)


def response_lengths(trajectory: Trajectory) -> list[int]:
    """Sampled tokens of each response, limited by `rollout.response_tokens`."""
    return [len(turn.response_ids) for turn in trajectory.turns]


def episode_lengths(trajectory: Trajectory) -> list[int]:
    """All tokens of an episode at its last turn, 0 at earlier ones; limited by `rollout.context_tokens` in the append
    context."""
    total = sum(len(turn.observation_ids) + len(turn.response_ids) for turn in trajectory.turns)
    return [0] * (len(trajectory.turns) - 1) + [total] * bool(trajectory.turns)


def soft_overlong(trajectory: Trajectory, *, length: Length, limit: int, buffer: int, penalty: float) -> Trajectory:
    """DAPO's soft overlong penalty (arXiv 2503.14476, equation 13), on the reward of each turn.

        r'_k = r_k − penalty · clip( (n_k − (limit − buffer)) / buffer, 0, 1 )

    n_k is the turn's length; an episode's return loses the sum over its turns. DAPO has one response an episode,
    penalty 1, limit 20480 and buffer 4096. A response cut at its budget has n_k = limit and loses the full penalty.

    Args:
        trajectory: an episode.
        length: n_k of each turn, in tokens: `response_lengths` or `episode_lengths`.
        limit: tokens at which the penalty is full.
        buffer: tokens before the limit over which it rises, in [1, limit].
        penalty: in units of reward.

    Returns:
        The episode with reduced rewards.

    Raises:
        ValueError: buffer outside [1, limit].
    """
    if not 1 <= buffer <= limit:
        raise ValueError(f"expected a buffer of 1 to {limit} tokens (the limit), got {buffer}")
    share = lambda n: min(max((n - (limit - buffer)) / buffer, 0.0), 1.0)
    turns = zip(trajectory.turns, length(trajectory), strict=True)
    return replace(trajectory, turns=tuple(replace(turn, reward=turn.reward - penalty * share(n)) for turn, n in turns))
