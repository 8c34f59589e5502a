"""Sandboxes of Harbor tasks: one per episode, for the agent and then for the verifier.

In a container, the task's own image runs as Harbor runs it: with a writable file system, and as the image's user, which
is root in most images. So commands can install packages and change files that root owns. The container has no
privileges over the host: of root's capabilities it keeps those that act on the container's own files, users and
processes. The image's entry point does not run.

In bubblewrap there is no image. The work folder, /tests, /logs and /solution are in-memory folders, and everything
belongs to one unprivileged user, whatever `agent.user` and `verifier.user` say.

In both, all processes are killed after each command.
"""

import os
import re
import shlex
import threading
import uuid
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from aem_jax.envs.harbor.config import HarborConfig
from aem_jax.envs.harbor.files import digest, files_of, packed
from aem_jax.envs.harbor.task import CONFIG, DEFAULT_WORKDIR, Artifact, HarborTask
from aem_jax.envs.swe.sandbox.bubblewrap import Bubblewrap
from aem_jax.envs.swe.sandbox.choose import choose_runtime
from aem_jax.envs.swe.sandbox.containers import Containers
from aem_jax.envs.swe.sandbox.execution import UNPACK_S
from aem_jax.envs.swe.sandbox.host import locked, user_folder
from aem_jax.envs.swe.sandbox.images import owner_label
from aem_jax.envs.swe.sandbox.running import FIRST_PROCESS, ContainerWorkspace
from aem_jax.envs.swe.sandbox.workspace import Limits, Outcome, SandboxError, Workspace

LOGS, TESTS, SOLUTION = "/logs", "/tests", "/solution"
CAPABILITIES = ("CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID", "KILL", "NET_BIND_SERVICE", "SETGID", "SETUID")
"""Capabilities of a container's root; without them, package managers and servers do not work."""
SETTINGS: Mapping[str, str] = {"PAGER": "cat", "GIT_PAGER": "cat"}
_OPEN_FILES = 4096
_ROOT = ("--user", "0:0", "--workdir", "/")


class Phase:
    """A workspace whose commands have further environment variables; see `sandbox.Workspace` for the methods."""

    def __init__(self, workspace: Workspace, variables: Mapping[str, str]):
        self._workspace = workspace
        self._exports = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in variables.items())

    def run(self, command: str, *, limits: Limits | None = None, stdin: bytes = b"") -> Outcome:
        """See `sandbox.Workspace.run`."""
        return self._workspace.run(self._exports + command, limits=limits, stdin=stdin)

    def read(self, path: str) -> bytes:
        """See `sandbox.Workspace.read`."""
        return self._workspace.read(path)

    def write(self, path: str, data: bytes) -> None:
        """See `sandbox.Workspace.write`."""
        self._workspace.write(path, data)

    def close(self) -> None:
        """See `sandbox.Workspace.close`."""
        self._workspace.close()


