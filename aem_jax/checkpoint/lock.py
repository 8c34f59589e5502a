"""A folder that one process at a time writes to: who holds it is known, and a crash leaves it free.

The kernel's lock on a file (`flock`) decides between processes of one machine and is released when its holder ends,
however it ends. On a shared file system it may hold between machines, between the processes of one machine alone, or
not exist. So the holder also refreshes the file's modification time, and a process of another machine watches the file
for `PATIENCE_S` before it takes a lock that seems free: clocks are not compared, only whether the time moves.
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
"""Seconds without a refresh after which the holder on another machine counts as gone."""
SETTLE_S = 2.0
"""Where there is no kernel's lock: seconds after which the last of several simultaneous writers holds the file."""

_TAKEN = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)


class LockedError(RuntimeError):
    """Another process holds the lock, or took it over; the message says which, and since when."""


class FolderLock:
    """The lock of a folder, held from its making until `release`.

    The lock's file stays behind, empty: to delete it would let two processes hold locks of two files of one name.

    Args:
        path: the lock's file; its folder exists.
        waiting: called with the holder's description before a holder on another machine is watched.

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
        """Whether this process still holds the lock.

        Raises:
            LockedError: another process took it over, since this one stood still for too long.
        """
        holder = self._holder()
        if holder.get("token") != self._own["token"]:
            raise LockedError(describe(holder))

    def release(self) -> None:
        """Lets go of the folder."""
        self._released.set()
        self._thread.join()
        if self._holder().get("token") == self._own["token"]:
            self._write("")
        os.close(self._file)  # with it goes the kernel's lock

    def _acquire(self) -> bool:
        """Takes the kernel's lock; returns False where there is none."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _TAKEN:
                raise LockedError(describe(self._holder())) from None
            return False
        return True

    def _holder(self) -> dict[str, Any]:
        """What the file says of its holder; nothing if it says nothing."""
        try:
            found = parse_json(self._path.read_bytes(), str(self._path))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def _write(self, text: str) -> None:
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, text.encode(), 0)
        os.fsync(self._file)

    def _is_refreshed(self) -> bool:
        """Whether the file changes while it is watched."""
        first, deadline = self._seen(), time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            time.sleep(min(0.5, PATIENCE_S / 10))
            if self._seen() != first:
                return True
        return False

    def _seen(self) -> tuple[int, bytes]:
        """Modification time and content; a file that is opened anew is asked for at the server of a network."""
        with self._path.open("rb") as file:
            return os.fstat(file.fileno()).st_mtime_ns, file.read()


def describe(holder: dict[str, Any]) -> str:
    """The holder of a lock in words."""
    if not holder:
        return "another process"
    return f"process {holder.get('pid')} on {holder.get('host')} (since {holder.get('since')})"


def _refresh(file: int, released: threading.Event) -> None:
    while not released.wait(REFRESH_S):
        try:
            os.utime(file)
        except OSError:
            continue  # a server of the network that is away may come back


def _machine() -> str:
    """Names the running kernel, whose `flock` is certain: containers of a machine share it, a restart changes it."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return socket.gethostname()
