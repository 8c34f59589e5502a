"""Workspaces in containers of docker or podman, from the image that an instance names.

The container has no network and no capabilities, and its commands run as a user without privileges. A container is one
workspace: its memory, process and file-size limits are fixed when it is opened. Each command has its own limits on time
and output. After each command, all processes except the container's first are killed. If that fails, the container is
removed.

An instance's image is prepared once, see `images.py`.

**The work tree** lies on the engine's disk or in memory (`ContainerConfig.storage`):

- disk: in the container's own layer over the prepared image. Nothing is copied: containers of one image share its
  files, and only changes take space. The engine limits the size of the layer.
- memory: the root is read-only, and the repository is copied to an in-memory file system of fixed size. It serves
  engines that cannot limit the size of a layer.
"""

import contextlib
import copy
import logging
import os
import select
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from aem_jax.envs.swe.sandbox import execution
from aem_jax.envs.swe.sandbox.archives import Archives
from aem_jax.envs.swe.sandbox.execution import FILE_S, Execution
from aem_jax.envs.swe.sandbox.images import ENGINE_S, USER, Images, container_name, run_engine
from aem_jax.envs.swe.sandbox.init_process import Cut
from aem_jax.envs.swe.sandbox.workspace import TESTBED, Checkout, Limits, Outcome, Repository, SandboxError

STORAGES = ("auto", "disk", "memory", "unlimited-disk")
_NO_SIZE = (
    "an engine limits the size of a container's layer only if its storage supports it: overlay on xfs mounted with "
    "pquota, for docker also btrfs and zfs. Move its storage, or take --swe.container.storage memory"
)
_log = logging.getLogger(__name__)

FIRST_PROCESS = "trap '' CHLD; echo started; exec cat > /dev/null 2>&1"
"""Bash of a container's first process: it ends with its standard input. It ignores SIGCHLD, so the kernel reaps its
children, and orphans leave no zombies."""
SETTINGS: Mapping[str, str] = {
    "HOME": "/tmp",
    "LANG": "C.UTF-8",
    "PAGER": "cat",
    "GIT_PAGER": "cat",
    "PYTHONDONTWRITEBYTECODE": "1",
    # /testbed belongs to root, like every tmpfs of a container
    "GIT_CONFIG_COUNT": "1",
    "GIT_CONFIG_KEY_0": "safe.directory",
    "GIT_CONFIG_VALUE_0": "*",
}


@dataclass(frozen=True)
class ContainerConfig:
    """Settings of containers."""

    image: str = ""
    """Image for instances that name none. It needs bash, git, patch, tar and the tests' dependencies (pytest 7.2 or
    newer for generated tasks). The repository then comes from the checkout."""
    prelude: str = (
        "if [ -f /opt/miniconda3/bin/activate ]; then source /opt/miniconda3/bin/activate testbed; "
        'elif [ -d /testbed/.venv/bin ]; then export VIRTUAL_ENV=/testbed/.venv PATH="/testbed/.venv/bin:$PATH"; fi'
    )
    """Bash that runs before each command; the default enters the environment of SWE-bench's or R2E-Gym's images."""
    processors: float = 2.0
    """Maximum number of processors that a container uses."""
    storage: str = "auto"
    """Where the work tree lies: `disk` (a layer of the engine, of at most `disk_mib`), `memory`, or `auto` (`disk` if
    the engine can limit a layer's size, else `memory`). With `unlimited-disk` code can fill the engine's disk."""

    def __post_init__(self) -> None:
        if self.storage not in STORAGES:
            raise ValueError(f"expected storage to be one of {', '.join(STORAGES)}, got {self.storage!r}")
        if not self.processors > 0:
            raise ValueError(f"expected processors above 0, got {self.processors}")