class TaskSandbox:
    """The sandbox of one episode.

    Attributes:
        agent: where the agent's commands run, in the work folder.
        root: where the sandbox is prepared.
        verifier: where the verifier runs.
        workdir: the work folder.
        from_image: whether it contains the files of the task's image.
    """

    from_image = False

    def __init__(self, task: HarborTask, agent: Workspace, root: Workspace, verifier: Workspace, workdir: str):
        self._task, self.root, self.workdir = task, root, workdir
        self.agent = Phase(agent, task.env or {})
        self.verifier = Phase(verifier, {**(task.env or {}), **(task.verifier_env or {})})

    def put(self, folder: Path, at: str, leave_out: Collection[str] = (), *, keep: bool = False) -> None:
        """Copies a folder of the task into the sandbox, in place of what is there.

        Args:
            folder: the folder.
            at: path inside.
            leave_out: names in the folder that are left out.
            keep: whether other files that are there stay.

        Raises:
            SandboxError: the files do not fit, what is there cannot be removed, or the sandbox has ended.
        """
        quoted = shlex.quote(at)
        clear = ""
        if not keep:  # a folder that its owner cannot write keeps its files; nothing of the agent's may stay
            clear = (
                f"chmod -R u+rwX -- {quoted} && rm -rf -- {quoted}/* && left=({quoted}/*) && [ ${{#left[@]}} = 0 ] && "
            )
        script = (
            f"shopt -s dotglob nullglob; [ -L {quoted} ] && rm -f -- {quoted}; mkdir -p -- {quoted} && {clear}"
            f"tar --extract --file=- --no-same-owner --directory {quoted}"
        )
        outcome = self.root.run(script, limits=self._preparing(), stdin=packed(folder, leave_out))
        if outcome.exit_code != 0:
            raise SandboxError(
                f"{folder} could not be copied to {at}: {outcome.notice or outcome.output.strip():.300} (is disk_mib "
                "large enough?)"
            )

    def take(self, artifacts: Sequence[Artifact], limits: Limits) -> bytes:
        """Returns the artifacts that exist, as a tar file whose content the agent decides.

        Raises:
            WorkspaceError: they cannot be read, or are larger than `file_mib`.
        """
        lines = ["rm -rf -- /tmp/.artifacts.tar; cd / && names=() excludes=()"]
        for artifact in artifacts:
            name = shlex.quote(artifact.source.lstrip("/"))
            lines.append(f"[ -e {name} ] && names+=({name})")
            lines += [f"excludes+=(--exclude {shlex.quote(pattern)})" for pattern in artifact.exclude]
        lines.append('tar --create --file=/tmp/.artifacts.tar "${excludes[@]}" --files-from=/dev/null "${names[@]}"')
        self.root.run("\n".join(lines), limits=replace(limits, seconds=UNPACK_S))
        return self.root.read("/tmp/.artifacts.tar")

    def receive(self, artifacts: Sequence[Artifact], archive: bytes) -> None:
        """Unpacks artifacts at their paths, and nothing else of the archive.

        Raises:
            SandboxError: the sandbox has ended.
        """
        names = " ".join(shlex.quote(artifact.source.lstrip("/")) for artifact in artifacts)
        script = (
            f"cat > /tmp/.artifacts.tar; for name in {names}; do tar --extract --file=/tmp/.artifacts.tar "
            '--no-same-owner --directory=/ -- "$name" 2> /dev/null; done; rm -f /tmp/.artifacts.tar'
        )
        outcome = self.root.run(script, limits=self._preparing(), stdin=archive)
        if outcome.exit_code != 0:
            raise SandboxError(f"the artifacts could not be unpacked: {outcome.notice or outcome.output.strip():.300}")

    def begin_verification(self) -> None:
        """Prepares the verifier's network; `agent` must not be used afterwards."""

    def close(self) -> None:
        """Ends all processes and deletes all files; a second call has no effect."""
        self.root.close()

    def _preparing(self) -> Limits:
        return Limits(seconds=UNPACK_S, memory_mib=1024, file_mib=2**16, output_bytes=4096)


class _ContainerSandbox(TaskSandbox):
    """A sandbox in a container; `network` is (engine, container, whether the verifier shall have one)."""

    from_image = True

    def __init__(self, *arguments, network: tuple[Containers, str, bool] | None):
        super().__init__(*arguments)
        self._network = network

    def begin_verification(self) -> None:
        """See `TaskSandbox`."""
        network, self._network = self._network, None
        if network is None:
            return
        engine, container, connected = network
        if connected:
            engine.command("network", "disconnect", "none", container)
            engine.command("network", "connect", "bridge", container)
        else:
            engine.command("network", "disconnect", "bridge", container)


