"""Admission of workspaces: a queue, over all processes of a user on a host, that admits what the host has room for.

Each workspace reserves its own limits on processors, memory and disk. The reservations of all processes are in one
file, the ledger, in a folder of the user (`user_folder`); a lock on a file beside it guards every change. The first in
the queue is admitted as soon as its needs fit beside the reservations; nobody overtakes it. Reservations and places in
the queue of processes that have ended are dropped, so a killed server leaves nothing behind.

Memory and disk are what was free when no workspace was open. A processor counts `CPU_SHARES` times: a workspace uses
its processors only while a command runs, and waits for the policy otherwise. One workspace is always admitted where
none is open, if the machine is large enough for it at all.
"""

import json
import logging
import os
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aem_jax.envs.protocol import waiting
from aem_jax.envs.swe.sandbox.host import Resource, is_alive, locked, measure, namespace, start_time, user_folder
from aem_jax.envs.swe.sandbox.workspace import SandboxError

CPU_SHARES = 4
"""Processors that workspaces may reserve together for each processor of the host."""
KEPT_FREE = 0.1
"""Fraction of free memory and disk that is left to the rest of the host."""
_POLL_S, _READ_S, _REPORT_S = 0.02, 2.0, 60.0
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class HostConfig:
    """What the workspaces of this host may reserve together; a workspace that does not fit waits for its turn."""

    cpus: float = 0.0
    """Processors; 0: four times those of the host, because a workspace is idle while the policy responds."""
    memory_mib: int = 0
    """Memory, MiB; 0: what is free when no workspace is open. More than that relies on workspaces that use less than
    their limits."""
    disk_mib: int = 0
    """Disk of the engine's containers, MiB; 0: what is free when no workspace is open."""
    warm: int = 4
    """Sandboxes that each server process keeps ready: empty ones of bubblewrap; containers of instances whose agent is
    at work, for their gradings and for other members of their groups."""
    image_gib: float = 200.0
    """Disk for images that this program fetched or made, GiB: those that were not used for longest are removed. Images
    that were there before stay. 0 sets no bound."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 0:
                raise ValueError(f"expected {name} of at least 0, got {value}")


@dataclass(frozen=True)
class Needs:
    """What a workspace reserves.

    Attributes:
        cpus: processors; 0 if it has no limit.
        memory_mib: memory of its processes and of its in-memory file systems, MiB.
        disk_mib: disk, MiB.
        disk_at: a folder on that disk; empty if it is not on this host, and then nothing of it is reserved.
    """

    cpus: float
    memory_mib: int
    disk_mib: int = 0
    disk_at: str = ""

    def by_resource(self) -> dict[str, float]:
        """Returns the needs by the names of the resources."""
        disk = {f"disk_mib of {self.disk_at}": float(self.disk_mib)} if self.disk_at else {}
        return {"cpus": self.cpus, "memory_mib": float(self.memory_mib), **disk}


class Admission:
    """The queue of this host.

    Args:
        config: replaces measured capacities.
        folder: of the ledger; by default the user's.
        measured: `measure`, or a function like it.

    Attributes:
        config: the settings.
    """

    def __init__(
        self,
        config: HostConfig = HostConfig(),
        folder: Path | None = None,
        measured: Callable[[str], Mapping[str, Resource]] = measure,
    ):
        self.config, self._folder, self._measured = config, folder, measured

    def reserve(self, needs: Needs, who: str) -> "Reservation":
        """Waits for its turn and for room, and reserves it. An environment's deadline does not run meanwhile.

        Args:
            needs: of a workspace.
            who: the workspace, for messages.

        Raises:
            SandboxError: the host is too small for it.
        """
        ledger = _Ledger(self._folder or user_folder())
        resources = self._measured(needs.disk_at)
        wanted = needs.by_resource()
        # more processors than there are limit nothing
        wanted["cpus"] = min(wanted["cpus"], resources["cpus"].total)
        self._check(wanted, resources, who)
        number = uuid.uuid4().hex
        entry = {"id": number, "pid": os.getpid(), "start": start_time(os.getpid()), "open": False, "needs": wanted}
        try:
            if ledger.change(lambda state: self._enter(state, entry, resources)):
                return Reservation(ledger, number)
            with waiting():
                self._wait(ledger, number, who, needs)
            return Reservation(ledger, number)
        except BaseException:
            ledger.remove(number)
            raise

    def _check(self, wanted: Mapping[str, float], resources: Mapping[str, Resource], who: str) -> None:
        for name, amount in wanted.items():
            if name == "cpus":
                continue
            option, _, place = name.partition(" of ")
            most, source = getattr(self.config, option), f"option host.{option}"
            if not most:
                most, source = resources[name].total, f"{place or 'this host'} has no more"
            if amount > most:
                raise SandboxError(
                    f"{who}: expected {option} of at most {most:.0f} together with its in-memory folders ({source}), "
                    f"got {amount:.0f}; lower its limits, or use a larger host"
                )

    def _enter(self, state: "_State", entry: dict[str, Any], resources: Mapping[str, Resource]) -> bool:
        """Puts an entry at the end of the queue; returns whether it is admitted at once."""
        idle = not any(each["open"] for each in state.entries)
        for name, resource in resources.items():
            if idle or name not in state.capacity:
                state.capacity[name] = resource.free * (CPU_SHARES if name == "cpus" else 1 - KEPT_FREE)
        state.entries.append(entry)
        return self._admit(state, entry["id"])

    def _admit(self, state: "_State", number: str) -> bool:
        """Admits an entry if it is the first in the queue and fits; returns whether it is admitted."""
        entry = next((each for each in state.entries if each["id"] == number), None)
        if entry is None:
            raise SandboxError("the ledger of this host's workspaces was removed while a workspace waited for room")
        if any(not each["open"] for each in state.entries[: state.entries.index(entry)]):
            return False
        opened = [each["needs"] for each in state.entries if each["open"]]
        capacity = dict(state.capacity)
        for name in capacity:
            capacity[name] = getattr(self.config, name.partition(" of ")[0]) or capacity[name]
        used = lambda name: sum(needs.get(name, 0.0) for needs in opened)
        if opened and any(used(name) + amount > capacity[name] for name, amount in entry["needs"].items() if amount):
            return False
        entry["open"] = True
        return True

    def _wait(self, ledger: "_Ledger", number: str, who: str, needs: Needs) -> None:
        """Waits until an entry is admitted. Other processes' changes show in the status of the ledger's file, which is
        cheap to look at; their end shows only when it is read."""
        began = reported = time.monotonic()
        seen, read = ledger.version(), time.monotonic()
        while True:
            time.sleep(_POLL_S)
            now, version = time.monotonic(), ledger.version()
            if version != seen or now - read >= _READ_S:
                seen, read = version, now
                if ledger.change(lambda state: self._admit(state, number)):
                    return
            if now - reported >= _REPORT_S:
                reported = now
                _log.warning(
                    "%s has waited %.0f s for room for %s on this host", who, now - began, json.dumps(vars(needs))
                )


class Reservation:
    """The room of one workspace, until it is closed or its process ends."""

    def __init__(self, ledger: "_Ledger", number: str):
        self._ledger, self._number = ledger, number

    def close(self) -> None:
        """Gives the room back. A second call does nothing."""
        number, self._number = self._number, ""
        if number:
            self._ledger.remove(number)


@dataclass
class _State:
    """The ledger's content (mutable): capacities by resource, and the entries in the order of their arrival."""

    capacity: dict[str, float] = field(default_factory=dict)
    entries: list[dict[str, Any]] = field(default_factory=list)


