"""Workspaces in containers of docker or podman, from the image that an instance names.

The container has no network and no capabilities, and its commands run as a user without privileges. A container is one
workspace: its memory, process and file-size limits are fixed when it is opened. Each command has its own limits on time
and output. After each command, all processes except the container's first are killed. If that fails, the container is
removed.

An instance's image is prepared once, see `images.py`. So is the instance: its bug is applied and its history removed in
one container, whose files are committed as an image, or packed if the work tree is in memory. Every workspace of the
instance starts from these.

**The work tree** lies on the engine's disk or in memory (`ContainerConfig.storage`):

- disk: in the container's own layer over the prepared image. Nothing is copied: containers of one image share its
  files, and only changes take space. The engine limits the size of the layer.
- memory: the root is read-only, and the repository is copied to an in-memory file system of fixed size. It serves
  engines that cannot limit the size of a layer.
"""

import contextlib
import logging
import os
import re
import threading
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

from aem_jax.envs.swe.sandbox.admission import Admission, Needs, Reservation
from aem_jax.envs.swe.sandbox.archives import Archives
from aem_jax.envs.swe.sandbox.engine import ENGINE_S, run_engine, start_container
from aem_jax.envs.swe.sandbox.execution import FORGET, MAKE_BUG
from aem_jax.envs.swe.sandbox.host import is_orphan, owner
from aem_jax.envs.swe.sandbox.images import (
    OWNER,
    USER,
    Images,
    container_name,
    derived_name,
    owner_label,
)
from aem_jax.envs.swe.sandbox.pool import WarmPool
from aem_jax.envs.swe.sandbox.running import FIRST_PROCESS, ContainerWorkspace
from aem_jax.envs.swe.sandbox.workspace import TESTBED, Checkout, Limits, Repository, SandboxError