class Sandboxes:
    """Opens sandboxes for tasks.

    Args:
        config: chooses the runtime, and bounds what tasks ask for.
        runtime: used for all tasks in place of a chosen one.
    """

    def __init__(self, config: HarborConfig, runtime: Bubblewrap | Containers | None = None):
        self._config, self._given = config, runtime
        self._chosen: dict[bool, Bubblewrap | Containers] = {}
        self._lock = threading.Lock()

    def check(self, task: HarborTask) -> None:
        """Verifies that this machine can run a task under these settings, without opening anything.

        Raises:
            ValueError: the settings do not allow the task; the message names its file and key.
            SandboxError: no sandbox that it needs works on this machine.
        """
        if task.verifier is not None:
            self.check(task.verifier)
        config, runtime = self._config, self._runtime(task)
        agent, verifier = config.networks(task)
        where, table = task.folder / CONFIG, "verifier.environment" if task.is_verifier else "environment"
        if isinstance(runtime, Bubblewrap):
            if task.needs_image and not config.ignore_images:
                key, got = (
                    (f"{table}.docker_image", task.image) if task.image else (f"{task.context}/Dockerfile", "one")
                )
                raise ValueError(
                    f"{where}: {key}: expected no image with bubblewrap, got {got!r}; use docker or podman "
                    "(--harbor.runtime), or --harbor.ignore-images True, with which the task runs on this machine's "
                    "files"
                )
            if agent or verifier:
                raise ValueError(
                    f"{where}: network_mode: expected 'no-network' with bubblewrap and --harbor.network "
                    f"{config.network}, got 'public'; use docker or podman, or --harbor.network off"
                )
        elif not task.needs_image and not config.image:
            raise ValueError(
                f"{where}: {table}.docker_image: expected an image or {task.context}/Dockerfile with {runtime.name}, "
                "got neither; use bubblewrap, or name an image (--harbor.image)"
            )
        elif agent != verifier and runtime.name != "docker":
            raise ValueError(
                f"{where}: network_mode: expected the same network for agent and verifier with {runtime.name}, got "
                f"{_state(agent)} for the agent and {_state(verifier)} for the verifier; use docker, or another "
                "--harbor.network"
            )

    def open(self, task: HarborTask) -> TaskSandbox:
        """Opens the sandbox of an episode, or of a verifier. It contains neither tests nor solution, but for a verifier
        whose image contains its tests.

        Raises:
            ValueError: see `check`.
            SandboxError: the sandbox could not be opened.
        """
        self.check(task)
        runtime = self._runtime(task)
        sandbox = (
            self._in_bubblewrap(task, runtime) if isinstance(runtime, Bubblewrap) else self._in_container(task, runtime)
        )
        try:
            environment = task.folder / "environment"
            taken = isinstance(runtime, Bubblewrap) or not (task.dockerfile or task.has_tests)
            if taken and any(files_of(environment)):
                sandbox.put(environment, sandbox.workdir, ("Dockerfile", ".dockerignore"), keep=True)
        except BaseException:
            sandbox.close()
            raise
        return sandbox

    def fetch(self, task: HarborTask, since: float) -> bool:
        """Fetches or builds the images of a task, for all processes of the host; nothing in bubblewrap.

        Args:
            task: the task.
            since: when upcoming tasks were told, seconds since the epoch; what was used since then is not removed.

        Returns:
            Whether there is room for further images.

        Raises:
            SandboxError: an image cannot be had.
        """
        runtime = self._runtime(task)
        if isinstance(runtime, Bubblewrap):
            return True
        for one in (task, task.verifier):
            if one is not None:
                self._image(one, runtime)
        return runtime.has_room(since)

    def _runtime(self, task: HarborTask) -> Bubblewrap | Containers:
        """Returns the runtime for a task; with `auto`, an engine if it needs an image, else bubblewrap."""
        if self._given is not None:
            return self._given
        config = self._config
        engine = task.needs_image and not config.ignore_images
        with self._lock:
            if engine not in self._chosen:
                names = (
                    (config.runtime,)
                    if config.runtime != "auto"
                    else ("docker", "podman")
                    if engine
                    else ("bubblewrap",)
                )
                self._chosen[engine] = _first_that_works(names, config, task if engine else None)
            return self._chosen[engine]

    def _in_bubblewrap(self, task: HarborTask, runtime: Bubblewrap) -> TaskSandbox:
        workdir = task.workdir or DEFAULT_WORKDIR
        folders = ((workdir, 3), (TESTS, 1), (LOGS, 1), (SOLUTION, 1))
        try:
            workspace = runtime.open_empty(self._config.limits(task), folders, task.name)
        except SandboxError as error:
            raise SandboxError(f"{task.folder / CONFIG}: environment.workdir {workdir!r}: {error}") from None
        sandbox = TaskSandbox(task, workspace, workspace, workspace, workdir)
        _prepare(sandbox)
        return sandbox

    def _in_container(self, task: HarborTask, runtime: Containers) -> TaskSandbox:
        config = self._config
        image, limits = self._image(task, runtime), config.limits(task)
        if task.verifier is not None:
            self._image(task.verifier, runtime)  # a step has less time than a reset
        agent_network, verifier_network = config.networks(task)
        container = f"aem-harbor-{os.getpid()}-{uuid.uuid4().hex[:12]}"
        cpus = min(task.cpus or config.cpus, config.cpus)
        arguments = run_arguments(
            container, image, limits, cpus, network=agent_network, storage_quota=config.storage_quota
        )
        reservation = runtime.reserve(limits, cpus, "disk", task.name)
        try:
            workspace = runtime.start(container, arguments, limits, killer="0:0")
        except BaseException:
            if reservation is not None:
                reservation.close()
            raise
        workspace.hold(limits, reservation)
        try:
            words = "{{.Config.User}}|{{.Config.WorkingDir}}"
            user, _, folder = runtime.command("image", "inspect", "--format", words, image).strip().partition("|")
            workdir = task.workdir or folder or "/"
            toggled = (runtime, container, verifier_network) if agent_network != verifier_network else None
            workspaces = [
                workspace.with_options("--user", name or user or "0:0", "--workdir", workdir)
                for name in (task.agent_user, task.verifier_user)
            ]
            root: ContainerWorkspace = workspace.with_options(*_ROOT)
            sandbox = _ContainerSandbox(task, workspaces[0], root, workspaces[1], workdir, network=toggled)
            _prepare(sandbox)
        except BaseException:
            workspace.close()
            raise
        return sandbox

    def _image(self, task: HarborTask, runtime: Containers) -> str:
        """Returns the task's image; one from a Dockerfile is built if there is none with this content yet.

        Raises:
            SandboxError: it could not be built.
        """
        if task.image or not task.dockerfile:
            image = task.image or self._config.image
            runtime.fetch_image(image)
            return image
        context = task.folder / task.context
        tag = image_tag(task)
        with locked(user_folder() / f"image-{tag.rpartition(':')[2]}.lock"):  # of the server processes, one builds
            try:
                runtime.command("image", "inspect", "--format", "{{.Id}}", tag)
                return tag
            except SandboxError:
                pass  # there is none, or the engine fails, which building tells in its own words
            try:
                runtime.command(
                    *("build", "--tag", tag, "--file", str(context / "Dockerfile"), str(context)),
                    seconds=self._config.seconds(task)[2],
                )
            except SandboxError as error:
                raise SandboxError(
                    f"{context / 'Dockerfile'}: expected a Dockerfile that can be built: {error}"
                ) from None
        runtime.note_made(tag)
        return tag


