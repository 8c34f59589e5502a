"""A node of a cluster, for tests: runs the containers of a pod in namespaces of this machine, as their manifest says.

What the manifest says of users, capabilities, mounts and read-only roots is done, so that a wrong manifest fails. It
needs root, bubblewrap and nsenter. Memory and processor limits are not enforced.
"""

import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from aem_jax.envs.swe.sandbox.mounts import ENVIRONMENT, host_view

_PYTHON = "/opt/python"
_USERS = "root:x:0:0:root:/root:/bin/bash\nagent:x:1000:1000:agent:/tmp:/bin/bash\n"


def skip_without_node() -> None:
    """Skips a test where this machine cannot be a node."""
    if os.geteuid() != 0 or any(shutil.which(name) is None for name in ("bwrap", "nsenter", "setpriv")):
        pytest.skip("a node needs root, bubblewrap, nsenter and setpriv")
    trial = ["bwrap", "--unshare-pid", "--unshare-net", "--ro-bind", "/", "/", "--proc", "/proc", "true"]
    if subprocess.run(trial, capture_output=True).returncode != 0:
        pytest.skip("bubblewrap does not work here")


@functools.lru_cache(1)
def _base() -> tuple[str, ...]:
    """Mounts of every image: the system, an interpreter and pytest; nothing of it lies below /root."""
    view, prefix = host_view(("pytest",)), str(Path(sys.base_prefix).resolve())
    moved = lambda text: text if prefix.startswith("/usr") else text.replace(prefix, _PYTHON)
    files = Path(tempfile.mkdtemp(prefix="aem-test-image-"))
    words: list[str] = []
    for bind in view.binds:
        words += ["--ro-bind", str(bind.source), moved(bind.at)]
    for target, path in view.links:
        words += ["--symlink", moved(target), path]
    for number, (path, (content, mode)) in enumerate({**view.files, "/etc/passwd": (_USERS.encode(), 0o644)}.items()):
        (files / str(number)).write_text(moved(content.decode()))
        (files / str(number)).chmod(mode)
        words += ["--ro-bind", str(files / str(number)), path]
    paths = [Path(word) for word in words[2::3]]  # each mount is three words
    folders = sorted({str(parent) for path in paths for parent in path.parents if parent != Path("/")})
    return (*(word for folder in folders for word in ("--perms", "0755", "--dir", folder)), *words)


class Container:
    """A container of a pod.

    Args:
        spec: from the pod's manifest.
        image: a folder with what the image has beside `_base`.
        volumes: name -> folder.
        variables: environment that the node sets.
        network: whether it has the node's network.
    """

    def __init__(
        self,
        spec: Mapping[str, Any],
        image: Path,
        volumes: Mapping[str, Path],
        variables: Mapping[str, str],
        network: bool,
    ):
        security = spec["securityContext"]
        assert security["seccompProfile"] == {"type": "RuntimeDefault"} and not security["allowPrivilegeEscalation"]
        assert security["readOnlyRootFilesystem"] and security["capabilities"]["drop"] == ["ALL"]
        self._user, added = security["runAsUser"], security["capabilities"].get("add", [])
        self._capabilities = ",".join(["-all", *(f"+{name.lower()}" for name in added)])
        self._variables = {
            **variables,
            "PATH": f"{ENVIRONMENT}/bin:/usr/local/bin:/usr/bin:/bin",
            **{item["name"]: item["value"] for item in spec.get("env", ())},
        }
        # as the kubelet does: references to variables in a command are replaced
        assert not [word for word in (*spec["command"], *spec.get("args", ())) if re.search(r"\$\(\w+\)|\$\$", word)]
        words = ["bwrap", "--unshare-pid", "--as-pid-1", "--unshare-ipc", "--unshare-uts", "--hostname", "sandbox"]
        words += [] if network else ["--unshare-net"]
        words += ["--cap-add", "ALL", *_base()]
        for entry in sorted(image.iterdir()):
            words += ["--ro-bind", str(entry), f"/{entry.name}"]
        words += ["--proc", "/proc", "--dev", "/dev"]
        for mount in sorted(spec["volumeMounts"], key=lambda mount: mount["mountPath"].count("/")):
            source = volumes[mount["name"]] / mount.get("subPath", "")
            words += ["--ro-bind" if mount.get("readOnly") else "--bind", str(source), mount["mountPath"]]
        words += ["--remount-ro", "/", "--chdir", spec["workingDir"]]
        read, write = os.pipe()
        command = [*words, "--info-fd", str(write), *self._become(), *spec["command"], *spec.get("args", ())]
        self._output = tempfile.TemporaryFile()  # noqa: SIM115 (read when the container ends)
        try:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=self._output, stderr=self._output, pass_fds=(write,)
            )
        finally:
            os.close(write)
        with open(read) as info:
            text = info.read()
        self._pid = json.loads(text)["child-pid"] if text else 0
        while self.process.poll() is None and os.readlink(f"/proc/{self._pid}/exe").endswith("bwrap"):
            time.sleep(0.005)  # its mounts are being made

    def _become(self) -> list[str]:
        """Words that take the user, the capabilities and the environment of the container."""
        settings = [f"{name}={value}" for name, value in self._variables.items()]
        ids = [f"--reuid={self._user}", f"--regid={self._user}", "--clear-groups"]
        bounds = [f"--bounding-set={self._capabilities}", "--inh-caps=-all", "--no-new-privs"]
        return ["setpriv", *ids, *bounds, "env", "-i", *settings]

    def enter(self, argv: Sequence[str]) -> list[str]:
        """Returns the command that runs a program in the container."""
        return ["nsenter", f"--target={self._pid}", *["-m", "-u", "-i", "-n", "-p", "-r", "-w"], *self._become(), *argv]

    def wait(self) -> tuple[int, str]:
        """Waits for the first process; returns its exit code and the end of its output."""
        code = self.process.wait()
        self._output.seek(0)
        return (128 - code if code < 0 else code), self._output.read().decode()[-2000:]

    def kill(self) -> None:
        """Ends the container and all its processes."""
        if self._pid and self.process.poll() is None:
            os.kill(self._pid, signal.SIGKILL)
        self.process.wait()


