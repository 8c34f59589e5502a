"""Which process plays which slot, and in which session of its own pool."""

from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any, Protocol

from aem_jax.distributed import ProcessGroup
from aem_jax.envs.protocol import StepResult


class Pool(Protocol):
    """Environment sessions; a failed call raises `EnvError` in its future."""

    @property
    def capacity(self) -> int:
        """Number of sessions."""
        ...

    def server_of(self, session: int) -> int:
        """Which server a session lives on: sessions of one server are lost together."""
        ...

    def reset(self, session: int, payload: Mapping[str, Any]) -> Future[StepResult]:
        """Begins an episode in a session."""
        ...

    def step(self, session: int, text: str) -> Future[StepResult]:
        """Sends a response."""
        ...


class Seats:
    """The slots 0 … N−1 of all cohorts, dealt to the processes: of each cohort, each plays a run of neighbours.

    Args:
        pool: this process's sessions, one for each slot that it plays.
        hosts: the processes.
        num_slots: N.
        num_cohorts: cohorts of equal size; slot s belongs to cohort s // size.

    Raises:
        ValueError: the pool has fewer sessions than this process has slots.
    """

    def __init__(self, pool: Pool, hosts: ProcessGroup, num_slots: int, num_cohorts: int) -> None:
        self._pool, size = pool, num_slots // num_cohorts
        own = hosts.shard(size)
        if pool.capacity < num_cohorts * len(own):
            where = "" if hosts.count == 1 else f" of process {hosts.index}"
            raise ValueError(
                f"expected an environment session for each of {num_cohorts * len(own)} slots{where}, "
                f"got {pool.capacity}; raise the pool's sessions or lower rollout.num_slots"
            )
        self._sessions = {
            cohort * size + slot: cohort * len(own) + at for cohort in range(num_cohorts) for at, slot in enumerate(own)
        }
        self._servers: dict[int, tuple[int, int]] = {}
        ours = [[slot, pool.server_of(session)] for slot, session in self._sessions.items()]
        for process, theirs in enumerate(hosts.gather_json(ours)):
            self._servers |= {slot: (process, server) for slot, server in theirs}

    def is_ours(self, slot: int) -> bool:
        """Whether this process plays a slot."""
        return slot in self._sessions

    def server_of(self, slot: int) -> tuple[int, int]:
        """(process, server) that a slot's session lives on."""
        return self._servers[slot]

    def reset(self, slot: int, payload: Mapping[str, Any]) -> Future[StepResult] | None:
        """Begins an episode; None where another process does."""
        return self._pool.reset(self._sessions[slot], payload) if slot in self._sessions else None

    def step(self, slot: int, text: str) -> Future[StepResult]:
        """Sends a response in a slot of this process's."""
        return self._pool.step(self._sessions[slot], text)