def image_tag(task: HarborTask) -> str:
    """Returns the name of the image that a task's Dockerfile is built to; it changes with any file of its context.

    The name's host is localhost, so no engine looks for it in a registry.
    """
    name = re.sub(r"[^a-z0-9]+", "-", task.folder.name.lower()).strip("-") or "task"
    return f"localhost/aem-harbor/{name}:{digest(task.folder / task.context)[:24]}"


def run_arguments(
    container: str, image: str, limits: Limits, cpus: float, *, network: bool = False, storage_quota: bool = False
) -> list[str]:
    """Returns the engine's arguments for a task's container; its first process ends with its standard input."""
    memory, eighth = limits.memory_mib, max(limits.memory_mib // 8, 1)
    arguments = ["run", "--interactive", "--rm", "--name", container, "--hostname", "sandbox", *owner_label()]
    arguments += [] if network else ["--network", "none"]
    arguments += ["--cap-drop", "ALL", *(word for name in CAPABILITIES for word in ("--cap-add", name))]
    arguments += ["--security-opt", "no-new-privileges", "--user", "0:0", "--workdir", "/", "--ipc", "private"]
    arguments += ["--stop-signal", "KILL"]  # the first process ignores all others; the engine would wait 10 s
    arguments += ["--pids-limit", str(limits.processes + 4), "--memory", f"{memory}m", "--memory-swap", f"{memory}m"]
    arguments += ["--cpus", f"{cpus:g}", "--oom-score-adj", "1000", "--shm-size", f"{eighth}m"]
    for name, value in {"core": 0, "nofile": _OPEN_FILES, "fsize": limits.file_mib * 2**20}.items():
        arguments += ["--ulimit", f"{name}={value}:{value}"]
    arguments += ["--storage-opt", f"size={limits.disk_mib}m"] if storage_quota else []
    for name, value in SETTINGS.items():
        arguments += ["--env", f"{name}={value}"]
    return [*arguments, "--entrypoint", "bash", image, "-c", FIRST_PROCESS]


def _prepare(sandbox: TaskSandbox) -> None:
    """Makes the folders that Harbor's scripts expect; any user may write logs."""
    logs = " ".join(f"{LOGS}/{name}" for name in ("agent", "verifier", "artifacts"))
    outcome = sandbox.root.run(f"mkdir -p -- {shlex.quote(sandbox.workdir)} {logs} && chmod 777 {logs}")
    if outcome.exit_code != 0:
        sandbox.close()
        raise SandboxError(f"the task's folders could not be made: {outcome.notice or outcome.output.strip():.300}")


def _first_that_works(names: Sequence[str], config: HarborConfig, task: HarborTask | None) -> Bubblewrap | Containers:
    reasons = []
    for name in names:
        try:
            runtime = choose_runtime(name, config.bubblewrap, host=config.host)
        except SandboxError as error:
            reasons.append(str(error))
            continue
        assert isinstance(runtime, (Bubblewrap, Containers))
        return runtime
    if task is None:
        raise SandboxError("; ".join(reasons))
    raise SandboxError(
        f"{task.folder / CONFIG}: expected docker or podman for a task with an image or a Dockerfile, found none that "
        "works; --harbor.ignore-images True runs such tasks in bubblewrap, on this machine's files "
        f"({'; '.join(reasons)})"
    )


def _state(network: bool) -> str:
    return "a network" if network else "none"
