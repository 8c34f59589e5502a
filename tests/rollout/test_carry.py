"""Carry-over: groups that go on in the next step are sampled from its policy, complete, not too old, and resumable."""

import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest

from aem_jax.compilations import compilations
from aem_jax.distributed import SINGLE_PROCESS
from aem_jax.envs.protocol import StepResult, Task
from aem_jax.rollout import Carried, Rollout, group_attempts, replay, slots
from aem_jax.rollout.carry import from_record, record
from aem_jax.sampler import Sampler, SamplingConfig
from aem_jax.trajectory import Ending, Trajectory, Turn

from .countdown import CountdownEnv
from .fakes import CONFIG, POLICY, STOP, ByteChat, LatePool, LocalPool, RoomPool
from .test_processes import episodes, process_groups
from .test_rollout import log_probabilities

CARRY = replace(CONFIG, carry_min_groups=1, carry_max_age=2)
WINDOW = replace(CARRY, context="window", window_turns=1, context_tokens=60)
KEY = jax.random.key(7)
STEPS = 5
LENGTHS = [(2, 5, 3), (1, 6, 2), (4, 1, 5), (2, 2, 6), (3, 1, 1), (5, 2, 4)]
"""Turns of the tasks that start in each step of a run without carry-over."""


def tasks(step: int, round: int, lengths=LENGTHS) -> list[Task]:
    return [Task(f"{step}-{n}", "countdown", {"turns": turns}) for n, turns in enumerate(lengths[step % len(lengths)])]


@pytest.fixture(scope="module")
def versions() -> list[Any]:
    """The parameters of each step."""
    return [POLICY.init(jax.random.key(step)) for step in range(STEPS)]


def versions_of(turn: Turn) -> list[int]:
    assert turn.versions is not None
    return turn.versions.tolist()


def play(
    sampler: Sampler,
    versions: list[Any],
    config=CARRY,
    pool: Callable[[], LocalPool] = lambda: LocalPool(12),
    lengths=LENGTHS,
    between: Callable[[Rollout, Carried], tuple[Rollout, Carried]] = lambda *pair: pair,
    rollout: Rollout | None = None,
) -> list[tuple[list[Trajectory], Carried]]:
    """The complete groups of each step, and those under way after it; `between` two steps something may happen."""
    rollout, carried, steps = rollout or Rollout(sampler, ByteChat(), pool(), config), Carried(), []
    attempts = group_attempts(lambda step, round: tasks(step, round, lengths), KEY, config)
    for step, params in enumerate(versions):
        trajectories, carried, _ = rollout.carry_on(params, carried, attempts, step)
        steps.append((trajectories, carried))
        rollout, carried = between(rollout, carried)
    return steps


def all_of(steps: list[tuple[list[Trajectory], Carried]]) -> list:
    """All that a learner reads, and what goes on, of each step."""
    versions = lambda t: [versions_of(turn) for turn in t.turns]
    return [
        (episodes(trajectories), [versions(t) for t in trajectories], record(carried))
        for trajectories, carried in steps
    ]


@pytest.mark.parametrize(("min_groups", "lengths"), [(3, LENGTHS), (1, [(3, 3, 3), (2, 2, 2)])])
def test_where_nothing_is_carried_a_run_is_that_without_carry_over(sampler, versions, min_groups, lengths):
    """Because all groups are waited for, or all end in the same turn."""
    config = replace(CARRY, carry_min_groups=min_groups)
    plain = Rollout(sampler, ByteChat(), LocalPool(12), CONFIG)
    for step, (trajectories, carried) in enumerate(play(sampler, versions, config, lengths=lengths)):
        expected, _ = plain(versions[step], tasks(step, 0, lengths), jax.random.fold_in(KEY, step))
        renumbered = [replace(t, group=t.group - 3 * step) for t in trajectories]
        assert episodes(renumbered) == episodes(expected)
        assert [t.task for t in renumbered] == [t.task for t in expected]
        assert not carried.groups and not carried.episodes and carried.started == 3 * (step + 1)
        assert {version for t in trajectories for turn in t.turns for version in versions_of(turn)} == {step}


