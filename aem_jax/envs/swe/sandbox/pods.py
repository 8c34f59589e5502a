"""Pods of sandboxes: their settings and manifests, a template laid over them, and what their states mean."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from aem_jax.envs.swe.sandbox.cluster import CONTAINER
from aem_jax.envs.swe.sandbox.containers import SETTINGS, ContainerConfig
from aem_jax.envs.swe.sandbox.lease import LABELS
from aem_jax.envs.swe.sandbox.mounts import USER_ID
from aem_jax.envs.swe.sandbox.workspace import TESTBED, Limits, Repository

LOG_MIB = 64
"""Disk that a pod may take in addition to its volume, MiB."""
_CAPABILITIES = ("CHOWN", "DAC_OVERRIDE", "FOWNER")
_VOLUME = "/aem-sandbox"

# The first process reaps its children, because it ignores SIGCHLD.
_FIRST_PROCESS = "trap '' CHLD; exec sleep infinity"
_PREPARE = r"""
set -e
volume=$1 folder=$2 user=$3
shift 3
mkdir "$volume/testbed" "$volume/root" "$volume/hidden" "$volume/tmp"
chmod 1777 "$volume/tmp"
chmod 0000 "$volume/hidden"
copy() { cp -a --no-preserve=ownership -- "$@"; }
if [ -n "$folder" ]; then
  [ -d "$folder" ] || { echo "the image has no folder $folder"; exit 1; }
  copy "$folder/." "$volume/testbed"
  for name in "$@"; do
    rm -rf -- "$volume/testbed/$name"
    if [ -d "/$name" ]; then copy "/$name" "$volume/testbed/$name"; else mkdir -- "$volume/testbed/$name"; fi
  done
  if [ -d /root ]; then copy /root/. "$volume/root"; fi
