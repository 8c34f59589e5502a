"""Workspaces in bubblewrap: namespaces, a read-only system and a system call filter, without a daemon or an image.

One bubblewrap process per workspace holds its file systems. They are in memory and have a fixed size, so code cannot
fill the host's disk, and its files disappear with the workspace. Process 1 of the sandbox (`init_process.py`) runs the
commands. The cost: a repository and the files that its tests write must fit into memory (`Limits.disk_mib`).

    /            read-only: /usr (/bin, /lib, … from it), the interpreter, pytest, some of /etc
    /testbed     the repository; 3/4 of disk_mib          /tmp, which is also HOME: 1/8          /dev/shm: 1/8
    /proc        of the namespace's own processes         /dev: null, zero, full, random, urandom, tty, ptys

When root starts it, the sandbox runs under a separate user id that owns nothing. The kernel then denies root's
privileges (limits on processes, files of mode 0600, /proc/sys), even if the namespaces grant them. If the interpreter
is below a folder that only root may enter, it is mounted in a private mount namespace, so that the sandbox can still
read it.
"""

import array
import contextlib
import json
import os
import platform
import shutil
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from aem_jax.envs.swe.sandbox import init_process
from aem_jax.envs.swe.sandbox.archives import Archives
from aem_jax.envs.swe.sandbox.launcher import as_descriptor, start_bubblewrap
from aem_jax.envs.swe.sandbox.mounts import USER_ID, View, host_view
from aem_jax.envs.swe.sandbox.workspace import (
    TESTBED,
    Checkout,
    Limits,
    Outcome,
    SandboxError,
    WorkspaceError,
    plain,
    spliced,
)

if TYPE_CHECKING:
    from aem_jax.envs.swe.instance import Instance

START_S = 30.0
"""Time limit for starting bubblewrap and its process 1, seconds."""
GRACE_S = init_process.REAP_S + 5.0
"""Time after a command's deadline within which process 1 must reply, seconds."""
UNPACK_S = 300.0
FILE_S = 20.0
"""Time limits for unpacking a repository, and for reading or writing a file, seconds."""
DESCRIPTORS = 512
"""Maximum number of open files of one process."""
FILES_PER_MIB = 256
"""Maximum number of files and folders on one file system, per MiB of `disk_mib`. An empty file takes about 1 KiB of
kernel memory, which is not always included in the file system's size."""
ADDRESS_SPACE_FACTOR = 4
"""Address space of one process, in multiples of the memory limit; interpreters reserve more memory than they use."""


@dataclass(frozen=True)
class BubblewrapConfig:
    """Contents of the sandbox in addition to /usr and the interpreter."""

    packages: tuple[str, ...] = ("pytest",)
    """Distributions of the running interpreter that can be imported inside, with their dependencies."""
    read_only: tuple[str, ...] = ()
    """Absolute paths of further files and folders of the host, mounted read-only at the same path."""
    hidden: tuple[str, ...] = ()
    """Absolute paths of host folders that are empty inside; this package and its checkout always are."""


class Bubblewrap:
    """The bubblewrap runtime; see the module's docstring."""

    name = "bubblewrap"

    def __init__(self, config: BubblewrapConfig = BubblewrapConfig()):
        self._view = host_view(config.packages, config.read_only, config.hidden)
        self._archives = Archives()

    def open(self, instance: "Instance", checkout: Checkout, *, limits: Limits | None = None) -> "BubblewrapWorkspace":
        """Opens a workspace with the checkout's files.

        Args:
            instance: the task.
            checkout: fills the folder that is copied in. It is called once for several workspaces of an instance.
            limits: default limits of commands, and the size of the file systems.

        Raises:
            SandboxError: the workspace could not be opened.
        """
        source = self._archives.open(instance, checkout)
        try:
            workspace = self.open_empty(limits)
            try:
                workspace.unpack(source)
            except BaseException:
                workspace.close()
                raise
            return workspace
        finally:
            os.close(source)

    def open_empty(self, limits: Limits | None = None) -> "BubblewrapWorkspace":
        """Opens a workspace with an empty `/testbed`.

        Raises:
            SandboxError: the workspace could not be opened.
        """
        return BubblewrapWorkspace(self._view, limits or Limits())