class Containers:
    """The container runtime; `engine` is the name or path of docker or podman."""

    def __init__(self, name: str, config: ContainerConfig = ContainerConfig(), engine: str = ""):
        self.name = name
        self._config, self._engine = config, engine or name
        self._archives = Archives()
        self._images = Images(self._engine)
        self._lock = threading.Lock()
        self._storage = "" if config.storage == "auto" else config.storage

    def open(self, instance: Repository, checkout: Checkout, *, limits: Limits | None = None) -> "ContainerWorkspace":
        """See `sandbox.Runtime.open`; the checkout is called only if the instance names no image.

        Raises:
            SandboxError: the instance has no image, or the engine failed.
        """
        limits = limits or Limits()
        image = instance.image or self._config.image
        if not image:
            raise SandboxError(
                f"expected an image for {instance.instance_id!r}, which names none; name one "
                "(ContainerConfig.image; --swe.container.image of a run, --image of the check), "
                "or use bubblewrap, which needs none"
            )
        storage = self._storage_for(image)
        folder = instance.workdir if instance.image else TESTBED
        if instance.image:
            image = self._prepared(instance, owned=storage != "memory")
        elif storage != "memory":
            image = self._images.prepare(image, folder, owned=True, make=True)
        container = container_name()
        words = run_arguments(
            self.name,
            container,
            image,
            limits,
            limits.cpus or self._config.processors,
            instance.MOVED,
            storage=storage,
            folder=folder,
        )
        with contextlib.ExitStack() as stack:
            archive = None
            if storage == "memory" or not instance.image:
                fill = self._from_image if instance.image else checkout
                archive = stack.enter_context(self._archives.open(instance, fill))
            try:
                workspace = self.start(container, words, limits, self._config.prelude)
            except BaseException as error:
                self._images.forget()
                if storage == "disk" and isinstance(error, SandboxError):
                    raise SandboxError(f"{error}\n{_NO_SIZE}") from None
                raise
            try:
                # an engine may give a mounted folder the mode of the image's folder at that path, often 0755
                open_up = "cd /; chmod 1777 /tmp; find /tmp -mindepth 1 -delete"
                if storage == "memory":
                    open_up += f"; chmod 1777 {TESTBED}"
                run_engine([self._engine, "exec", "--user", "0:0", container, "bash", "-ec", open_up])
                if archive is not None:
                    workspace.unpack(archive)
                if instance.image:
                    execution.make_bug(workspace._execute, instance, limits)
                    execution.forget_history(workspace._execute, instance.base_commit, limits)
            except BaseException:
                workspace.close()
                raise
            return workspace

    def start(
        self, container: str, arguments: Sequence[str], limits: Limits, prelude: str = "", killer: str = USER
    ) -> "ContainerWorkspace":
        """Starts a container whose first process is `FIRST_PROCESS`; see `ContainerWorkspace`.

        Args:
            container: its name.
            arguments: the engine's `run` with its arguments.
            limits: default limits of commands.
            prelude: bash that runs before each command.
            killer: user that kills what a command left behind.

        Raises:
            SandboxError: it did not start; the message contains the end of the engine's output.
        """
        try:
            started = _start([self._engine, *arguments])
        except BaseException:  # it may exist, although it did not start
            with contextlib.suppress(SandboxError):
                self.command("rm", "--force", container)
            raise
        return ContainerWorkspace(self._engine, container, started, limits, prelude, killer)

    def command(self, *words: str, seconds: float = ENGINE_S) -> str:
        """Runs a command of the engine; returns its output.

        Raises:
            SandboxError: it failed, or took longer; the message contains the end of its output.
        """
        return run_engine([self._engine, *words], seconds)

    def _storage_for(self, image: str) -> str:
        """Returns the storage; with `auto`, the first call asks the engine whether it can limit a layer's size."""
        with self._lock:
            if not self._storage:
                container, name = container_name(), ["--network", "none", "--name"]
                self._images.image_id(image)  # an image that cannot be had is no reason to use memory
                try:
                    run_engine([self._engine, "create", "--storage-opt", "size=1g", *name, container, image, "true"])
                    self._storage = "disk"
                except SandboxError as error:
                    self._storage = "memory"
                    _log.warning("%s: work trees are in memory, because %s (%s)", self.name, _NO_SIZE, error)
                with contextlib.suppress(SandboxError):
                    run_engine([self._engine, "rm", "--force", container])
            return self._storage

    def _prepared(self, instance: Repository, *, owned: bool) -> str:
        return self._images.prepare(instance.image, instance.workdir, owned=owned, moved=instance.MOVED)

    def _from_image(self, instance: Repository, folder: Path) -> None:
        """Checkout that copies the repository of a prepared image; its container is created, but never started."""
        container = container_name()
        image = self._prepared(instance, owned=False)
        run_engine([self._engine, "create", "--network", "none", "--name", container, image, "true"])
        try:
            run_engine([self._engine, "cp", f"{container}:{instance.workdir}/.", str(folder)])
        finally:
            run_engine([self._engine, "rm", "--force", container])


