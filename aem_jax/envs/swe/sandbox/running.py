"""One running container as a workspace: its commands run by the engine's `exec`, and its end.

Each command has its own limits on time and output. After each command, all processes except the container's first are
killed. If that fails, the container is removed.
"""

import contextlib
import copy
import re
import subprocess
import tempfile
import time
from collections.abc import Sequence
from typing import IO

from aem_jax.envs.swe.sandbox import execution
from aem_jax.envs.swe.sandbox.admission import Reservation
from aem_jax.envs.swe.sandbox.engine import ENGINE_S, close_input, collect, run_engine, turns
from aem_jax.envs.swe.sandbox.execution import FILE_S, Execution
from aem_jax.envs.swe.sandbox.images import USER
from aem_jax.envs.swe.sandbox.init_process import Cut
from aem_jax.envs.swe.sandbox.workspace import TESTBED, EngineError, Limits, Outcome, Repository, SandboxError

FIRST_PROCESS = "trap '' CHLD; echo started; exec cat > /dev/null 2>&1"
"""Bash of a container's first process: it ends with its standard input. It ignores SIGCHLD, so the kernel reaps its
children, and orphans leave no zombies."""
KILLED = b"kills"
KILL = f"echo {KILLED.decode()}; kill -KILL -1"
"""Bash that kills all processes of a container that its user may kill, except the first."""
KILL_S = 120.0
"""Time limit for that, seconds; an engine on a busy host may take long to start a process."""
_NOT_RUNNING = ("stopped container", "not running")
_ENDED_INSIDE = (0, 137)
"""Status of the engine's `run` if the container's first process ended or was killed."""