fi
chmod -R o+rX "$volume/root"
chown -hR "$user" "$volume/testbed"
"""


@dataclass(frozen=True)
class KubernetesConfig:
    """Settings of a Kubernetes cluster; docs/howto/kubernetes.md has its manifests."""

    namespace: str = "aem-sandboxes"
    """Namespace of the pods."""
    context: str = ""
    """Context of the kubeconfig; empty: the service account inside a cluster, else the current context."""
    pod_template: str = ""
    """YAML file of a pod that adds to the sandbox's: node selector, tolerations, runtime class, requests, …"""
    start_s: float = 480.0
    """Time for a pod to start, seconds: waiting for the quota and for a node, pulling the image, copying."""
    lifetime_s: float = 14400.0
    """Time after which the cluster ends a pod, seconds. It must be longer than any episode."""

    def __post_init__(self) -> None:
        for name in ("start_s", "lifetime_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"expected {name} above 0, got {getattr(self, name)}")
        if not self.namespace:
            raise ValueError("expected the name of a namespace, got an empty one")


def pod_manifest(
    name: str,
    image: str,
    instance: Repository,
    limits: Limits,
    container: ContainerConfig,
    config: KubernetesConfig,
) -> dict[str, Any]:
    """Returns the pod of a workspace.

    Args:
        name: of the pod.
        image: has the repository in `instance.workdir`, if the instance names an image.
        instance: the task.
        limits: of the workspace.
        container: processors, and where the volume lies.
        config: the pod's lifetime.
    """
    folder = instance.workdir if instance.image else ""
    memory = limits.memory_mib + (limits.disk_mib if container.storage == "memory" else 0)
    volume: dict[str, Any] = {} if container.storage == "unlimited-disk" else {"sizeLimit": f"{limits.disk_mib}Mi"}
    bounds = {"cpu": f"{limits.cpus or container.processors:g}", "memory": f"{memory}Mi"}
    if container.storage == "memory":
        volume["medium"] = "Memory"
        bounds["ephemeral-storage"] = f"{LOG_MIB}Mi"
    elif container.storage != "unlimited-disk":
        bounds["ephemeral-storage"] = f"{limits.disk_mib + LOG_MIB}Mi"
    places = {TESTBED: "testbed", "/tmp": "tmp"} | ({folder: "testbed", "/root": "root"} if folder else {})
    mounts = [{"name": "work", "mountPath": path, "subPath": part} for path, part in places.items()]
    mounts += [{"name": "work", "mountPath": f"/{path}", "subPath": "hidden"} for path in instance.MOVED if folder]
    for mount in mounts:
        mount |= {"readOnly": True} if mount["subPath"] in ("root", "hidden") else {}
    confined = {"allowPrivilegeEscalation": False, "privileged": False, "seccompProfile": {"type": "RuntimeDefault"}}
    shared = {"image": image, "resources": {"limits": bounds, "requests": dict(bounds)}}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": name,
            "labels": dict(LABELS),
            "annotations": {"aem-jax/instance": instance.instance_id},
        },
        "spec": {
            "restartPolicy": "Never",
            "activeDeadlineSeconds": int(config.lifetime_s),
            "terminationGracePeriodSeconds": 0,
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            "hostNetwork": False,
            "hostPID": False,
            "hostIPC": False,
            "shareProcessNamespace": False,
            "hostname": "sandbox",
            "volumes": [{"name": "work", "emptyDir": volume}],
            "initContainers": [
                {
                    **shared,
                    "name": "prepare",
                    "command": ["bash", "-c", _PREPARE, "prepare", _VOLUME, folder, f"{USER_ID}:{USER_ID}"],
                    "args": list(instance.MOVED if folder else ()),
                    "workingDir": "/",
                    "terminationMessagePolicy": "FallbackToLogsOnError",
                    "securityContext": {
                        **confined,
                        "runAsUser": 0,
                        "runAsGroup": 0,
                        "readOnlyRootFilesystem": True,
                        "capabilities": {"drop": ["ALL"], "add": list(_CAPABILITIES)},
                    },
                    "volumeMounts": [{"name": "work", "mountPath": _VOLUME}],
                }
            ],
            "containers": [
                {
                    **shared,
                    "name": CONTAINER,
                    "command": ["bash", "-c", _FIRST_PROCESS],
                    "workingDir": folder or TESTBED,
                    "env": [{"name": name, "value": value} for name, value in SETTINGS.items()],
                    "securityContext": {
                        **confined,
                        "runAsUser": USER_ID,
                        "runAsGroup": USER_ID,
                        "runAsNonRoot": True,
                        "readOnlyRootFilesystem": True,
                        "capabilities": {"drop": ["ALL"]},
                    },
                    "volumeMounts": mounts,
                }
            ],
        },
    }


