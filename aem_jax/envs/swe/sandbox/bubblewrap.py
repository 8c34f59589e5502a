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
import dataclasses
import json
import shutil
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aem_jax.envs.swe.sandbox import execution, init_process
from aem_jax.envs.swe.sandbox.admission import Admission, Needs, Reservation
from aem_jax.envs.swe.sandbox.archives import Archives
from aem_jax.envs.swe.sandbox.execution import Execution
from aem_jax.envs.swe.sandbox.launcher import rlimits, start_bubblewrap
from aem_jax.envs.swe.sandbox.mounts import USER_ID, View, host_view
from aem_jax.envs.swe.sandbox.pool import WarmPool
from aem_jax.envs.swe.sandbox.workspace import TESTBED, Checkout, Limits, Outcome, Repository, SandboxError

START_S = 30.0
"""Time limit for starting bubblewrap and its process 1, seconds."""
GRACE_S = init_process.REAP_S + 5.0
"""Time after a command's deadline within which process 1 must reply, seconds."""
FILES_PER_MIB = 256
"""Maximum number of files and folders on one file system, per MiB of `disk_mib`. An empty file takes about 1 KiB of
kernel memory, which is not always included in the file system's size."""


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
    """The bubblewrap runtime; see the module's docstring.

    Args:
        config: contents of the sandbox.
        admission: where workspaces wait until the host has room; None opens them at once, and none ahead.
    """

    name = "bubblewrap"

    def __init__(self, config: BubblewrapConfig = BubblewrapConfig(), admission: Admission | None = None):
        self._view = host_view(config.packages, config.read_only, config.hidden)
        self._archives, self._admission = Archives(), admission
        self._warm: WarmPool[BubblewrapWorkspace] = WarmPool(self, admission.config.warm if admission else 0)

    def open(self, instance: Repository, checkout: Checkout, *, limits: Limits | None = None) -> "BubblewrapWorkspace":
        """See `sandbox.Runtime.open`. The checkout is called once for several workspaces of an instance."""
        with self._archives.of_checkout(instance, checkout) as archive:
            workspace = self.open_empty(limits, who=instance.instance_id)
            try:
                workspace.unpack(archive)
            except BaseException:
                workspace.close()
                raise
            return workspace

    def open_empty(
        self,
        limits: Limits | None = None,
        folders: tuple[tuple[str, int], ...] = ((TESTBED, 6),),
        who: str = "a workspace",
    ) -> "BubblewrapWorkspace":
        """Opens a workspace with an empty `/testbed`, or with other empty folders (see `View.folders`).

        Args:
            limits: default limits of commands.
            folders: the empty folders.
            who: the workspace, for messages.

        Raises:
            SandboxError: the workspace could not be opened, or a folder would hide what the sandbox needs.
        """
        used = [
            "/dev",
            "/proc",
            "/etc",
            "/tmp",
            *(bind.at for bind in self._view.binds),
            *(at for _, at in self._view.links),
        ]
        for folder in (Path(name) for name, _ in folders if name != TESTBED):
            if at := next((at for at in used if Path(at).is_relative_to(folder) or folder.is_relative_to(at)), ""):
                raise SandboxError(
                    f"expected a folder apart from those of the system in bubblewrap, got {folder} ({at})"
                )
        limits = limits or Limits()
        reservation = None
        if self._admission is not None:
            needs = Needs(limits.cpus, limits.memory_mib + limits.disk_mib)
            reservation = self._admission.reserve(needs, who)
        key, view = (limits.disk_mib, folders), dataclasses.replace(self._view, folders=folders)
        try:
            workspace = self._warm.take(key, lambda: BubblewrapWorkspace(view, limits))
        except BaseException:
            if reservation is not None:
                reservation.close()
            raise
        workspace.hold(limits, reservation)
        if self._admission is not None:  # the next one starts while this one is used, for whatever instance
            self._warm.prepare(key, lambda: BubblewrapWorkspace(view, limits), self._admission.config.warm)
        return workspace


