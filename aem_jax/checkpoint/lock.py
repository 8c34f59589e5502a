"""A lock that lets one process at a time write to a folder. It names its holder, and a crash releases it.

The kernel's lock on a file (`flock`) decides between processes of one machine, and is released when its holder ends in
any way. On a shared file system it may work between machines, only between the processes of one machine, or not at all.
So the holder also refreshes the file's modification time. A process of another machine watches the file for
`PATIENCE_S` before it takes a lock that seems free. Clocks are not compared; only a change of the time counts.
"""

import errno
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from aem_jax.files import parse_json

REFRESH_S = 5.0
"""Seconds between two refreshes of the modification time."""
PATIENCE_S = 25.0
"""Seconds without a refresh after which a holder on another machine counts as gone."""
SETTLE_S = 2.0
"""Without a kernel lock: seconds after which the last of several simultaneous writers holds the file."""

_TAKEN = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)


class LockedError(RuntimeError):
    """Another process holds the lock, or has taken it over; the message names it, and since when."""


class FolderLock:
    """The lock of a folder, held from construction until `release`.

    The lock's file stays, empty: deleting it would let two processes hold locks of two files with the same name.

    Args:
        path: the lock's file; its folder exists.
        waiting: called with the holder's description before this process watches a holder on another machine.

    Raises:
        LockedError: another process holds it.
        OSError: the file cannot be written.
    """

    def __init__(self, path: Path, waiting: Callable[[str], None] = lambda holder: None):
        self._path = path
        self._own = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
            "machine": _machine(),
            "token": os.urandom(8).hex(),
        }
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            certain = self._acquire()
            holder = self._holder()
            if holder and not (certain and holder.get("machine") == self._own["machine"]):
                waiting(describe(holder))
                if self._is_refreshed():
                    raise LockedError(describe(holder))
            self._write(json.dumps(self._own) + "\n")
            if not certain:
                time.sleep(SETTLE_S)
                self.check()
        except BaseException:
            os.close(self._file)
            raise
        self._released = threading.Event()
        self._thread = threading.Thread(
            target=_refresh, args=(self._file, self._released), name="folder-lock", daemon=True
        )
        self._thread.start()

    def check(self) -> None:
        """Checks that this process still holds the lock.

        Raises:
            LockedError: another process has taken it over, because this one was stopped for too long.
        """
        holder = self._holder()
        if holder.get("token") != self._own["token"]:
            raise LockedError(describe(holder))

    def release(self) -> None:
        """Releases the lock."""
        self._released.set()
        self._thread.join()
        if self._holder().get("token") == self._own["token"]:
            self._write("")
        os.close(self._file)  # releases the kernel lock

    def _acquire(self) -> bool:
        """Takes the kernel lock; returns False where the file system has none."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _TAKEN:
                raise LockedError(describe(self._holder())) from None
            return False
        return True

    def _holder(self) -> dict[str, Any]:
        """The record of the holder in the file; empty where there is none."""
        try:
            holder = parse_json(self._path.read_bytes(), str(self._path))
        except (OSError, ValueError):
            return {}
        return holder if isinstance(holder, dict) else {}

    def _write(self, text: str) -> None:
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, text.encode(), 0)
        os.fsync(self._file)

    def _is_refreshed(self) -> bool:
        """Whether the file changes within `PATIENCE_S`."""
        first, deadline = self._seen(), time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            time.sleep(min(0.5, PATIENCE_S / 10))
            if self._seen() != first:
                return True
        return False

    def _seen(self) -> tuple[int, bytes]:
        """Modification time and content. Opening the file anew makes a network file system ask its server."""
        with self._path.open("rb") as file:
            return os.fstat(file.fileno()).st_mtime_ns, file.read()


def describe(holder: dict[str, Any]) -> str:
    """Describes the holder of a lock."""
    if not holder:
        return "another process"
    return f"process {holder.get('pid')} on {holder.get('host')} (since {holder.get('since')})"


def _refresh(file: int, released: threading.Event) -> None:
    while not released.wait(REFRESH_S):
        try:
            os.utime(file)
        except OSError:
            continue  # an unreachable file server may come back


def _machine() -> str:
    """Identifies the running kernel, within which `flock` is reliable: containers share it, a reboot changes it."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return socket.gethostname()