def laid_over(template: Mapping[str, Any], pod: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a pod with what a template adds to it.

    A template may add fields and items of lists, and replace `requests`. The init container gets the same resources.

    Raises:
        ValueError: the template contradicts the pod, or has another container.
    """
    merged = _merged(template, pod, "the pod template")
    (container,) = merged["spec"]["containers"]
    for prepare in merged["spec"]["initContainers"]:
        prepare["resources"] = container["resources"]
        prepare |= {name: container[name] for name in ("imagePullPolicy",) if name in container}
    return merged


def _merged(theirs: Any, ours: Any, where: str) -> Any:
    if where.endswith(".requests"):
        return {**ours, **theirs}
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        both = {name: _merged(theirs[name], ours[name], f"{where}.{name}") for name in ours if name in theirs}
        return {**theirs, **ours, **both}
    if where.endswith((".containers", ".initContainers")) and isinstance(theirs, list):
        names = [item.get("name") if isinstance(item, Mapping) else item for item in theirs]
        if names != [item["name"] for item in ours]:
            raise ValueError(f"expected only the container {ours[0]['name']!r} in {where}, got {names}")
        return [_merged(theirs[0], ours[0], where)]
    if isinstance(ours, list) and isinstance(theirs, list):
        return [*ours, *theirs]
    if ours != theirs:
        raise ValueError(f"expected {where} to be left out, because the sandbox sets it to {ours!r}, got {theirs!r}")
    return ours


def read_template(path: str) -> Mapping[str, Any]:
    """Returns the content of a pod template; empty without a path.

    Raises:
        ValueError: it cannot be read, is no pod, or contradicts the sandbox.
    """
    if not path:
        return {}
    import yaml

    try:
        template = yaml.safe_load(Path(path).expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"--swe.kubernetes.pod-template: {path} cannot be read: {error}") from None
    if not isinstance(template, Mapping) or template.get("kind", "Pod") != "Pod":
        raise ValueError(f"--swe.kubernetes.pod-template: expected a YAML file of one pod (kind: Pod) in {path}")
    metadata = {name: value for name, value in (template.get("metadata") or {}).items() if name != "name"}
    template = {**template, "metadata": metadata}
    try:
        laid_over(template, pod_manifest("name", "image", _Nothing(), Limits(), ContainerConfig(), KubernetesConfig()))
    except ValueError as error:
        raise ValueError(f"--swe.kubernetes.pod-template {path}: {error}") from None
    return template


class _Nothing:
    """The repository of no instance, to try a template with."""

    MOVED: ClassVar[tuple[str, ...]] = ()
    instance_id = repo = base_commit = image = bug_patch = ""
    workdir = TESTBED


def open_network(policies: Sequence[Mapping[str, Any]], labels: Mapping[str, str]) -> str:
    """Returns why pods with these labels have a network under their namespace's policies; empty if they have none."""
    closed: set[str] = set()
    for policy in policies:
        spec = policy["spec"]
        if not _selects(spec.get("podSelector") or {}, labels):
            continue
        kinds = spec.get("policyTypes") or ["Ingress", *(["Egress"] if spec.get("egress") else [])]
        for kind in kinds:
            closed.add(kind)
            if spec.get(kind.lower()):
                return f"the policy {policy['metadata']['name']!r} allows {kind.lower()} for them"
    missing = {"Ingress", "Egress"} - closed
    return f"no policy that selects them denies {' or '.join(sorted(missing)).lower()}" if missing else ""


def _selects(selector: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    tests = {
        "In": lambda key, values: labels.get(key) in values,
        "NotIn": lambda key, values: labels.get(key) not in values,
        "Exists": lambda key, values: key in labels,
        "DoesNotExist": lambda key, values: key not in labels,
    }
    return all(labels.get(key) == value for key, value in (selector.get("matchLabels") or {}).items()) and all(
        tests[rule["operator"]](rule["key"], rule.get("values") or ())
        for rule in selector.get("matchExpressions") or ()
    )


def running(pod: Mapping[str, Any]) -> bool:
    return pod["status"].get("phase") == "Running" and not pod["metadata"].get("deletionTimestamp")


def states(status: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Returns the states of a pod's containers; a terminated one has an `exitCode`."""
    containers = [*(status.get("initContainerStatuses") or ()), *(status.get("containerStatuses") or ())]
    return [state for item in containers for state in (item.get("state") or {}).values() if state]


_NEVER = {"InvalidImageName", "ErrImageNeverPull", "CreateContainerConfigError", "CreateContainerError"}


def why_waiting(pod: Mapping[str, Any]) -> tuple[str, bool]:
    """Returns why a pod does not run its container yet, and whether it never will; empty if it runs."""
    status = pod["status"]
    running = [item for item in status.get("containerStatuses") or () if "running" in (item.get("state") or {})]
    if status.get("phase") == "Running" and running:
        return "", False
    all_states = states(status)
    failed = [state for state in all_states if state.get("exitCode")]
    if status.get("phase") == "Failed" or failed:
        words = [status.get("reason", ""), status.get("message", "")]
        words += [str(state.get(name, "")) for state in failed for name in ("reason", "message")]
        return " ".join(filter(None, words)) or "it failed", True
    waiting = [state for state in all_states if state.get("reason") and "exitCode" not in state]
    for state in waiting:
        if state["reason"] in _NEVER:
            return f"{state['reason']} {state.get('message', '')}".strip(), True
    refused = [item for item in status.get("conditions") or () if item.get("status") == "False"]
    reasons = [item for item in [*waiting, *refused] if item.get("reason") and item.get("message")]
    words = [f"{item['reason']} {item['message']}" for item in reasons]
    return "; ".join(words) or f"its phase is {status.get('phase', 'unknown')}", False
