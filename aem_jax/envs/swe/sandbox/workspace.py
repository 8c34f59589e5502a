"""The interface of sandboxes: limits, a command's outcome, and the two protocols that every runtime implements.

A `Runtime` opens a `Workspace`, a private copy of a repository at `/testbed`. Code in a workspace is untrusted, and the
host treats its output as plain bytes: the host follows no path, starts no program and parses no file of a workspace.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import ClassVar, Protocol, runtime_checkable

TESTBED = "/testbed"
"""Path of the repository's copy inside a workspace."""


class SandboxError(RuntimeError):
    """A workspace could not be opened or sent an invalid reply; this is not a verdict about the code inside."""


class EngineError(SandboxError):
    """The engine of a running workspace failed, whatever ran in the workspace."""


class WorkspaceError(RuntimeError):
    """A file of a workspace could not be read or written; the code inside or the policy caused this."""


@dataclass(frozen=True)
class Limits:
    """Limits on one command. `disk_mib` is fixed when the workspace is opened, in containers also `memory_mib`,
    `processes`, `file_mib` and `cpus`; the others apply to each command."""

    seconds: float = 90.0
    """Wall time, after which the whole process tree is killed."""
    memory_mib: int = 2048
    """Total memory of all processes, MiB."""
    processes: int = 128
    """Maximum number of processes and threads at one time."""
    file_mib: int = 256
    """Largest file that may be written, MiB."""
    disk_mib: int = 1024
    """Size of the workspace: work tree and /tmp together, and /dev/shm if they are in memory, MiB."""
    output_bytes: int = 65536
    """Bytes of output that are kept; the middle of longer output is dropped while the command runs."""
    cpu_seconds: int = 0
    """Processor time of each process: an endless loop ends at the same point on a busy machine and on an idle one. 0
    sets the limit that follows from `seconds`."""
    cpus: float = 0.0
    """Processors that a container uses, fixed when it is opened; 0: `ContainerConfig.processors`. bubblewrap sets no
    such limit."""

    def __post_init__(self):
        for name in ("cpu_seconds", "cpus"):
            if getattr(self, name) < 0:
                raise ValueError(f"expected the limit {name} of at least 0, got {getattr(self, name)}")
        for name in (f.name for f in fields(self) if f.name not in ("cpu_seconds", "cpus")):
            if not getattr(self, name) > 0:
                raise ValueError(f"expected the limit {name} above 0, got {getattr(self, name)}")
        for name, least in (("memory_mib", 64), ("processes", 8), ("disk_mib", 16), ("output_bytes", 256)):
            if getattr(self, name) < least:
                raise ValueError(f"expected the limit {name} of at least {least}, got {getattr(self, name)}")


@dataclass(frozen=True)
class Outcome:
    """The outcome of a command.

    Attributes:
        exit_code: exit status (128 + n: killed by signal n); None if a limit of the sandbox ended the command.
        output: stdout and stderr in order; invalid UTF-8 is replaced, and a notice replaces the middle of long output.
        timed_out: whether the deadline ended the command.
        seconds: wall time.
        notice: the limit that ended the command; empty if none did.
    """

    exit_code: int | None
    output: str
    timed_out: bool
    seconds: float
    notice: str = ""


class Workspace(Protocol):
    """One private copy of a repository, at `/testbed` inside."""

    def run(self, command: str, *, limits: Limits | None = None, stdin: bytes = b"") -> Outcome:
        """Runs `bash -c command` in `/testbed` as a new process tree, and kills the whole tree afterwards.

        Files persist for the next command; processes, environment variables and the current folder do not.

        Args:
            command: a bash script.
            limits: for this command; by default those of the workspace.
            stdin: the command's standard input.
        """
        ...

    def read(self, path: str) -> bytes:
        """Returns the bytes of a regular file, read inside the sandbox; a relative path starts at `/testbed`.

        Raises:
            WorkspaceError: the file does not exist, or is larger than `Limits.file_mib`.
        """
        ...

    def write(self, path: str, data: bytes) -> None:
        """Writes a file inside the sandbox and creates its parent folders; a relative path starts at `/testbed`.

        Raises:
            WorkspaceError: the file could not be written.
        """
        ...

    def close(self) -> None:
        """Ends all processes and deletes all files; a second call has no effect."""
        ...


class Repository(Protocol):
    """What a runtime needs to know of an instance; `instance.Instance` describes the attributes."""

    MOVED: ClassVar[tuple[str, ...]]

    @property
    def instance_id(self) -> str: ...
    @property
    def repo(self) -> str: ...
    @property
    def base_commit(self) -> str: ...
    @property
    def image(self) -> str: ...
    @property
    def bug_patch(self) -> str: ...
    @property
    def workdir(self) -> str: ...


Checkout = Callable[[Repository, Path], None]
"""Fills an empty host folder with an instance's repository at its base commit, as one commit without history."""


class Runtime(Protocol):
    """Opens workspaces.

    Attributes:
        name: `bubblewrap`, `docker`, `podman` or `kubernetes`.
    """

    name: str

    def open(self, instance: Repository, checkout: Checkout, *, limits: Limits | None = None) -> Workspace:
        """Opens a workspace with a private copy of the instance's repository.

        Args:
            instance: the task. containers take the repository from its image.
            checkout: source of the repository if there is no image.
            limits: default limits of commands.

        Raises:
            SandboxError: the workspace could not be opened.
        """
        ...


@runtime_checkable
class PreparingRuntime(Runtime, Protocol):
    """A runtime that can open workspaces ahead of their use."""

    def prepare(self, instance: Repository, checkout: Checkout, *, limits: Limits) -> None:
        """Opens a workspace in the background, if it keeps any; the next `open` of the instance takes it.

        Args:
            instance: as in `open`.
            checkout: as in `open`.
            limits: as in `open`; the time and the output of a command may differ from those of `open`.
        """
        ...
