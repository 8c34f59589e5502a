"""Selection of hand-made episodes, and the overlong penalty by hand."""

from dataclasses import replace
from functools import partial

import jax
import numpy as np
import pytest

from aem_jax.envs.protocol import EnvError, Task
from aem_jax.rollout import Carried, RolloutStats
from aem_jax.selection import (
    Rule,
    SelectionConfig,
    episode_lengths,
    mask_loss,
    play_carried,
    play_rounds,
    response_lengths,
    returned,
    select,
    soft_overlong,
    succeeded,
)
from aem_jax.train import rollout_metrics
from aem_jax.trajectory import Ending, Trajectory, Turn

ENDINGS = {"t": Ending.TERMINATED, "c": Ending.TRUNCATED, "e": Ending.ENV_ERROR}


def turn(observed: int, sampled: int, reward: float) -> Turn:
    zeros = np.zeros(sampled, np.float32)
    return Turn(np.ones(observed, np.int32), np.ones(sampled, np.int32), zeros, zeros, reward, True)


def episode(group: int, member: int, reward: float, ending: str = "t") -> Trajectory:
    return Trajectory(
        Task(f"task-{group}", "look", {}), group, member, (turn(2, 3, reward),), ENDINGS[ending], success=reward >= 1
    )


def groups(*words: str) -> list[Trajectory]:
    """A group for each word, an episode for each pair of a reward and an ending: "1t0c" won and lost at a limit."""
    return [
        episode(group, member, float(word[2 * member]), word[2 * member + 1])
        for group, word in enumerate(words)
        for member in range(len(word) // 2)
    ]


def numbers(selected) -> list[tuple[str, int, int]]:
    return [(t.task.id, t.group, t.member) for t in selected.trajectories]


def test_every_group_is_kept_unchanged_by_default():
    trajectories = groups("1t1t", "0c0e", "1t0t")
    selected = select(trajectories, Rule(3))
    assert selected.trajectories == trajectories
    assert (selected.groups, selected.filtered, selected.surplus, selected.masked) == (3, 0, 0, 0)


def test_the_first_groups_whose_outcomes_differ_are_kept_and_renumbered():
    trajectories = groups("1t1t", "1t0t", "0t0t", "0t2t", "0t1t")
    selected = select(trajectories, Rule(2, outcome=returned))
    assert numbers(selected) == [("task-1", 0, 0), ("task-1", 0, 1), ("task-3", 1, 0), ("task-3", 1, 1)]
    assert (selected.groups, selected.filtered, selected.surplus) == (2, 2, 1)
    # group numbers decide, not the order of the input
    shuffled = [trajectories[i] for i in np.random.default_rng(0).permutation(len(trajectories))]
    assert sorted(numbers(select(shuffled, Rule(2, outcome=returned)))) == numbers(selected)


def test_an_episode_whose_first_prompt_was_too_long_is_no_outcome():
    too_long = Trajectory(Task("task-0", "look", {}), 0, 2, (), Ending.TRUNCATED, success=False)
    assert select([*groups("1t1t"), too_long], Rule(1, outcome=returned)).groups == 0
    assert select([*groups("1t0t"), too_long], Rule(1, outcome=returned)).groups == 1


def test_groups_are_compared_by_the_outcome_of_the_rule():
    all_succeed = groups("1t2t", "1t0t")
    assert {t.task.id for t in select(all_succeed, Rule(2, outcome=succeeded)).trajectories} == {"task-1"}
    assert {t.task.id for t in select(all_succeed, Rule(2, outcome=returned)).trajectories} == {"task-0", "task-1"}


@pytest.mark.parametrize(
    ("rewards", "totals"),
    [
        # in the order given, 0.1 + 0.2 + 0.3 = 0.6000000000000001 in Python 3.11 and 0.6 from 3.12 on
        ([(0.1, 0.2, 0.3), (0.3, 0.2, 0.1)], [0.6, 0.6]),
        # 0.1 + 0.2 is 0.30000000000000004, rounded once or not
        ([(0.1, 0.2), (0.3,)], [0.30000000000000004, 0.3]),
    ],
)
def test_returns_that_differ_by_rounding_alone_are_one_outcome(rewards, totals):
    members = [
        Trajectory(Task("t", "look", {}), 0, m, tuple(turn(1, 1, r) for r in turn_rewards), Ending.TERMINATED, True)
        for m, turn_rewards in enumerate(rewards)
    ]
    assert [t.total_reward for t in members] == totals
    assert select(members, Rule(1, outcome=returned)).filtered == 1
    assert rollout_metrics(members, RolloutStats())["rollout/mixed_groups"] == 0


def test_broken_episodes_do_not_count_as_outcomes_but_stay_in_their_group():
    # the 0 of a broken episode is no failure: its group has a single outcome and gives no signal
    selected = select(groups("1t0e", "1t0t0e", "0e0e"), Rule(3, outcome=returned))
    assert numbers(selected) == [("task-1", 0, 0), ("task-1", 0, 1), ("task-1", 0, 2)]
    assert selected.trajectories[2].ending is Ending.ENV_ERROR and selected.filtered == 2


def test_dropped_truncated_episodes_do_not_count_as_outcomes():
    trajectories = groups("1t0c1t", "1t0t0c", "0c0c0c")
    kept = select(trajectories, Rule(3, truncated=lambda t: None))
    assert numbers(kept) == [("task-0", 0, 0), ("task-0", 0, 2), ("task-1", 1, 0), ("task-1", 1, 1)]
    assert (kept.groups, kept.masked) == (3, 5)
    mixed = select(trajectories, Rule(3, outcome=returned, truncated=lambda t: None))
    assert numbers(mixed) == [("task-1", 0, 0), ("task-1", 0, 1)]
    assert (mixed.groups, mixed.filtered, mixed.masked) == (1, 2, 1)


def test_masked_truncated_episodes_count_only_in_statistics():
    # the third group differs, but none of its episodes is in the loss
    trajectories = groups("1t0c1t", "1t1t1c", "1c0c0c")
    selected = select(trajectories, Rule(3, outcome=returned, truncated=mask_loss))
    assert numbers(selected) == [("task-0", 0, 0), ("task-0", 0, 1), ("task-0", 0, 2)]
    assert [t.in_loss for t in selected.trajectories] == [True, False, True]
    assert (selected.groups, selected.filtered, selected.masked) == (1, 2, 1)


class Rounds:
    """A rollout that returns prepared results and records its requests."""

    def __init__(self, *rounds: tuple[str, ...]):
        self.rounds, self.requested, self.keys = rounds, [], []

    def tasks(self, step: int, round: int) -> list[Task]:
        self.requested.append((step, round))
        return [Task(f"{step}/{round}/{n}", "look", {}) for n in range(len(self.rounds[round]))]

    def __call__(self, params, tasks, key):
        self.keys.append(tuple(jax.random.key_data(key).tolist()))
        trajectories = groups(*self.rounds[len(self.keys) - 1])
        error = f"task {len(self.keys) - 1}: no display" if "e" in "".join(self.rounds[len(self.keys) - 1]) else ""
        return trajectories, RolloutStats(len(trajectories), sampled_tokens=10, total_s=0.5, first_error=error)


def test_rounds_are_played_until_enough_groups_have_a_signal():
    rollout, key = Rounds(("1t1t", "1t0t"), ("0t0t", "0t0t"), ("0t1t", "1t0t"), ("1t0t", "1t0t")), jax.random.key(3)
    episodes = play_rounds(rollout, rollout.tasks, Rule(2, 10, returned), None, 7, key)
    assert rollout.requested == [(7, 0), (7, 1), (7, 2)]
    assert [(t.group, t.member, t.total_reward) for t in episodes.trajectories] == [
        (0, 0, 1.0), (0, 1, 0.0), (1, 0, 0.0), (1, 1, 1.0),
    ]  # fmt: skip
    assert [t.group for t in episodes.played] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert (episodes.stats.episodes, episodes.stats.sampled_tokens, episodes.stats.total_s) == (12, 30, 1.5)
    names = ("rounds", "groups", "filtered_groups", "surplus_groups", "masked_truncated", "overlong_penalty")
    assert [episodes.metrics[f"selection/{name}"] for name in names] == [3, 2, 3, 1, 0, 0]


def test_after_the_last_round_a_step_may_have_fewer_groups():
    rollout, key = Rounds(("1t1t", "1t0t"), ("0t0t", "0t0t")), jax.random.key(3)
    episodes = play_rounds(rollout, rollout.tasks, Rule(2, 2, returned), None, 0, key)
    assert {t.group for t in episodes.trajectories} == {0} and episodes.metrics["selection/groups"] == 1
    rollout = Rounds(("1t1t", "1t1t"))
    episodes = play_rounds(rollout, rollout.tasks, Rule(2, 1, returned), None, 0, key)
    assert episodes.trajectories == [] and episodes.metrics["selection/filtered_groups"] == 2
    assert len(episodes.played) == 4 and episodes.metrics["selection/overlong_penalty"] == 0


def test_keys_of_rounds_differ_from_each_other_and_from_those_of_episodes():
    rollout, key = Rounds(*[("1t1t",)] * 10), jax.random.key(3)
    play_rounds(rollout, rollout.tasks, Rule(1, 10, returned), None, 0, key)
    assert rollout.keys[0] == tuple(jax.random.key_data(key).tolist())
    of_episodes = {tuple(data) for data in jax.random.key_data(jax.random.split(key, 1024)).tolist()}
    assert len(set(rollout.keys)) == 10 and not of_episodes & set(rollout.keys)


@pytest.mark.parametrize("outcome", [None, returned])
def test_a_round_without_playable_episodes_is_replaced_by_another(outcome):
    rollout = Rounds(("1e0e", "0e0e"), ("0e1t", "1t0t"), ("1t0t", "1t0t"))
    episodes = play_rounds(rollout, rollout.tasks, Rule(1, outcome=outcome), None, 7, jax.random.key(3))
    assert rollout.requested == [(7, 0), (7, 1)]  # a round with some playable tasks does not count as broken
    assert [(t.group, t.total_reward) for t in episodes.trajectories] == (
        [(0, 0), (0, 1)] if not outcome else [(0, 1), (0, 0)]
    )
    assert len(episodes.played) == 8


def test_a_step_whose_many_tasks_all_break_raises_the_first_error():
    """Of 10 tasks a round: after the third round there are more than `BROKEN_TASKS`, of 24 at once after the first."""
    for size, rounds in ((10, 3), (24, 1)):
        rollout = Rounds(*[("0e0e",) * size] * 9)
        with pytest.raises(EnvError, match="no episode of step 7 could be played; the first error: task 0: no display"):
            play_rounds(rollout, rollout.tasks, Rule(size), None, 7, jax.random.key(3))
        assert len(rollout.requested) == rounds


def test_the_overlong_penalty_by_hand():
    lengths = [0, 6, 7, 8, 9, 10, 12]
    long = Trajectory(
        Task("t", "look", {}), 0, 0, tuple(turn(3, n, 1.0) for n in lengths), Ending.TERMINATED, success=True
    )
    shaped = soft_overlong(long, length=response_lengths, limit=10, buffer=4, penalty=2.0)
    # from 10 - 4 = 6 tokens on a quarter of 2 for each token, 2 from 10 on
    assert [t.reward for t in shaped.turns] == [1, 1, 0.5, 0, -0.5, -1, -1]
    assert [len(t.response_ids) for t in shaped.turns] == lengths and shaped.success
    # the episode: 7 turns of 3 observed tokens, and 52 sampled, are 73 of 80, 3 into a buffer of 10; its last turn pays
    shaped = soft_overlong(long, length=episode_lengths, limit=80, buffer=10, penalty=2.0)
    np.testing.assert_allclose([t.reward for t in shaped.turns], [1] * 6 + [1 - 2 * 0.3])
    empty = Trajectory(Task("t", "look", {}), 0, 0, (), Ending.TRUNCATED, success=False)
    assert soft_overlong(empty, length=episode_lengths, limit=80, buffer=10, penalty=2.0) == empty
    with pytest.raises(ValueError, match=r"expected a buffer of 1 to 10 tokens \(the limit\), got 11"):
        soft_overlong(long, length=response_lengths, limit=10, buffer=11, penalty=1.0)


def test_the_overlong_penalty_does_not_influence_the_selection():
    rollout = Rounds(("1t1t", "1t0t"))
    # the response of 3 tokens is half-way into the buffer: every return loses 0.5; outcomes were compared before
    penalise = partial(soft_overlong, length=response_lengths, limit=4, buffer=2, penalty=1.0)
    episodes = play_rounds(rollout, rollout.tasks, Rule(1, 1, returned, penalise=penalise), None, 0, jax.random.key(0))
    assert [t.total_reward for t in episodes.trajectories] == [0.5, -0.5]
    assert [t.total_reward for t in episodes.played] == [1, 1, 1, 0]
    assert episodes.metrics["selection/overlong_penalty"] == -0.5
    broken = Rounds(("1t0e",))  # the broken episode is not learnt from, so its penalty is not counted
    assert (
        play_rounds(broken, broken.tasks, Rule(1, penalise=penalise), None, 0, jax.random.key(0)).metrics[
            "selection/overlong_penalty"
        ]
        == -0.5
    )


def test_the_config_refuses_extra_tasks_without_a_filter():
    assert SelectionConfig(filter_equal_outcomes=True, oversample=1.5).tasks_per_round(3) == 5
    with pytest.raises(ValueError, match="expected selection.filter_equal_outcomes with selection.oversample 2.0"):
        SelectionConfig(oversample=2.0)
    with pytest.raises(ValueError, match="selection.oversample >= 1 and selection.max_rounds >= 1, got 0.5 and 1"):
        SelectionConfig(filter_equal_outcomes=True, oversample=0.5)
    with pytest.raises(ValueError, match="both above 0, or both 0"):
        SelectionConfig(overlong_penalty=1.0)


def test_with_carry_over_groups_that_the_environment_broke_are_replaced_in_the_same_step():
    calls = []

    def carry_on(params, carried: Carried, attempts, step: int):
        calls.append((params, carried.started, step))
        played = [["0e0e", "0e0e"], ["1t0t", "0e0e", "0t0c"]][len(calls) - 1]
        numbered = [replace(t, group=t.group + carried.started) for t in groups(*played)]
        return numbered, Carried(started=carried.started + len(played)), RolloutStats(episodes=2)

    episodes = play_carried(carry_on, lambda number: [], Rule(3), "params", 7, Carried(started=5))
    assert calls == [("params", 5, 7), ("params", 7, 7)]
    assert episodes.carried == Carried(started=10) and episodes.stats.episodes == 4
    assert [t.group for t in episodes.trajectories] == [0, 0, 1, 1, 2, 2]
    assert [t.group for t in episodes.played] == [5, 5, 6, 6, 7, 7, 8, 8, 9, 9]
    assert (episodes.metrics["selection/rounds"], episodes.metrics["selection/groups"]) == (2, 3)

    def all_broken(params, carried: Carried, attempts, step: int):
        broken = [replace(t, group=t.group + carried.started) for t in groups(*["0e"] * 10)]
        return broken, Carried(started=carried.started + 10), RolloutStats(first_error="task 0: no display")

    with pytest.raises(EnvError, match="no episode of step 7 could be played; the first error: task 0: no display"):
        play_carried(all_broken, lambda number: [], Rule(3), None, 7, Carried())