class ContainerWorkspace:
    """One running container; see `sandbox.Workspace` for the methods.

    Args:
        started: the engine's process that holds the container's standard input. When this program ends for any reason,
            the input closes and the container ends.
        killer: user that kills what a command left behind.
    """

    def __init__(
        self,
        engine: str,
        container: str,
        started: subprocess.Popen[bytes],
        limits: Limits,
        prelude: str,
        killer: str = USER,
    ):
        self._engine, self._container, self._started = engine, container, started
        self._limits, self._prelude, self._ended = limits, prelude, ""
        self._killer, self._options = killer, ("--user", USER)
        self._held: list[Reservation] = []  # shared with `with_options`

    @property
    def is_alive(self) -> bool:
        """Whether the container runs, as far as the engine's process tells."""
        return not self._ended and self._started.poll() is None

    def hold(self, limits: Limits, reservation: Reservation | None) -> None:
        """Sets the default limits of commands, and a reservation that is closed when the workspace ends."""
        self._limits = limits
        if reservation is not None:
            self._held.append(reservation)

    def with_options(self, *options: str) -> "ContainerWorkspace":
        """Returns the same container with other options of the engine's `exec`, such as the user of commands."""
        other = copy.copy(self)
        other._options = options
        return other

    def run(self, command: str, *, limits: Limits | None = None, stdin: bytes = b"") -> Outcome:
        """See `sandbox.Workspace.run`."""
        script = f"{self._prelude}\n{command}" if self._prelude else command
        return execution.run_script(self._execute, script, limits or self._limits, stdin)

    def read(self, path: str) -> bytes:
        """See `sandbox.Workspace.read`."""
        return execution.read_file(self._execute, path, self._limits)

    def write(self, path: str, data: bytes) -> None:
        """See `sandbox.Workspace.write`."""
        execution.write_file(self._execute, path, data, self._limits)

    def unpack(self, archive: int) -> None:
        """See `execution.unpack`."""
        execution.unpack(self._execute, archive, self._limits)

    def open_up(self, storage: str) -> None:
        """Lets the commands' user write in /tmp, and in an in-memory /testbed; empties /tmp.

        An engine may give a mounted folder the mode of the image's folder at that path, often 0755.
        """
        script = "cd /; chmod 1777 /tmp; find /tmp -mindepth 1 -delete"
        script += f"; chmod 1777 {TESTBED}" if storage == "memory" else ""
        run_engine([self._engine, "exec", "--user", "0:0", self._container, "bash", "-ec", script])

    def commit(self, image: str) -> None:
        """Makes an image of the container's files."""
        run_engine([self._engine, "commit", self._container, image])

    def pack(self) -> IO[bytes]:
        """Returns an unnamed tar file of the repository, without its folder, whose mode belongs to root.

        Raises:
            SandboxError: it could not be read.
        """
        script = f"cd {TESTBED}; shopt -s dotglob nullglob; exec tar --create --file=- ./*"
        command = [self._engine, "exec", "--user", USER, self._container, "bash", "-c", script]
        archive = tempfile.TemporaryFile()  # noqa: SIM115 (returned open)
        try:
            done = subprocess.run(command, stdout=archive, stderr=subprocess.PIPE, timeout=ENGINE_S)
            if done.returncode:
                words = done.stderr.decode(errors="replace").strip()
                raise SandboxError(f"the repository could not be packed: {words:.500}")
        except subprocess.TimeoutExpired as error:
            archive.close()
            raise SandboxError(f"the repository could not be packed: {error}") from None
        except BaseException:
            archive.close()
            raise
        return archive

    def make_task(self, instance: Repository) -> None:
        """Applies the patch that makes an instance's bug, and removes the image's history.

        Raises:
            SandboxError: it does not apply, or git failed.
        """
        execution.make_bug(self._execute, instance, self._limits)
        execution.forget_history(self._execute, instance.base_commit, self._limits)

    def close(self) -> None:
        """See `sandbox.Workspace.close`."""
        self._end("closed")

    def _end(self, why: str) -> None:
        if not self._ended:
            self._ended = why
            try:
                with contextlib.suppress(SandboxError):  # `--rm` may have removed it already
                    run_engine([self._engine, "rm", "--force", self._container])
            finally:
                close_input(self._started)
                while self._held:
                    self._held.pop().close()

    def _execute(self, argv: Sequence[str], limits: Limits, stdin: int | None, *, split: bool = True) -> Execution:
        """See `execution.Execute`; only the limits on time and output apply."""
        if self._ended:
            return Execution(None, False, 0.0, self._ended)
        began = time.monotonic()
        try:
            process = subprocess.Popen(
                [self._engine, "exec", "--interactive", *self._options, self._container, *argv],
                stdin=subprocess.DEVNULL if stdin is None else stdin,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE if split else subprocess.STDOUT,
            )
        except OSError as error:
            self._end("closed")
            raise EngineError(f"{self._engine} could not be started: {error}") from None
        assert process.stdout
        output, errors = Cut(limits.output_bytes), Cut(4096)
        streams = {process.stdout: output} | ({process.stderr: errors} if process.stderr else {})
        with process:
            in_time = collect(streams, began + limits.seconds)
            if not in_time:
                process.kill()
            status = process.wait()
        self._kill_rest()
        return Execution(
            exit_code=status if in_time else None,
            timed_out=not in_time,
            seconds=time.monotonic() - began,
            notice=self._ended if in_time else f"killed: not done after {limits.seconds:g} s",
            head=bytes(output.head),
            tail=bytes(output.tail),
            total=output.total,
            errors=(errors.head + errors.tail).decode(errors="replace"),
        )

    def _kill_rest(self) -> None:
        """Kills all processes of the container except the first, which signals from inside do not reach.

        Raises:
            EngineError: the engine failed.
        """
        command = [self._engine, "exec", "--user", self._killer, self._container, "bash", "-c", KILL]
        try:
            with turns:
                done = subprocess.run(command, capture_output=True, timeout=KILL_S)
        except subprocess.TimeoutExpired:
            self._end_broken("the sandbox was ended: what ran in it could not be killed")
            return
        except OSError as error:
            self._end("closed")
            raise EngineError(f"{self._engine} could not be started: {error}") from None
        # What it prints shows that the engine ran it; its status is 1 if there was nothing to kill.
        if done.stdout.strip() != KILLED or self._started.poll() is not None:
            self._end_broken("the sandbox was ended by what ran in it", done.stderr.decode(errors="replace"))

    def _end_broken(self, why: str, said: str = "") -> None:
        """Ends a workspace that does not work any more.

        Args:
            why: the notice, if code in the workspace is the cause.
            said: the engine's message.

        Raises:
            EngineError: the engine failed. Without that, code in the workspace is the cause, and the episode goes on to
                its end as unsolved: otherwise an agent could break its sandbox to leave hopeless episodes.
        """
        failure = ""
        try:
            words = ("ps", "--all", "--filter", f"name={self._container}", "--format", "{{.Status}}")
            state = run_engine([self._engine, *words], 3 * FILE_S)
            ended = re.search(r"Exited \((-?\d+)\)", state)
            if not ended and "Up" not in state:  # it is removed; the engine's `run` ends with its status
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._started.wait(FILE_S)
            status = int(ended[1]) if ended else self._started.poll()
            runs = status is None and "Up" in state
            if runs and any(words in said for words in _NOT_RUNNING):
                failure = f"it lost the container ({said.strip():.200})"  # its monitor was killed
            elif not runs and status not in _ENDED_INSIDE:
                failure = f"the container ended with status {status}"
        except SandboxError as error:
            failure = str(error)
        self._end(f"the engine failed: {failure}" if failure else why)
        if failure:
            raise EngineError(f"the engine failed during an episode: {failure}")
