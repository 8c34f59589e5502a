"""What untrusted code runs in: the limits, what a command came to, and the two protocols that every runtime fulfils.

A `Runtime` opens a `Workspace`, one private copy of a repository at `/testbed`. Nothing that runs in a workspace is
trusted, and nothing that comes out of it is more than bytes: the host follows no path, starts no program and parses no
file of a workspace.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from aem_jax.envs.swe.instance import Instance

TESTBED = "/testbed"
"""Where a workspace's copy of the repository lies, seen from inside."""


class SandboxError(RuntimeError):
    """A workspace could not be opened or answered rubbish; no verdict about the code that was to run in it."""


class WorkspaceError(RuntimeError):
    """A file of a workspace could not be read or written: the code in it, or the policy, is to blame."""


@dataclass(frozen=True)
class Limits:
    """What one command may take. `disk_mib` is fixed when the workspace is opened, the others hold for each command."""

    seconds: float = 90.0
    """Wall time; then the whole process tree is killed."""
    memory_mib: int = 2048
    """Memory of all processes together, MiB."""
    processes: int = 128
    """Processes and threads at once."""
    file_mib: int = 256
    """Largest file that may be written, MiB."""
    disk_mib: int = 1024
    """All that the workspace holds: work tree, /tmp and /dev/shm, MiB."""
    output_bytes: int = 65536
    """Output that is kept; more is cut out of the middle while the command runs."""
    cpu_seconds: int = 0
    """Processor time of each process: ends an endless loop at the same point on a busy machine and on an idle one;
    0: what `seconds` allows."""

    def __post_init__(self):
        if self.cpu_seconds < 0:
            raise ValueError(f"expected the limit cpu_seconds of at least 0, got {self.cpu_seconds}")
        for name in (f.name for f in fields(self) if f.name != "cpu_seconds"):
            if not getattr(self, name) > 0:
                raise ValueError(f"expected the limit {name} above 0, got {getattr(self, name)}")
        for name, least in (("memory_mib", 64), ("processes", 8), ("disk_mib", 16), ("output_bytes", 256)):
            if getattr(self, name) < least:
                raise ValueError(f"expected the limit {name} of at least {least}, got {getattr(self, name)}")


@dataclass(frozen=True)
class Outcome:
    """What a command came to.

    Attributes:
        exit_code: its exit status (128 + n: killed by signal n); None where a limit of the sandbox ended it.
        output: stdout and stderr in order, invalid UTF-8 replaced, the middle cut out with a notice where it was long.
        timed_out: whether it was the deadline that ended it.
        seconds: wall time that it took.
        notice: what ended it, where a limit did; else empty.
    """

    exit_code: int | None
    output: str
    timed_out: bool
    seconds: float
    notice: str = ""


class Workspace(Protocol):
    """One private copy of a repository, at `/testbed` inside."""

    def run(self, command: str, *, limits: Limits | None = None, stdin: bytes = b"") -> Outcome:
        """Runs `bash -c command` in `/testbed` as a fresh process tree, all of which is dead afterwards.

        Files stay for the next command; processes, environment variables and the current folder do not.

        Args:
            command: a bash script.
            limits: for this command; those of the workspace where not given.
            stdin: what it reads from its standard input.
        """
        ...

    def read(self, path: str) -> bytes:
        """The bytes of a regular file, as the sandbox itself sees it; a relative path starts at `/testbed`.

        Raises:
            WorkspaceError: there is none, or it is larger than `Limits.file_mib`.
        """
        ...

    def write(self, path: str, data: bytes) -> None:
        """Writes a file inside the sandbox, making the folders above it; a relative path starts at `/testbed`.

        Raises:
            WorkspaceError: it could not be written.
        """
        ...

    def close(self) -> None:
        """Ends every process and drops every file; calling it twice is harmless."""
        ...


Checkout = Callable[["Instance", Path], None]
"""Fills an empty folder of the host with an instance's repository at its base commit: one commit, no history."""


class Runtime(Protocol):
    """Makes workspaces.

    Attributes:
        name: `bubblewrap`, `docker` or `podman`.
    """

    name: str

    def open(self, instance: "Instance", checkout: Checkout, *, limits: Limits | None = None) -> Workspace:
        """Opens a workspace with a private copy of the instance's repository.

        Args:
            instance: the task. docker and podman take the repository from its image.
            checkout: where the repository comes from, where there is no image.
            limits: of every command that is not given its own.

        Raises:
            SandboxError: it could not be opened.
        """
        ...


LONGEST_ARGUMENT = 100_000
"""Bytes; the kernel takes 128 KiB for one argument of a program."""


def plain(text: str) -> str:
    """What can be an argument of a program: no NUL, no half of a surrogate pair."""
    return text.replace("\0", "").encode(errors="replace").decode()


def spliced(script: str, stdin: bytes) -> tuple[str, bytes]:
    """The script for `bash -c` and its standard input; a script too long for an argument goes through the latter."""
    script = plain(script)
    if len(script.encode()) <= LONGEST_ARGUMENT:
        return script, stdin
    return "IFS= read -r -d '' script; eval \"$script\"", script.encode() + b"\0" + stdin