class BubblewrapWorkspace:
    """One running bubblewrap; see `sandbox.Workspace` for the methods.

    Code that ends or blocks process 1 ends the workspace, but not the episode: every later command returns an outcome
    without an exit code and with a notice that gives the reason.
    """

    def __init__(self, view: View, limits: Limits):
        self._limits = limits
        self._ended = ""
        self._lock = threading.RLock()
        self._control, theirs = socket.socketpair()
        try:
            with theirs, contextlib.ExitStack() as stack:
                self._process = start_bubblewrap(view, limits, theirs, stack)
            self._control.settimeout(START_S)
            reply = self._reply(most=0)
        except BaseException:
            self._control.close()
            raise
        if reply is None:
            self._process.kill()
            words = self._process.communicate()[1].decode(errors="replace").strip()
            self._control.close()
            raise SandboxError(f"bubblewrap did not start: {words or 'it said nothing'}")

    def run(self, command: str, *, limits: Limits | None = None, stdin: bytes = b"") -> Outcome:
        """See `sandbox.Workspace.run`."""
        limits = replace(limits or self._limits, disk_mib=self._limits.disk_mib)
        command, stdin = spliced(command, stdin)
        with as_descriptor(stdin) as descriptor:
            header, output = self._call(["bash", "-c", command], limits, descriptor)
        return Outcome(
            exit_code=header["exit_code"],
            output=init_process.joined(output[: header["head"]], output[header["head"] :], header["total"]),
            timed_out=header["over"] == init_process.OUT_OF_TIME,
            seconds=header["seconds"],
            notice=_notice(header["over"], limits),
        )

    def read(self, path: str) -> bytes:
        """See `sandbox.Workspace.read`."""
        most = self._limits.file_mib * 2**20
        limits = replace(self._limits, seconds=FILE_S, output_bytes=2 * most + 2)
        header, data = self._call(["head", "-c", str(most + 1), "--", plain(path)], limits, None, split=True)
        self._expect_success(header, f"could not read {path!r:.200}", limits)
        if len(data) > most:
            raise WorkspaceError(f"expected a file of at most {self._limits.file_mib} MiB, got a larger one: {path!r}")
        return data

    def write(self, path: str, data: bytes) -> None:
        """See `sandbox.Workspace.write`."""
        script = 'mkdir -p -- "$(dirname -- "$1")" && cat > "$1"'
        limits = replace(self._limits, seconds=FILE_S)
        with as_descriptor(data) as descriptor:
            header, _ = self._call(["bash", "-c", script, "write", plain(path)], limits, descriptor, split=True)
        self._expect_success(header, f"could not write {path!r:.200}", limits)

    def unpack(self, archive: int) -> None:
        """Fills `/testbed` from the tar file behind a descriptor.

        Raises:
            SandboxError: the files do not fit, or it is not a tar file.
        """
        limits = replace(self._limits, seconds=UNPACK_S, file_mib=self._limits.disk_mib)
        command = ["tar", "--extract", "--file=-", "--no-same-owner", "--directory", TESTBED]
        header, _ = self._call(command, limits, archive, split=True)
        try:
            self._expect_success(header, "could not unpack the repository (is disk_mib large enough?)", limits)
        except WorkspaceError as error:
            raise SandboxError(str(error)) from None

    def close(self) -> None:
        """See `sandbox.Workspace.close`."""
        with self._lock:
            self._end("closed")

    def _end(self, why: str) -> None:
        if self._ended:
            return
        self._ended = why
        self._control.close()  # process 1 then exits, and with it the whole namespace
        try:
            self._process.wait(2.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stderr:
            self._process.stderr.close()

    def _call(
        self, argv: Sequence[str], limits: Limits, stdin: int | None, *, split: bool = False
    ) -> tuple[Mapping[str, Any], bytes]:
        """Has process 1 run one command; returns a reply of the same form if process 1 has ended."""
        request = {
            "argv": argv,
            "folder": TESTBED,
            "split": split,
            "seconds": limits.seconds,
            "memory_mib": limits.memory_mib,
            "processes": limits.processes,
            "output_bytes": limits.output_bytes,
            "files": FILES_PER_MIB * limits.disk_mib,
            "file_systems": ["/testbed", "/tmp", "/dev/shm"],
            "rlimits": _rlimits(limits),
        }
        began = time.monotonic()
        with self._lock:
            if not self._ended:
                self._control.settimeout(limits.seconds + GRACE_S)
                if self._send(request, stdin) and (reply := self._reply(limits.output_bytes)):
                    return reply
                self._end("the sandbox was ended by what ran in it")
            broken = {"exit_code": None, "over": self._ended, "total": 0, "head": 0, "errors": self._ended}
            return {**broken, "seconds": time.monotonic() - began}, b""

    def _send(self, request: Mapping[str, Any], stdin: int | None) -> bool:
        header = json.dumps(request).encode()
        frame = struct.pack("!II", len(header), 0)
        ancillary = [] if stdin is None else [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [stdin]))]
        try:
            sent = self._control.sendmsg([frame], ancillary)
            self._control.sendall(frame[sent:] + header)
        except OSError:
            return False
        return True

    def _reply(self, most: int) -> tuple[Mapping[str, Any], bytes] | None:
        """Returns the reply; None if none arrives in time or it is too large."""
        frame = self._receive(8)
        lengths = struct.unpack("!II", frame) if frame else (0, 0)
        if not 0 < lengths[0] <= 65536 or lengths[1] > most:
            return None
        header, payload = self._receive(lengths[0]), self._receive(lengths[1])
        return None if header is None or payload is None else (json.loads(header), payload)

    def _receive(self, length: int) -> bytes | None:
        parts = bytearray()
        while len(parts) < length:
            try:
                more = self._control.recv(min(length - len(parts), 2**20))
            except OSError:
                return None
            if not more:
                return None
            parts += more
        return bytes(parts)

    def _expect_success(self, header: Mapping[str, Any], what: str, limits: Limits) -> None:
        if header["exit_code"] != 0:
            reason = _notice(header["over"], limits) or header["errors"].strip() or f"exit code {header['exit_code']}"
            raise WorkspaceError(f"{what}: {reason:.500}")


