"""Environment sessions of the slots: what a pool of sessions does, and which process plays which slot."""

from collections.abc import Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any, Protocol, runtime_checkable

import numpy as np

from aem_jax.distributed import ProcessGroup
from aem_jax.envs.protocol import StepResult


class Pool(Protocol):
    """Environment sessions; a failed call raises `EnvError` in its future."""

    @property
    def capacity(self) -> int:
        """Number of sessions."""
        ...

    def server_of(self, session: int) -> int:
        """The server of a session. Sessions of one server are lost together."""
        ...

    def reset(self, session: int, payload: Mapping[str, Any]) -> Future[StepResult]:
        """Starts an episode in a session."""
        ...

    def step(self, session: int, text: str) -> Future[StepResult]:
        """Sends a response."""
        ...


@runtime_checkable
class StreamingPool(Pool, Protocol):
    """A pool whose sessions read a response while it is sampled, and may go on without it."""

    def sampled(self, session: int, ids: np.ndarray, logprobs: np.ndarray) -> None:
        """Tokens that were sampled for the response, in chunks."""
        ...

    def without_response(self, session: int) -> Future[StepResult]:
        """The result of a session that no longer waits for its response. `step` may still follow, with its result."""
        ...


@runtime_checkable
class HostedPool(Pool, Protocol):
    """A pool whose episodes hold room on their servers' hosts, for which others wait."""

    def waits(self, session: int) -> bool:
        """Whether the pending call of a session waits for room."""
        ...

    def release(self, session: int) -> None:
        """Ends an episode that its environment has not ended."""
        ...


class SlotSessions:
    """Environment sessions of the slots 0 … N−1. Each process plays a contiguous range of each cohort's slots.

    Args:
        pool: this process's sessions, one for each slot that it plays.
        processes: the processes of the run.
        num_slots: N.
        num_cohorts: cohorts of equal size; slot s belongs to cohort s // size.

    Raises:
        ValueError: the pool has fewer sessions than this process has slots.
    """

    def __init__(self, pool: Pool, processes: ProcessGroup, num_slots: int, num_cohorts: int) -> None:
        self._pool, size = pool, num_slots // num_cohorts
        own = processes.shard(size)
        if pool.capacity < num_cohorts * len(own):
            where = "" if processes.count == 1 else f" of process {processes.index}"
            raise ValueError(
                f"expected an environment session for each of {num_cohorts * len(own)} slots{where}, "
                f"got {pool.capacity}; raise the pool's sessions or lower rollout.num_slots"
            )
        self._sessions = {
            cohort * size + slot: cohort * len(own) + index
            for cohort in range(num_cohorts)
            for index, slot in enumerate(own)
        }
        self._streaming = pool if isinstance(pool, StreamingPool) else None
        self._hosted = pool if isinstance(pool, HostedPool) else None
        self._servers: dict[int, tuple[int, int]] = {}
        local = [[slot, pool.server_of(session)] for slot, session in self._sessions.items()]
        for process, servers in enumerate(processes.gather_json(local)):
            self._servers |= {slot: (process, server) for slot, server in servers}

    def is_local(self, slot: int) -> bool:
        """Whether this process plays a slot."""
        return slot in self._sessions

    def server_of(self, slot: int) -> tuple[int, int]:
        """(process, server) of a slot's session."""
        return self._servers[slot]

    def reset(self, slot: int, payload: Mapping[str, Any]) -> Future[StepResult] | None:
        """Starts an episode; None where another process plays the slot."""
        return self._pool.reset(self._sessions[slot], payload) if slot in self._sessions else None

    def step(self, slot: int, text: str) -> Future[StepResult]:
        """Sends a response in a local slot."""
        return self._pool.step(self._sessions[slot], text)

    def waits(self, slot: int) -> bool:
        """Whether the pending call of a local slot waits for room on its server's host."""
        return self._hosted is not None and self._hosted.waits(self._sessions[slot])

    def release(self, slot: int) -> None:
        """Ends the episode of a local slot that has no pending call, if its environment has not ended it."""
        if self._hosted is not None and slot in self._sessions:
            self._hosted.release(self._sessions[slot])

    def release_when_done(self, calls: Mapping[int, Future[StepResult]]) -> None:
        """Waits for calls of local slots, and releases each slot as its call ends: others may wait for its room."""
        pending = dict(calls)
        while pending:
            wait(pending.values(), return_when=FIRST_COMPLETED)
            for slot in [slot for slot, call in pending.items() if call.done()]:
                del pending[slot]
                self.release(slot)

    def sampled(self, slot: int, ids: np.ndarray, logprobs: np.ndarray) -> None:
        """Sends sampled tokens to a local slot's session, if it streams."""
        if self._streaming is not None and slot in self._sessions:
            self._streaming.sampled(self._sessions[slot], ids, logprobs)

    def without_response(self, slot: int) -> Future[StepResult] | None:
        """The result of a local slot's session that goes on without its response; None for a pool that never does."""
        if self._streaming is None or slot not in self._sessions:
            return None
        return self._streaming.without_response(self._sessions[slot])
