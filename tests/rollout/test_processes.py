"""Several processes play one rollout, each its own slots. All end with the trajectories of a single process.

Threads stand for processes here. All must make the same calls to the sampler, which are recorded.
"""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aem_jax.distributed import ProcessGroup
from aem_jax.rollout import Rollout, slots
from aem_jax.rollout.sessions import SlotSessions
from aem_jax.sampler import Sampler

from .fakes import CONFIG, TASKS, ByteChat, LatePool, LocalPool, RoomPool, sampled

TWO_COHORTS = replace(CONFIG, num_slots=6, num_cohorts=2)


class Recorded:
    """A sampler that records which programs are called, with which static arguments."""

    def __init__(self, sampler: Sampler):
        self._sampler, self.calls = sampler, []

    def __getattr__(self, name: str):
        attribute = getattr(self._sampler, name)
        if name not in ("extend", "decode", "fork", "copy_prefix", "rewind"):
            return attribute

        def call(*arguments, **named):
            shapes = [np.shape(argument) for argument in arguments if isinstance(argument, np.ndarray)]
            self.calls.append((name, shapes, *(argument for argument in arguments if isinstance(argument, int)), named))
            return attribute(*arguments, **named)

        return call


class WithExperts(Recorded):
    """Also records reads of experts. The sampler has none, so all are 0."""

    records_experts = True

    def read_experts(self, state, slot: int) -> jax.Array:
        self.calls.append(("read_experts", slot))
        return jnp.zeros((CONFIG.context_tokens, 2), jnp.uint8)


def process_groups(count: int) -> list[ProcessGroup]:
    """A process group of `count` members, run as threads of one process."""
    sent: list[bytes] = [b""] * count
    barrier = threading.Barrier(count, timeout=60)

    def gather(index: int, data: bytes) -> list[bytes]:
        sent[index] = data
        barrier.wait()
        gathered = list(sent)
        barrier.wait()
        return gathered

    return [ProcessGroup(i, count, lambda data, i=i: gather(i, data)) for i in range(count)]


def play(
    sampler,
    params,
    count: int,
    config=TWO_COHORTS,
    broken: Callable = lambda process, session, call: False,
    pool: Callable[[int], LocalPool] | None = None,
    recorder: type[Recorded] = Recorded,
):
    """(trajectories, stats, calls to the sampler) of each of `count` processes."""

    def one(processes: ProcessGroup):
        recorded = recorder(sampler)
        own = LocalPool(6 if count == 1 else 4, broken=lambda session, call: broken(processes.index, session, call))
        own = pool(processes.index) if pool else own
        rollout = Rollout(recorded, ByteChat(), own, config, processes)  # pyright: ignore[reportArgumentType]
        return *rollout(params, TASKS, jax.random.key(7)), recorded.calls

    with ThreadPoolExecutor(count) as threads:
        return list(threads.map(one, process_groups(count)))


def episodes(trajectories) -> list:
    """All fields of trajectories that a learner reads."""
    return [
        (t.group, t.member, t.ending, t.success, t.total_reward)
        + tuple((turn.observation_ids.tolist(), turn.response_ids.tolist(), turn.logprobs.tolist()) for turn in t.turns)
        for t in trajectories
    ]


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("context", ["append", "window"])
def test_all_processes_make_the_calls_that_one_would_make(sampler, params, count: int, context: str):
    config = replace(TWO_COHORTS, context=context, window_turns=1)
    [(expected, _, calls)] = play(sampler, params, 1, config)
    for trajectories, stats, theirs in play(sampler, params, count, config):
        assert theirs == calls
        assert episodes(trajectories) == episodes(expected)
        assert [(t.task.id, t.turns[0].observation, t.turns[0].response) for t in trajectories] == [
            (t.task.id, t.turns[0].observation, t.turns[0].response) for t in expected
        ]
        assert stats.sampled_tokens == sum(len(turn.response_ids) for t in trajectories for turn in t.turns)


def test_a_broken_environment_of_one_process_is_retried_by_all(sampler, params):
    [(expected, *_)] = play(sampler, params, 1)
    runs = play(sampler, params, 2, broken=lambda process, _, call: process == 1 and call in (3, 9, 10))
    for trajectories, stats, calls in runs:
        assert sampled(trajectories) == sampled(expected)
        assert stats.retries == 3 and calls == runs[0][2]


def test_a_session_that_stays_broken_masks_the_same_episodes_in_all_processes(sampler, params):
    runs = play(sampler, params, 2, broken=lambda process, session, _: process == 1 and session == 0)
    assert runs[0][1].env_errors >= 1
    assert episodes(runs[0][0]) == episodes(runs[1][0]) and runs[0][2] == runs[1][2]


def test_each_process_needs_sessions_for_its_own_slots_only():
    with ThreadPoolExecutor(2) as threads:
        sessions = list(threads.map(lambda processes: SlotSessions(LocalPool(6), processes, 12, 2), process_groups(2)))
    assert [slot for slot in range(12) if sessions[1].is_local(slot)] == [3, 4, 5, 9, 10, 11]
    assert [sessions[0].server_of(slot) for slot in (0, 3, 6, 9)] == [(0, 0), (1, 0), (0, 3), (1, 3)]
    lonely = ProcessGroup(1, 2, lambda data: [data, data])
    with pytest.raises(ValueError, match="each of 6 slots of process 1, got 5; raise the pool's sessions"):
        SlotSessions(LocalPool(5), lonely, 12, 2)


def test_continuous_processes_agree_on_the_replies(sampler, params):
    """Replies come at different times to each process; still all make the same calls."""
    config = replace(TWO_COHORTS, mode="continuous", num_cohorts=1, slot_divisors=(3,))
    [(expected, *_)] = play(sampler, params, 1)
    runs = play(sampler, params, 2, config, pool=lambda process: LatePool(4, process))
    assert runs[0][2] == runs[1][2] and episodes(runs[0][0]) == episodes(runs[1][0])
    assert sampled(runs[0][0]) == sampled(expected)


def test_processes_make_the_same_calls_when_one_of_them_waits_for_room(sampler, params, monkeypatch):
    monkeypatch.setattr(slots, "_ROOM_S", 0.01)
    [(expected, *_)] = play(sampler, params, 1)
    pool = lambda process: RoomPool(4, room=4 if process else 2)
    runs = play(sampler, params, 2, pool=pool, recorder=WithExperts)
    assert sampled(runs[0][0]) == sampled(runs[1][0]) == sampled(expected)
    assert runs[0][2] == runs[1][2]
    assert all(turn.experts is not None for t in runs[0][0] for turn in t.turns)


def test_processes_that_play_different_episodes_are_refused(sampler, params):
    tasks = [TASKS, list(reversed(TASKS))]  # as if they had drawn different tasks

    def one(processes: ProcessGroup):
        rollout = Rollout(sampler, ByteChat(), LocalPool(4), TWO_COHORTS, processes)
        return rollout(params, tasks[processes.index], jax.random.key(7 + processes.index))

    with ThreadPoolExecutor(2) as threads:
        for future in [threads.submit(one, processes) for processes in process_groups(2)]:
            with pytest.raises(RuntimeError, match="no longer play the same episodes"):
                future.result()