def probe(config: BubblewrapConfig = BubblewrapConfig()) -> str:
    """Runs a command in a sandbox; returns the reason why it failed, or an empty string.

    Failures of the sandbox are returned, not raised.
    """
    if shutil.which("bwrap") is None:
        return "there is no `bwrap` on the PATH"
    try:
        workspace = Bubblewrap(config).open_empty(Limits(seconds=30, disk_mib=16))
        try:
            outcome = workspace.run(f"id -u && cat /proc/self/status && {' '.join(_IMPORTS)}")
        finally:
            workspace.close()
    except (OSError, ValueError, SandboxError) as error:
        return str(error)
    lines = outcome.output.splitlines()
    expected = {str(USER_ID), "NoNewPrivs:\t1", "Seccomp:\t2", "CapEff:\t0000000000000000", "python works"}
    if outcome.exit_code != 0 or not expected <= set(lines):
        return f"a command in it did not come to what it should: {outcome.notice} {outcome.output[-500:]}"
    return ""


_IMPORTS = ("python", "-c", "'print(\"python works\")'")


def _rlimits(limits: Limits) -> dict[str, int]:
    """Returns the limits of each single process; process 1 enforces the limits on all processes together."""
    mib = 2**20
    values = {
        "RLIMIT_AS": ADDRESS_SPACE_FACTOR * limits.memory_mib * mib,
        "RLIMIT_DATA": limits.memory_mib * mib,
        "RLIMIT_FSIZE": limits.file_mib * mib,
        "RLIMIT_CPU": limits.cpu_seconds or int(limits.seconds) + 2,
        "RLIMIT_CORE": 0,
        "RLIMIT_NOFILE": DESCRIPTORS,
        "RLIMIT_MEMLOCK": 65536,
        "RLIMIT_MSGQUEUE": 0,
        "RLIMIT_SIGPENDING": 1024,
        "RLIMIT_RTPRIO": 0,
        "RLIMIT_NICE": 0,
    }
    if os.geteuid() == 0 or _kernel() >= (5, 14):  # older kernels also count the user's processes outside
        values["RLIMIT_NPROC"] = limits.processes + 1
    return values


def _kernel() -> tuple[int, ...]:
    return tuple(int(part) for part in platform.release().split("-")[0].split(".")[:2])


def _notice(over: str, limits: Limits) -> str:
    """Returns the message for a limit that process 1 reports."""
    words = {
        "": "",
        init_process.OUT_OF_TIME: f"killed: not done after {limits.seconds:g} s",
        init_process.OUT_OF_MEMORY: f"killed: more than {limits.memory_mib} MiB of memory",
        init_process.OUT_OF_PROCESSES: f"killed: more than {limits.processes} processes",
        init_process.OUT_OF_FILES: f"killed: more than {FILES_PER_MIB * limits.disk_mib} files",
    }
    return words.get(over, over)