STORAGES = ("auto", "disk", "memory", "unlimited-disk")
_NO_SIZE = (
    "an engine limits the size of a container's layer only if its storage supports it: overlay on xfs mounted with "
    "pquota, for docker also btrfs and zfs. Move its storage, or take --swe.container.storage memory"
)
_log = logging.getLogger(__name__)

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
    """The container runtime.

    Args:
        name: `docker` or `podman`.
        config: settings of containers.
        engine: its name or path, if it is not `name`.
        admission: where workspaces wait until the host has room; None opens them at once, and none ahead.

    Attributes:
        name: `docker` or `podman`.
    """

    def __init__(
        self,
        name: str,
        config: ContainerConfig = ContainerConfig(),
        engine: str = "",
        admission: Admission | None = None,
    ):
        self.name = name
        self._config, self._engine, self._admission = config, engine or name, admission
        self._archives = Archives()
        self._images = Images(self._engine, admission.config.image_gib if admission else 0.0)
        self._warm: WarmPool[ContainerWorkspace] = WarmPool(self, admission.config.warm if admission else 0)
        self._lock = threading.Lock()
        self._storage = "" if config.storage == "auto" else config.storage
        self._disk_at: str | None = None

    def open(self, instance: Repository, checkout: Checkout, *, limits: Limits | None = None) -> "ContainerWorkspace":
        """See `sandbox.Runtime.open`; the checkout is called only if the instance names no image.

        Raises:
            SandboxError: the instance has no image, or the engine failed.
        """
        limits = limits or Limits()
        storage = self._storage_for(self._image(instance))
        reservation = self.reserve(limits, limits.cpus or self._config.processors, storage, instance.instance_id)
        try:
            key = self._key(instance, checkout, limits)
            workspace = self._warm.take(key, lambda: self._open(instance, checkout, limits, storage))
        except BaseException:
            if reservation is not None:
                reservation.close()
            raise
        workspace.hold(limits, reservation)
        return workspace

    def prepare(self, instance: Repository, checkout: Checkout, *, limits: Limits) -> None:
        """Opens a workspace ahead, in the background, that the next `open` of the instance takes. It may fail: then the
        next `open` tells why."""
        key = self._key(instance, checkout, limits)
        self._warm.prepare(
            key, lambda: self._open(instance, checkout, limits, self._storage_for(self._image(instance)))
        )

    def fetch(self, instance: Repository, checkout: Checkout, *, limits: Limits, since: float) -> bool:
        """Fetches and prepares the images of an instance, for all processes of the host.

        Args:
            instance: as in `open`.
            checkout: as in `open`.
            limits: as in `open`.
            since: when upcoming tasks were told, seconds since the epoch; what was used since then is not removed.

        Returns:
            Whether there is room for further images.

        Raises:
            SandboxError: an image cannot be had, or the engine failed.
        """
        storage = self._storage_for(self._image(instance))
        if storage != "memory":
            self._instance_image(instance, checkout, limits, storage)
        elif instance.image:
            self._prepared(instance, owned=False)
        return self._images.has_room(since)

    def fetch_image(self, image: str) -> None:
        """Fetches an image if it is not there.

        Raises:
            SandboxError: it cannot be had, or the engine failed.
        """
        self._images.image_id(image)

    def note_made(self, image: str) -> None:
        """Notes that this program made an image, which may be removed again (see `Images`)."""
        self._images.note_made(image)

    def has_room(self, since: float) -> bool:
        """See `Images.has_room`."""
        return self._images.has_room(since)

    def reserve(self, limits: Limits, processors: float, storage: str, who: str) -> Reservation | None:
        """Waits until the host has room for a container; None without admission.

        Args:
            limits: of the container.
            processors: that it may use.
            storage: `disk`, `memory` or `unlimited-disk`.
            who: the workspace, for messages.

        Raises:
            SandboxError: the host is too small.
        """
        if self._admission is None:
            return None
        if storage == "memory":
            return self._admission.reserve(Needs(processors, limits.memory_mib + limits.disk_mib), who)
        needs = Needs(processors, limits.memory_mib, limits.disk_mib, self._storage_folder())
        return self._admission.reserve(needs, who)

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
            started = start_container([self._engine, *arguments])
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

    def remove_orphans(self) -> None:
        """Removes containers whose process was killed before it could. Most end with it; one whose engine failed does
        not."""
        try:
            words = ("ps", "--all", "--filter", f"label={OWNER}", "--format", "{{.Names}}|{{.Labels}}")
            lines = self.command(*words, seconds=60).splitlines()
        except SandboxError as error:
            _log.warning("containers of ended processes were not looked for: %s", error)
            return
        for name, _, labels in (line.partition("|") for line in lines):
            label = re.search(rf"{re.escape(OWNER)}[=:]([\d-]+)", labels)
            if label and is_orphan(label[1]):
                with contextlib.suppress(SandboxError):
                    self.command("rm", "--force", name, seconds=60)

    def _image(self, instance: Repository) -> str:
        image = instance.image or self._config.image
        if not image:
            raise SandboxError(
                f"expected an image for {instance.instance_id!r}, which names none; name one "
                "(ContainerConfig.image; --swe.container.image of a run, --image of the check), "
                "or use bubblewrap, which needs none"
            )
        return image

    def _key(self, instance: Repository, checkout: Checkout, limits: Limits) -> Hashable:
        """Returns what is equal in workspaces that can replace each other; limits on one command may differ."""
        fixed = replace(limits, seconds=1.0, output_bytes=256)
        return instance, None if instance.image else checkout, fixed

    def _open(self, instance: Repository, checkout: Checkout, limits: Limits, storage: str) -> "ContainerWorkspace":
        folder = instance.workdir if instance.image else TESTBED
        if storage != "memory":
            return self._run(
                instance, self._instance_image(instance, checkout, limits, storage), limits, storage, folder
            )
        if instance.image:
            image = self._prepared(instance, owned=False)
            archives = self._archives.open((instance, image), lambda: self._pack(instance, image, limits))
        else:
            image, archives = self._config.image, self._archives.of_checkout(instance, checkout)
        with archives as archive:
            workspace = self._run(instance, image, limits, storage, folder)
            try:
                workspace.open_up(storage)
                workspace.unpack(archive)
            except BaseException:
                workspace.close()
                raise
            return workspace

    def _run(self, instance: Repository, image: str, limits: Limits, storage: str, folder: str) -> "ContainerWorkspace":
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
        try:
            return self.start(container, words, limits, self._config.prelude)
        except BaseException as error:
            self._images.forget()
            if storage == "disk" and isinstance(error, SandboxError):
                raise SandboxError(f"{error}\n{_NO_SIZE}") from None
            raise

    def _instance_image(self, instance: Repository, checkout: Checkout, limits: Limits, storage: str) -> str:
        """Returns the image of an instance: the prepared image with its bug and without history, or with its checkout.
        One process makes it; the containers of a group, and those of its gradings, share its files."""
        source = self._image(instance)
        if instance.image:
            image, folder = self._prepared(instance, owned=True), instance.workdir
        else:
            image, folder = self._images.prepare(source, TESTBED, owned=True, make=True), TESTBED
        contents = [image, instance.repo, instance.base_commit, instance.bug_patch, FORGET, MAKE_BUG]
        if not instance.image and not re.fullmatch("[0-9a-f]{40}", instance.base_commit):
            contents.append(owner())  # a name such as HEAD tells other processes nothing
        name = derived_name(*contents)

        def make() -> None:
            workspace = self._run(instance, image, limits, storage, folder)
            try:
                workspace.open_up(storage)
                if instance.image:
                    workspace.make_task(instance)
                else:
                    with self._archives.of_checkout(instance, checkout) as archive:
                        workspace.unpack(archive)
                workspace.commit(name)
            finally:
                workspace.close()

        return self._images.derive(name, image, source, make)

    def _pack(self, instance: Repository, image: str, limits: Limits) -> IO[bytes]:
        """Returns a tar file of an instance's repository with its bug and without history, for work trees in memory."""
        with self._archives.of_checkout(instance, self._from_image) as archive:
            workspace = self._run(instance, image, limits, "memory", instance.workdir)
            try:
                workspace.open_up("memory")
                workspace.unpack(archive)
                workspace.make_task(instance)
                return workspace.pack()
            finally:
                workspace.close()

    def _storage_for(self, image: str) -> str:
        """Returns the storage; with `auto`, the first call asks the engine whether it can limit a layer's size."""
        with self._lock:
            if not self._storage:
                container, name = container_name(), ["--network", "none", "--name"]
                self._images.image_id(image)  # an image that cannot be had is no reason to use memory
                create = ["create", "--storage-opt", "size=1g", *name, container, *owner_label(), image, "true"]
                try:
                    self.command(*create)
                    self._storage = "disk"
                except SandboxError as error:
                    self._storage = "memory"
                    _log.warning("%s: work trees are in memory, because %s (%s)", self.name, _NO_SIZE, error)
                with contextlib.suppress(SandboxError):
                    self.command("rm", "--force", container)
            return self._storage

    def _storage_folder(self) -> str:
        """Returns the folder of the engine's containers; empty if it is not on this machine."""
        with self._lock:
            if self._disk_at is None:
                self._disk_at = ""
                for field in ("{{.DockerRootDir}}", "{{.Store.GraphRoot}}"):
                    with contextlib.suppress(SandboxError):
                        folder = self.command("info", "--format", field).strip()
                        self._disk_at = self._disk_at or (folder if os.path.isdir(folder) else "")
            return self._disk_at

    def _prepared(self, instance: Repository, *, owned: bool) -> str:
        return self._images.prepare(instance.image, instance.workdir, owned=owned, moved=instance.MOVED)

    def _from_image(self, instance: Repository, folder: Path) -> None:
        """Checkout that copies the repository of a prepared image; its container is created, but never started."""
        container = container_name()
        image = self._prepared(instance, owned=False)
        self.command("create", "--network", "none", "--name", container, *owner_label(), image, "true")
        try:
            self.command("cp", f"{container}:{instance.workdir}/.", str(folder))
        finally:
            self.command("rm", "--force", container)


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
    arguments = ["run", "--interactive", "--rm", "--name", container, "--hostname", "sandbox", *owner_label()]
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