def run_arguments(
    engine: str,
    container: str,
    image: str,
    limits: Limits,
    processors: float,
    masked: Sequence[str] = (),
    *,
    storage: str = "memory",
    folder: str = TESTBED,
) -> list[str]:
    """Returns the engine's arguments for a workspace's container; its first process ends with its standard input.

    Args:
        engine: docker or podman.
        container: name of the container.
        image: image with the repository in `folder`.
        limits: of the workspace.
        processors: maximum number of processors.
        masked: folders of the root that are empty inside, and that commands cannot read.
        storage: `disk`, `memory` or `unlimited-disk`.
        folder: the repository's folder.
    """
    arguments = ["run", "--interactive", "--rm", "--name", container, "--hostname", "sandbox"]
    arguments += ["--network", "none", "--cap-drop", "ALL", "--security-opt", "no-new-privileges"]
    # the first process runs as root without capabilities, so commands can neither write to its pipes nor trace it
    arguments += ["--user", "0:0", "--ipc", "private", "--workdir", folder]
    arguments += ["--stop-signal", "KILL"]  # the first process ignores all others; the engine would wait 10 s
    # podman would copy the image's files into it: root's files, and the history of /testbed
    empty = ",notmpcopyup" if engine == "podman" else ""
    memory, shared = limits.memory_mib, limits.memory_mib // 8
    if storage == "memory":
        shared = eighth = limits.disk_mib // 8
        memory += limits.disk_mib  # engines count in-memory file systems as memory
        arguments += ["--read-only"]
        if engine == "podman":  # otherwise it adds large writable folders to the read-only root
            arguments += ["--read-only-tmpfs=false"]
        for path, size in ((folder, 6 * eighth), ("/tmp", eighth)):
            arguments += ["--tmpfs", f"{path}:rw,exec,nosuid,nodev,mode=1777,size={size}m{empty}"]
    elif storage == "disk":
        arguments += ["--storage-opt", f"size={limits.disk_mib}m"]
    arguments += ["--pids-limit", str(limits.processes + 4), "--memory", f"{memory}m", "--memory-swap", f"{memory}m"]
    arguments += ["--cpus", f"{processors:g}", "--oom-score-adj", "1000", "--shm-size", f"{shared}m"]
    bounds = {"core": 0, "nofile": 512, "fsize": limits.file_mib * 2**20}
    if limits.cpu_seconds:
        bounds["cpu"] = limits.cpu_seconds
    for name, value in bounds.items():
        arguments += ["--ulimit", f"{name}={value}:{value}"]
    for path in masked:
        arguments += ["--tmpfs", f"/{path}:ro,noexec,nosuid,nodev,mode=0000,size=64k{empty}"]
    for name, value in SETTINGS.items():
        arguments += ["--env", f"{name}={value}"]
    return [*arguments, "--entrypoint", "bash", image, "-c", FIRST_PROCESS]


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
                _close_input(self._started)

    def _execute(self, argv: Sequence[str], limits: Limits, stdin: int | None, *, split: bool = True) -> Execution:
        """See `execution.Execute`; only the limits on time and output apply."""
        if self._ended:
            return Execution(None, False, 0.0, self._ended)
        began = time.monotonic()
        process = subprocess.Popen(
            [self._engine, "exec", "--interactive", *self._options, self._container, *argv],
            stdin=subprocess.DEVNULL if stdin is None else stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE if split else subprocess.STDOUT,
        )
        assert process.stdout
        output, errors = Cut(limits.output_bytes), Cut(4096)
        streams = {process.stdout: output} | ({process.stderr: errors} if process.stderr else {})
        with process:
            in_time = _collect(streams, began + limits.seconds)
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
        """Kills all processes of the container except the first, which signals from inside do not reach."""
        command = [self._engine, "exec", "--user", self._killer, self._container, "bash", "-c", "kill -KILL -1"]
        try:
            done = subprocess.run(command, capture_output=True, timeout=FILE_S)
        except subprocess.TimeoutExpired:
            self._end("the sandbox was ended: what ran in it could not be killed")
            return
        # 1: there was nothing to kill, or (docker) the container no longer exists
        if done.returncode not in (0, 1) or self._started.poll() is not None:
            self._end("the sandbox was ended by what ran in it")


def _collect(streams: Mapping[IO[bytes], Cut], deadline: float, *, first: bool = False) -> bool:
    """Reads streams to their ends, or with `first` until the first data; False if the deadline passes earlier."""
    is_open = set(streams)
    while is_open:
        left = deadline - time.monotonic()
        if left <= 0:
            return False
        for stream in select.select(list(is_open), [], [], left)[0]:
            data = os.read(stream.fileno(), 65536)
            streams[stream].add(data)
            if first:
                return True
            if not data:
                is_open.discard(stream)
    return True


def _start(command: Sequence[str]) -> subprocess.Popen[bytes]:
    """Starts a container whose first process prints a line, and waits for that line.

    Raises:
        SandboxError: the line did not arrive; the message contains the end of the engine's output.
    """
    pipe = subprocess.PIPE
    with tempfile.TemporaryFile() as errors:
        try:
            process = subprocess.Popen(
                command, stdin=pipe, stdout=pipe, stderr=errors, cwd=tempfile.gettempdir(), start_new_session=True
            )
        except OSError as error:
            raise SandboxError(f"{' '.join(command[:2])} failed: {error}") from None
        assert process.stdout
        line = Cut(64)
        try:
            in_time = _collect({process.stdout: line}, time.monotonic() + ENGINE_S, first=True)
        except BaseException:
            _close_input(process)
            raise
        if line.total:
            return process
        _close_input(process)
        errors.seek(0)
        reason = f"status {process.returncode}" if in_time else f"nothing within {ENGINE_S:g} s"
        words = errors.read().decode(errors="replace")[-1000:].strip()
        raise SandboxError(f"{' '.join(command[:2])} failed with {reason}: {words}")


def _close_input(process: subprocess.Popen[bytes]) -> None:
    """Closes the container's standard input, which ends the container."""
    for stream in (process.stdin, process.stdout):
        assert stream
        stream.close()
    try:
        process.wait(FILE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def probe(engine: str) -> str:
    """Checks that an engine works; returns the reason why not, or an empty string."""
    if shutil.which(engine) is None:
        return f"there is no `{engine}` on the PATH"
    try:
        done = subprocess.run([engine, "info"], capture_output=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"`{engine} info` failed: {error}"
    return "" if done.returncode == 0 else f"`{engine} info` failed: {done.stderr.decode(errors='replace').strip()}"
