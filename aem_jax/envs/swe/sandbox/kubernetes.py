"""Workspaces in pods of a Kubernetes cluster: one pod each, from the image that an instance names.

A pod runs nothing as root but its init container, which ends before any code of an agent begins: images are made for
root, so it copies the repository, and the interpreter below `/root`, into the pod's volume, where the commands' user
owns the one and can read the other at the old path. The other way, images that were prepared by an engine as in
`images.py`, would need an engine, a registry to push to, and twice the storage there; it would save seconds of copying.

    /              the image, read-only
    /testbed       the repository (also at its own path); /tmp; both in one volume of at most `disk_mib`
    /root          copy of the image's, read-only
    hidden tests   an empty folder that nobody may enter, over the image's

A pod has no network by the namespace's NetworkPolicy, which `open` checks, because a pod cannot refuse the network
itself. Every pod belongs to a lease of this process (`cluster.py`) and has a deadline, so it does not outlive this
process for long.
"""

import atexit
import logging
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from aem_jax.envs.swe.sandbox import execution
from aem_jax.envs.swe.sandbox.archives import Archives
from aem_jax.envs.swe.sandbox.cluster import Cluster
from aem_jax.envs.swe.sandbox.cluster_errors import ApiError, DisconnectedError
from aem_jax.envs.swe.sandbox.containers import ContainerConfig
from aem_jax.envs.swe.sandbox.execution import FILE_S, Execution
from aem_jax.envs.swe.sandbox.lease import LABELS
from aem_jax.envs.swe.sandbox.pods import (
    KubernetesConfig,
    laid_over,
    open_network,
    pod_manifest,
    read_template,
    running,
    states,
    why_waiting,
)
from aem_jax.envs.swe.sandbox.workspace import Checkout, Limits, Outcome, Repository, SandboxError

MANIFESTS = "deploy/sandboxes.yaml"
ENDED_S = 15.0
"""Time in which the cluster should say why a pod ended, seconds."""
_REACH = "timeout 3 bash -c 'exec 3<> \"/dev/tcp/$KUBERNETES_SERVICE_HOST/$KUBERNETES_SERVICE_PORT\"'"
_log = logging.getLogger(__name__)


class Kubernetes:
    """The Kubernetes runtime.

    Args:
        config: the cluster.
        container: the settings of containers: image, prelude, processors, and storage (`memory` for a volume in memory,
            `unlimited-disk` for one without a limit).

    Raises:
        SandboxError: the cluster cannot be used, or its namespace does not forbid the network; ValueError: the pod
            template is invalid.
    """

    name = "kubernetes"

    def __init__(self, config: KubernetesConfig, container: ContainerConfig):
        self._config, self._container = config, container
        self._cluster = Cluster(config.namespace, config.context)
        self._template = read_template(config.pod_template)
        labels = {**(self._template.get("metadata", {}).get("labels") or {}), **LABELS}
        try:
            self._cluster.check_access()
            reason = open_network(self._cluster.network_policies(), labels)
        except ApiError as error:
            raise SandboxError(
                f"the namespace {config.namespace!r} cannot be used: {error}. {MANIFESTS} has it, with the rights that "
                "are needed"
            ) from None
        if reason:
            raise SandboxError(
                f"expected a NetworkPolicy in the namespace {config.namespace!r} that leaves sandboxes no network: "
                f"{reason}. kubectl apply -f {MANIFESTS}"
            )
        self._archives = Archives()
        self._lock = threading.Lock()
        self._isolated = False
        atexit.register(self.close)

    def open(self, instance: Repository, checkout: Checkout, *, limits: Limits | None = None) -> "PodWorkspace":
        """See `sandbox.Runtime.open`; the checkout is called only if the instance names no image.

        Raises:
            SandboxError: the instance has no image, the pod did not start, or it has a network.
        """
        limits = limits or Limits()
        image = instance.image or self._container.image
        if not image:
            raise SandboxError(
                f"expected an image for {instance.instance_id!r}, which names none; name one with bash, git, patch, "
                "tar and the tests' dependencies (--swe.container.image of a run, --image of the check)"
            )
        name = f"aem-swe-{uuid.uuid4().hex[:16]}"
        manifest = laid_over(self._template, pod_manifest(name, image, instance, limits, self._container, self._config))
        try:
            self._start(name, manifest)
            workspace = PodWorkspace(self._cluster, name, limits, self._container.prelude)
            self._check_network(workspace)
            if instance.image:
                execution.make_bug(workspace._execute, instance, limits)
                execution.forget_history(workspace._execute, instance.base_commit, limits)
            else:
                with self._archives.of_checkout(instance, checkout) as archive:
                    workspace.unpack(archive)
        except BaseException:
            _delete(self._cluster, name)
            raise
        return workspace

    def close(self) -> None:
        """Deletes the pods that are left. It is called when this process ends."""
        self._cluster.release()

    def _start(self, name: str, manifest: Mapping[str, Any]) -> None:
        """Creates a pod, and waits until it runs.

        Raises:
            SandboxError: it does not within `start_s`, or never will.
        """
        deadline = time.monotonic() + self._config.start_s
        while True:
            try:
                self._cluster.create_pod(manifest)
                break
            except ApiError as error:
                if not (error.status == 403 and "exceeded quota" in str(error)) or time.monotonic() > deadline:
                    raise
                time.sleep(min(2.0, self._config.start_s / 10))  # other pods end
        state = "it was created"
        while (left := deadline - time.monotonic()) > 0:
            began = time.monotonic()
            for pod in self._cluster.watch_pod(name, left):
                if pod is None:
                    raise SandboxError(f"the pod {name} was deleted before it ran")
                state, lasting = why_waiting(pod)
                if not state:
                    return
                if lasting:
                    raise SandboxError(f"the pod {name} did not start: {state}")
                if time.monotonic() > deadline:
                    break
            time.sleep(max(0.0, 0.2 - (time.monotonic() - began)))  # a watch may end at once
        raise SandboxError(
            f"the pod {name} did not start within {self._config.start_s:g} s (--swe.kubernetes.start-s): {state}"
        )

    def _check_network(self, workspace: "PodWorkspace") -> None:
        """Checks once that the cluster enforces its network policies: not every network plugin does."""
        with self._lock:
            if self._isolated:
                return
            for _ in range(5):
                if workspace.run(_REACH).exit_code != 0:
                    self._isolated = True
                    return
                time.sleep(2)  # some plugins let a pod begin before its policy
        raise SandboxError(
            "expected sandboxes without a network, but a pod reached the API server: the cluster's network plugin does "
            "not enforce NetworkPolicy (on GKE: Dataplane V2, or network policy enforcement)"
        )