class Pod:
    """A pod on the node."""

    def __init__(self, manifest: dict[str, Any], node: "Node"):
        self.manifest, self._node = manifest, node
        self._folder = Path(tempfile.mkdtemp(prefix="aem-test-pod-"))
        self.main: Container | None = None
        self.ended = threading.Event()
        self._thread = threading.Thread(target=self._live, daemon=True)
        self._thread.start()

    def _set(self, phase: str, **status: Any) -> None:
        if not self.ended.is_set():
            self.manifest["status"] = {"phase": phase, **status}

    def _live(self) -> None:
        spec = self.manifest["spec"]
        assert spec["restartPolicy"] == "Never" and spec["automountServiceAccountToken"] is False
        volumes = {volume["name"]: self._folder / volume["name"] for volume in spec["volumes"]}
        for folder in volumes.values():
            folder.mkdir()
            folder.chmod(0o777)
        self._folder.chmod(0o755)
        make = lambda container, image: Container(
            container, image, volumes, self._node.variables, not self._node.enforces_policies
        )
        if message := self._node.unschedulable:
            condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message}
            self._set("Pending", conditions=[condition])
            return
        (prepare,), (main,) = spec["initContainers"], spec["containers"]
        image = self._node.images.get(main["image"])
        if image is None:
            waiting = {"reason": "ImagePullBackOff", "message": f'Back-off pulling image "{main["image"]}"'}
            self._set("Pending", initContainerStatuses=[{"name": prepare["name"], "state": {"waiting": waiting}}])
            return
        code, output = make(prepare, image).wait()
        done = {"exitCode": code, "reason": "Error" if code else "Completed", "message": output}
        inits = [{"name": prepare["name"], "state": {"terminated": done}}]
        if code:
            self._set("Failed", initContainerStatuses=inits)
            return
        if self.ended.is_set():
            return
        self.main = make(main, image)
        running = [{"name": main["name"], "state": {"running": {}}, "ready": True}]
        self._set("Running", initContainerStatuses=inits, containerStatuses=running)
        code, _ = self.main.wait()
        terminated = {"exitCode": code, "reason": self._node.end_reason or ("Error" if code else "Completed")}
        statuses = [{"name": main["name"], "state": {"terminated": terminated}}]
        self._set(
            "Failed" if code else "Succeeded",
            initContainerStatuses=inits,
            containerStatuses=statuses,
            **self._node.end_status,
        )

    def delete(self) -> None:
        """Ends the pod and removes its files."""
        self.ended.set()
        if self.main:
            self.main.kill()
        self._thread.join()
        if self.main:
            self.main.kill()
        shutil.rmtree(self._folder)


class Node:
    """The machine on which pods run.

    Attributes:
        images: name -> folder with the image's files.
        variables: environment of every container.
        enforces_policies: whether the network plugin enforces network policies; it denies all.
        unschedulable: why no pod finds a place; empty: they do.
        end_reason: reason of a container that ends.
        end_status: further status of a pod whose container ends.
    """

    def __init__(self):
        self.images: dict[str, Path] = {}
        self.variables: dict[str, str] = {}
        self.reset()

    def reset(self) -> None:
        """Returns to a healthy node."""
        self.enforces_policies, self.unschedulable, self.end_reason = True, "", ""
        self.end_status: dict[str, Any] = {}