class BubblewrapWorkspace:
    """One running bubblewrap; see `sandbox.Workspace` for the methods.

    Code that ends or blocks process 1 ends the workspace, but not the episode: every later command returns an outcome
    without an exit code and with a notice that gives the reason.

    Args:
        view: contents of the sandbox.
        limits: default limits of commands.
    """

    def __init__(self, view: View, limits: Limits):
        self._limits: Limits = limits
        self._reservation: Reservation | None = None
        self._folders = [folder for folder, _ in view.folders]
        self._ended = ""
        self._lock = threading.RLock()
        self._control, theirs = socket.socketpair()
        try:
            self._open(view, theirs)
        except BaseException:
            self._control.close()
            raise

    @property
    def is_alive(self) -> bool:
        """Whether the sandbox runs."""
        return not self._ended and self._process.poll() is None

    def hold(self, limits: Limits, reservation: Reservation | None) -> None:
        """Sets the default limits of commands, and a reservation that is closed when the workspace ends."""
        self._limits, self._reservation = limits, reservation

    def _open(self, view: View, theirs: socket.socket) -> None:
        with theirs, contextlib.ExitStack() as stack:
            self._process = start_bubblewrap(view, self._limits, theirs, stack)
        self._control.settimeout(START_S)
        if self._reply(most=0) is None:
            self._process.kill()
            errors = self._process.communicate()[1].decode(errors="replace").strip()
            raise SandboxError(f"bubblewrap did not start: {errors or 'it printed nothing'}")

    def run(self, command: str, *, limits: Limits | None = None, stdin: bytes = b"") -> Outcome:
        """See `sandbox.Workspace.run`."""
        return execution.run_script(self._execute, command, limits or self._limits, stdin)

    def read(self, path: str) -> bytes:
        """See `sandbox.Workspace.read`."""
        return execution.read_file(self._execute, path, self._limits)

    def write(self, path: str, data: bytes) -> None:
        """See `sandbox.Workspace.write`."""
        execution.write_file(self._execute, path, data, self._limits)

    def unpack(self, archive: int) -> None:
        """See `execution.unpack`."""
        execution.unpack(self._execute, archive, self._limits)

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
        if self._reservation is not None:
            self._reservation.close()

    def _execute(self, argv: Sequence[str], limits: Limits, stdin: int | None, *, split: bool = True) -> Execution:
        """See `execution.Execute`. Process 1 runs the program; if process 1 has ended, nothing runs."""
        most_files = FILES_PER_MIB * self._limits.disk_mib
        request = {
            "argv": argv,
            "folder": self._folders[0],
            "split": split,
            "seconds": limits.seconds,
            "memory_mib": limits.memory_mib,
            "processes": limits.processes,
            "output_bytes": limits.output_bytes,
            "files": most_files,
            "file_systems": [*self._folders, "/tmp", "/dev/shm"],
            "rlimits": rlimits(limits),
        }
        began = time.monotonic()
        with self._lock:
            if not self._ended:
                self._control.settimeout(limits.seconds + GRACE_S)
                if self._send(request, stdin) and (reply := self._reply(limits.output_bytes)):
                    header, output = reply
                    over: str = header["over"]
                    head: int = header["head"]
                    notices = {
                        "": "",
                        init_process.OUT_OF_TIME: f"killed: not done after {limits.seconds:g} s",
                        init_process.OUT_OF_MEMORY: f"killed: more than {limits.memory_mib} MiB of memory",
                        init_process.OUT_OF_PROCESSES: f"killed: more than {limits.processes} processes",
                        init_process.OUT_OF_FILES: f"killed: more than {most_files} files",
                    }
                    return Execution(
                        exit_code=header["exit_code"],
                        timed_out=over == init_process.OUT_OF_TIME,
                        seconds=header["seconds"],
                        notice=notices.get(over, over),
                        head=output[:head],
                        tail=output[head:],
                        total=header["total"],
                        errors=header["errors"],
                    )
                self._end("the sandbox was ended by what ran in it")
            return Execution(None, False, time.monotonic() - began, self._ended)

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
        try:
            frame = init_process.receive_exactly(self._control, 8)
            lengths = struct.unpack("!II", frame) if frame else (0, 0)
            if not 0 < lengths[0] <= 65536 or lengths[1] > most:
                return None
            header, payload = (init_process.receive_exactly(self._control, length) for length in lengths)
        except OSError:
            return None
        return None if header is None or payload is None else (json.loads(header), payload)


def probe(config: BubblewrapConfig = BubblewrapConfig()) -> str:
    """Runs a command in a sandbox; returns the reason why it failed, or an empty string.

    Failures of the sandbox are returned, not raised.
    """
    if shutil.which("bwrap") is None:
        return "there is no `bwrap` on the PATH"
    try:
        workspace = Bubblewrap(config).open_empty(Limits(seconds=30, disk_mib=16))
        try:
            outcome = workspace.run("id -u && cat /proc/self/status && python -c 'print(\"python works\")'")
        finally:
            workspace.close()
    except (OSError, ValueError, SandboxError) as error:
        return str(error)
    lines = outcome.output.splitlines()
    expected = {str(USER_ID), "NoNewPrivs:\t1", "Seccomp:\t2", "CapEff:\t0000000000000000", "python works"}
    if outcome.exit_code != 0 or not expected <= set(lines):
        return f"a command in it had an unexpected result: {outcome.notice} {outcome.output[-500:]}"
    return ""