class PodWorkspace:
    """One running pod; see `sandbox.Workspace` for the methods."""

    def __init__(self, cluster: Cluster, pod: str, limits: Limits, prelude: str):
        self._cluster, self._pod, self._limits, self._prelude = cluster, pod, limits, prelude
        self._ended = ""

    def run(self, command: str, *, limits: Limits | None = None, stdin: bytes = b"") -> Outcome:
        """See `sandbox.Workspace.run`.

        Raises:
            SandboxError: the pod is gone, or cannot be reached, which the code inside did not cause.
        """
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
            _delete(self._cluster, self._pod)

    def _execute(self, argv: Sequence[str], limits: Limits, stdin: int | None, *, split: bool = True) -> Execution:
        """See `execution.Execute`. The limits on memory, processes and disk are the pod's."""
        if self._ended:
            return Execution(None, False, 0.0, self._ended)
        began = time.monotonic()
        try:
            result = self._cluster.execute(self._pod, argv, limits, stdin, merge=not split)
        except DisconnectedError as error:
            self._end(self._why_ended(error))
            return Execution(None, False, time.monotonic() - began, self._ended)
        self._kill_rest()
        in_time = result.exit_code is not None
        return Execution(
            exit_code=None if self._ended else result.exit_code,
            timed_out=not in_time,
            seconds=time.monotonic() - began,
            notice=self._ended if in_time else f"killed: not done after {limits.seconds:g} s",
            head=bytes(result.output.head),
            tail=bytes(result.output.tail),
            total=result.output.total,
            errors=(result.errors.head + result.errors.tail).decode(errors="replace"),
        )

    def _kill_rest(self) -> None:
        """Kills all processes but the container's first, which signals from inside do not reach.

        `Cluster.execute` does so after each program, but code inside can kill the shell that does it.
        """
        try:
            code = self._cluster.execute(self._pod, ["true"], replace(self._limits, seconds=FILE_S)).exit_code
        except DisconnectedError as error:
            self._end(self._why_ended(error))
            return
        if code != 0:
            self._end(self._why_ended(None))

    def _why_ended(self, error: DisconnectedError | None) -> str:
        """Returns how the code inside ended its pod.

        Args:
            error: a connection to the pod failed; None: processes could not be killed.

        Raises:
            SandboxError: it did not; the node, the cluster or the connection did.
        """
        deadline = time.monotonic() + ENDED_S
        pod = self._cluster.pod(self._pod)
        while pod is not None and running(pod) and time.monotonic() < deadline:
            time.sleep(0.5)  # the kubelet reports it after the connection ended
            pod = self._cluster.pod(self._pod)
        if pod is None:
            raise SandboxError(f"the pod {self._pod} was deleted from outside while it was used")
        status = pod["status"]
        if running(pod):
            if error is None:
                return "the sandbox was ended: what ran in it could not be killed"
            raise SandboxError(f"the pod {self._pod} cannot be reached: {error}")
        reason, message = status.get("reason", ""), status.get("message", "")
        disrupted = any(item["type"] == "DisruptionTarget" for item in status.get("conditions") or ())
        own_disk = reason == "Evicted" and "low on resource" not in message
        if not own_disk and (reason or disrupted or pod["metadata"].get("deletionTimestamp")):
            raise SandboxError(
                f"the pod {self._pod} was ended from outside: {reason or 'disruption'} {message}".strip()
            )
        ended = next((item for item in states(status) if item.get("reason") and item.get("exitCode")), {})
        why = message if own_disk else ended.get("reason", "")
        return f"the sandbox was ended by what ran in it{f' ({why})' if why else ''}"


def _delete(cluster: Cluster, pod: str) -> None:
    try:
        cluster.delete_pod(pod)
    except SandboxError as error:  # its lease and its deadline end it
        _log.warning("the pod %s could not be deleted: %s", pod, error)
