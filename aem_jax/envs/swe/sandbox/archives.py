"""Tar files of repositories: each is packed once and copied into every workspace of its instance."""

import contextlib
import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Hashable, Iterator
from pathlib import Path
from typing import IO

from aem_jax.envs.swe.sandbox.workspace import Checkout, Repository, SandboxError

KEPT = 8
"""Number of tar files that are kept (a group attempts one instance many times)."""
_PREFIX = "aem-swe-"


class Archives:
    """Tar files of the latest checkouts. They have no name on the host, so they need no cleanup."""

    def __init__(self):
        self._entries: dict[Hashable, _Entry] = {}
        self._lock = threading.Lock()
        _sweep()

    def of_checkout(self, instance: Repository, checkout: Checkout) -> contextlib.AbstractContextManager[int]:
        """Yields a descriptor of the tar file of a checkout.

        Raises:
            SandboxError: the checkout could not be packed. Exceptions of the checkout itself propagate.
        """
        return self.open((instance, checkout), lambda: _pack(lambda folder: checkout(instance, folder)))

    @contextlib.contextmanager
    def open(self, key: Hashable, pack: Callable[[], IO[bytes]]) -> Iterator[int]:
        """Yields a descriptor of the tar file of a key, which `pack` makes if there is none."""
        with self._lock:
            entry = self._entries.pop(key, None) or _Entry()
            self._entries[key] = entry
            if len(self._entries) > KEPT:
                self._entries.pop(next(iter(self._entries)))
        with entry.lock:  # one thread packs; only threads that need the same archive wait
            entry.file = entry.file or pack()
            archive = os.open(f"/proc/self/fd/{entry.file.fileno()}", os.O_RDONLY)  # with its own file position
        try:
            yield archive
        finally:
            os.close(archive)


class _Entry:
    """A tar file that may not be packed yet; closed with its last reference."""

    def __init__(self):
        self.lock = threading.Lock()
        self.file: IO[bytes] | None = None


def _pack(fill: Callable[[Path], None]) -> IO[bytes]:
    """Packs the files that `fill` writes to an empty folder; returns an unnamed tar file."""
    folder = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-"))
    archive = tempfile.TemporaryFile()  # noqa: SIM115 (returned open)
    try:
        content = folder / "testbed"
        content.mkdir()
        fill(content)
        # Without `.` itself: unpacking it would set the mode of /testbed, which belongs to root in a container.
        command = ["tar", "--create", "--file=-", "--directory", str(content)]
        command += ["--null", "--verbatim-files-from", "--files-from=-"]
        names = b"".join(b"./%s\0" % os.fsencode(name) for name in sorted(os.listdir(content)))
        done = subprocess.run(command, input=names, stdout=archive, stderr=subprocess.PIPE)
        if done.returncode:
            raise SandboxError(f"the checkout could not be packed: {done.stderr.decode(errors='replace').strip()}")
        return archive
    except BaseException:
        archive.close()
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _sweep() -> None:
    """Removes files left by a process that was killed while packing."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*-*"):
        owner = folder.name.removeprefix(_PREFIX).split("-")[0]
        if owner.isdigit() and not os.path.exists(f"/proc/{owner}"):
            shutil.rmtree(folder, ignore_errors=True)