@pytest.mark.parametrize(
    "config",
    [
        CARRY,
        replace(CARRY, num_slots=6, num_cohorts=2, carry_min_groups=2, carry_max_age=1),
        WINDOW,
        replace(CARRY, mode="continuous", slot_divisors=(2, 4)),
        replace(WINDOW, mode="continuous", slot_divisors=(2, 4)),
    ],
    ids=["append", "cohorts", "window", "continuous", "continuous window"],
)
def test_groups_are_complete_once_in_time_and_sampled_by_the_versions_that_they_name(sampler, versions, config):
    late = config.mode == "continuous"
    steps = play(sampler, versions, config, lambda: LatePool(12, 0) if late else LocalPool(12))
    learnt, old = [], 0
    for step, (trajectories, carried) in enumerate(steps):
        numbers = [t.group for t in trajectories]
        groups = sorted(set(numbers))
        assert len(groups) >= config.carry_min_groups and numbers == [g for g in groups for _ in range(4)]
        assert [t.member for t in trajectories] == [0, 1, 2, 3] * len(groups)
        assert len(carried.groups) == 3 - len(groups) and not set(carried.groups) & set(groups)
        assert all(step - start < config.carry_max_age for start in carried.groups.values())
        learnt += groups
        for t in trajectories:
            assert t.task == tasks(t.group // 3, 0)[t.group % 3] and t.ending is Ending.TERMINATED
            assert len(t.turns) == t.task.payload["turns"]
            ids: list[int] = []
            for turn in t.turns:
                ids = [*(ids if config.context == "append" else ()), *turn.observation_ids, *turn.response_ids]
                rows = slice(len(ids) - len(turn.response_ids) - 1, len(ids) - 1)
                for version in set(versions_of(turn)):
                    assert max(0, step - config.carry_max_age) <= version <= step
                    old += version < step
                    chosen = turn.versions == version
                    table = log_probabilities(versions[version], ids)[rows][chosen]
                    sampled = turn.response_ids[chosen]
                    np.testing.assert_allclose(
                        table[np.arange(len(sampled)), sampled], turn.logprobs[chosen], atol=2e-5
                    )
                    entropies = -(np.exp(table) * table).sum(-1)
                    np.testing.assert_allclose(entropies, turn.entropies[chosen], atol=2e-5)
    under_way = steps[-1][1].groups
    assert sorted([*learnt, *under_way]) == list(range(steps[-1][1].started))
    assert old > 5


@pytest.mark.parametrize("config", [CARRY, WINDOW])
def test_with_the_same_parameters_a_carried_episode_samples_what_it_would_without_carry_over(sampler, versions, config):
    """Its tokens are drawn with the next random numbers of its key."""
    same = [versions[0]] * STEPS
    plain = Rollout(sampler, ByteChat(), LocalPool(12), replace(config, carry_min_groups=0))
    expected = {}
    for step in range(STEPS):
        for t in plain(versions[0], tasks(step, 0), jax.random.fold_in(KEY, step))[0]:
            expected[3 * step + t.group, t.member] = [turn.response_ids.tolist() for turn in t.turns]
    carried = 0
    for step, (trajectories, _) in enumerate(play(sampler, same, config)):
        for t in trajectories:
            assert [turn.response_ids.tolist() for turn in t.turns] == expected[t.group, t.member]
            carried += any(version < step for turn in t.turns for version in versions_of(turn))
    assert carried > 5


@pytest.mark.parametrize("config", [CARRY, WINDOW, replace(CARRY, num_slots=6, num_cohorts=2)])
def test_a_resumed_run_goes_on_bit_for_bit(sampler, versions, config):
    """After every step all is dropped but the record: a new rollout, and new environments, replay it."""
    attempts = group_attempts(tasks, KEY, config)

    def resumed(rollout: Rollout, carried: Carried):
        saved = json.loads(json.dumps(record(carried)))
        return Rollout(sampler, ByteChat(), LocalPool(12), config), from_record(saved, attempts)

    def evaluated(rollout: Rollout, carried: Carried):
        rollout(versions[0], tasks(0, 0), jax.random.key(3))
        return rollout, carried

    expected = all_of(play(sampler, versions, config))
    assert sum(len(carried["episodes"]) for *_, carried in expected) > 5
    assert all_of(play(sampler, versions, config, between=resumed)) == expected
    if config is CARRY:
        assert all_of(play(sampler, versions, config, between=evaluated)) == expected


def test_continuous_mode_resumes_cut_responses_and_pending_calls(sampler, versions):
    """Episodes go on with what they sampled; a record of them is exact."""
    config = replace(CARRY, mode="continuous", decode_chunk=1, slot_divisors=())
    attempts, states = group_attempts(tasks, KEY, config), []

    def resumed(rollout: Rollout, carried: Carried):
        read = from_record(json.loads(json.dumps(record(carried))), attempts)
        assert record(read) == record(carried)
        states.extend(read.episodes.values())
        return Rollout(sampler, ByteChat(), LatePool(12, len(states)), config), read

    steps = play(sampler, versions, config, lambda: LatePool(12, 0), between=resumed)
    begun = {(e.attempt.group, e.attempt.member): e for e in states}
    for trajectories, _ in steps:
        for t in trajectories:
            if episode := begun.get((t.group, t.member)):
                before = [turn.response_ids.tolist() for turn in episode.turns]
                assert [turn.response_ids.tolist() for turn in t.turns[: len(before)]] == before
                if episode.response:
                    ids = episode.response_ids
                    assert t.turns[len(before)].response_ids[: len(ids)].tolist() == ids
    assert any(e.response and e.budget for e in states) and any(e.response and not e.budget for e in states)


class Forgetful(CountdownEnv):
    """Answers otherwise from the second episode on."""

    def reset(self, task: Mapping[str, Any]) -> StepResult:
        result = super().reset(task)
        self.episodes = getattr(self, "episodes", 0) + 1
        return replace(result, observation=result.observation + "z" * (self.episodes > 1))


def test_an_environment_that_answers_otherwise_costs_the_episodes_turns_and_no_retry(sampler, versions, caplog):
    def resumed(rollout: Rollout, carried: Carried):
        rollout._live = {}  # as after an evaluation
        return rollout, carried

    steps = play(sampler, versions[:3], CARRY, lambda: LocalPool(12, Forgetful), between=resumed)
    assert [len(trajectories) % 4 for trajectories, _ in steps] == [0, 0, 0]
    assert not any(t.retries for trajectories, _ in steps for t in trajectories)
    assert "begins again: expected the observation of turn 0 again when the episode was replayed, got" in caplog.text


def test_a_resumed_run_with_less_room_begins_episodes_again(sampler, versions, monkeypatch, caplog):
    """An evaluation comes first: it waits for room that carried episodes hold."""
    monkeypatch.setattr(slots, "_ROOM_S", 0.01)
    monkeypatch.setattr(replay, "_PATIENCE_S", 0.1)

    def resumed(rollout: Rollout, carried: Carried):
        rollout(versions[0], tasks(0, 0), jax.random.key(3))
        return Rollout(sampler, ByteChat(), RoomPool(12, room=2), CARRY), carried

    steps = play(sampler, versions[:3], CARRY, lambda: RoomPool(12, room=8), between=resumed)
    for t in (t for trajectories, _ in steps for t in trajectories):
        assert t.ending is Ending.TERMINATED and len(t.turns) == t.task.payload["turns"] and not t.retries
    assert [len(trajectories) % 4 for trajectories, _ in steps] == [0, 0, 0]
    assert "expected room for its environment when the episode was replayed" in caplog.text


@pytest.mark.parametrize("make", [CountdownEnv, Forgetful])
def test_several_processes_carry_the_same_groups_and_resume_them(sampler, versions, make, caplog):
    """Also where a process's environment answers otherwise, and the episode begins again in all."""
    config = replace(CARRY, num_slots=6, num_cohorts=2)
    attempts = group_attempts(tasks, KEY, config)

    def one(processes):
        new = lambda: Rollout(sampler, ByteChat(), LocalPool(6 // processes.count + 1, make), config, processes)

        def resumed(rollout: Rollout, carried: Carried):
            return new(), from_record(json.loads(json.dumps(record(carried))), attempts)

        return all_of(play(sampler, versions, config, between=resumed, rollout=new()))

    expected = one(SINGLE_PROCESS)
    assert ("begins again" in caplog.text) == (make is Forgetful)
    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(one, process_groups(2))) == [expected, expected]


def test_nothing_compiles_after_warm_up(versions):
    sampler = Sampler(POLICY, SamplingConfig(), [STOP], capacity=96, slack=CONFIG.slack, windows=CONFIG.windows)
    rollout = Rollout(sampler, ByteChat(), LocalPool(12), CARRY)
    rollout.warm_up(versions[0])
    counts = []

    def count(*pair):
        counts.append((sampler.compilations, compilations()))
        return pair

    play(sampler, versions, CARRY, rollout=rollout, between=count)
    assert len(set(counts)) == 1


def test_settings_out_of_range_are_refused():
    with pytest.raises(
        ValueError, match=r"expected rollout.carry_min_groups from 0 \(off\) to rollout.groups_per_step"
    ):
        replace(CONFIG, carry_min_groups=4)
    with pytest.raises(ValueError, match="expected rollout.carry_max_age >= 1, got 0"):
        replace(CARRY, carry_max_age=0)