class _Ledger:
    """The file of reservations. It is replaced as a whole, so a killed writer leaves the old one."""

    def __init__(self, folder: Path):
        # process ids mean something in one namespace only
        name = f"workspaces-{namespace()}"
        self._path, self._lock = folder / f"{name}.json", folder / f"{name}.lock"

    def version(self) -> tuple[int, int] | None:
        """Returns something that changes with the content."""
        try:
            stat = self._path.stat()
        except OSError:
            return None
        return stat.st_ino, stat.st_mtime_ns

    def change(self, apply: Callable[[_State], bool]) -> bool:
        """Applies a function to the content, without entries of processes that have ended; writes it if the function
        returns True or an entry is new."""
        with locked(self._lock):
            state = self._read()
            count = len(state.entries)
            state.entries = [entry for entry in state.entries if is_alive(entry["pid"], entry["start"])]
            before = [entry["id"] for entry in state.entries]
            changed = apply(state)
            if changed or count != len(before) or before != [entry["id"] for entry in state.entries]:
                scratch = self._path.with_suffix(".new")
                scratch.write_text(json.dumps(vars(state)), encoding="utf-8")
                scratch.replace(self._path)
            return changed

    def remove(self, number: str) -> None:
        """Removes an entry."""

        def apply(state: _State) -> bool:
            state.entries = [entry for entry in state.entries if entry["id"] != number]
            return False

        self.change(apply)

    def _read(self) -> _State:
        try:
            return _State(**json.loads(self._path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return _State()
