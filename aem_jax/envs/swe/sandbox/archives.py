"""Repositories packed once and copied into every workspace of their instance."""

import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import IO, TYPE_CHECKING

from aem_jax.envs.swe.sandbox.workspace import Checkout, SandboxError

if TYPE_CHECKING:
    from aem_jax.envs.swe.instance import Instance

KEPT = 8
"""Repositories that stay packed (a group plays one instance many times)."""
_PREFIX = "aem-swe-"


class Archives:
    """The latest checkouts as tar files, which have no name on the host and so need no clearing away."""

    def __init__(self):
        self._entries: dict[tuple[Instance, Checkout], _Entry] = {}
        self._lock = threading.Lock()
        _sweep()

    def open(self, instance: "Instance", checkout: Checkout) -> int:
        """A descriptor, the caller's to close, of the instance's tar file.

        Raises:
            SandboxError: the checkout could not be packed; what the checkout itself raises comes through.
        """
        with self._lock:
            entry = self._entries.pop((instance, checkout), None) or _Entry()
            self._entries[instance, checkout] = entry
            if len(self._entries) > KEPT:
                self._entries.pop(next(iter(self._entries)))
        with entry.lock:  # one packs; whoever wants the same waits, and nobody else
            entry.file = entry.file or _pack(lambda folder: checkout(instance, folder))
            return os.open(f"/proc/self/fd/{entry.file.fileno()}", os.O_RDONLY)  # with a position of its own


class _Entry:
    """A tar file that may still be in the making; closed when nobody holds it any more."""

    def __init__(self):
        self.lock = threading.Lock()
        self.file: IO[bytes] | None = None


def _pack(fill: Callable[[Path], None]) -> IO[bytes]:
    """What `fill` puts into an empty folder, as a tar file that has no name any more."""
    folder = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-"))
    archive = tempfile.TemporaryFile()  # noqa: SIM115 (returned open)
    try:
        content = folder / "testbed"
        content.mkdir()
        fill(content)
        # Not `.` itself: unpacked, it would have to take that folder's mode, and a container's /testbed is root's.
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
    """Removes what a process left that was killed while it packed."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*-*"):
        owner = folder.name.removeprefix(_PREFIX).split("-")[0]
        if owner.isdigit() and not os.path.exists(f"/proc/{owner}"):
            shutil.rmtree(folder, ignore_errors=True)
