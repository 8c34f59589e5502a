"""Manifests of sandboxes' pods, templates laid over them, network policies, and the states of pods."""

import dataclasses
from typing import Any

import pytest
from envs.swe.sandboxes import INSTANCE
from envs.swe.test_r2e import instance as r2e_instance

from aem_jax.envs.swe.sandbox.containers import ContainerConfig
from aem_jax.envs.swe.sandbox.pods import (
    KubernetesConfig,
    laid_over,
    open_network,
    pod_manifest,
    read_template,
    why_waiting,
)
from aem_jax.envs.swe.sandbox.workspace import Limits, Repository

LIMITS = Limits(memory_mib=4096, disk_mib=2048)


def manifest(instance: Repository = INSTANCE, limits=LIMITS, **container: Any) -> dict[str, Any]:
    config = KubernetesConfig(lifetime_s=99)
    return pod_manifest("aem-1", "own/image", instance, limits, ContainerConfig(**container), config)


def test_a_pod_is_confined():
    pod = manifest(dataclasses.replace(INSTANCE, image="own/image"))
    spec = pod["spec"]
    (main,), (prepare,) = spec["containers"], spec["initContainers"]
    assert main["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "privileged": False,
        "seccompProfile": {"type": "RuntimeDefault"},
        "runAsUser": 1000,
        "runAsGroup": 1000,
        "runAsNonRoot": True,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert prepare["securityContext"]["capabilities"] == {"drop": ["ALL"], "add": ["CHOWN", "DAC_OVERRIDE", "FOWNER"]}
    for name in ("automountServiceAccountToken", "enableServiceLinks", "hostNetwork", "hostPID", "hostIPC"):
        assert spec[name] is False
    assert (spec["activeDeadlineSeconds"], spec["restartPolicy"], spec["terminationGracePeriodSeconds"]) == (
        99,
        "Never",
        0,
    )
    assert spec["volumes"] == [{"name": "work", "emptyDir": {"sizeLimit": "2048Mi"}}]


def test_a_pods_limits_are_those_of_the_workspace():
    bounds = {"cpu": "2", "memory": "4096Mi", "ephemeral-storage": "2112Mi"}
    for container in (*manifest()["spec"]["containers"], *manifest()["spec"]["initContainers"]):
        assert container["resources"] == {"limits": bounds, "requests": bounds}
    own = manifest(limits=dataclasses.replace(LIMITS, cpus=0.5))["spec"]["containers"][0]
    assert own["resources"]["limits"]["cpu"] == "0.5"
    spec = manifest(storage="memory")["spec"]
    assert spec["volumes"] == [{"name": "work", "emptyDir": {"sizeLimit": "2048Mi", "medium": "Memory"}}]
    assert spec["containers"][0]["resources"]["limits"] == bounds | {"memory": "6144Mi", "ephemeral-storage": "64Mi"}
    spec = manifest(storage="unlimited-disk")["spec"]
    assert spec["volumes"] == [{"name": "work", "emptyDir": {}}]
    assert "ephemeral-storage" not in spec["containers"][0]["resources"]["limits"]


def test_an_images_repository_root_and_hidden_tests_are_mounted_over():
    row = dataclasses.replace(r2e_instance(), workdir="/calc")
    spec = manifest(row)["spec"]
    mounts = {mount["mountPath"]: mount for mount in spec["containers"][0]["volumeMounts"]}
    places = {path: (mount["subPath"], mount.get("readOnly", False)) for path, mount in mounts.items()}
    assert places == {
        "/testbed": ("testbed", False),
        "/calc": ("testbed", False),
        "/tmp": ("tmp", False),
        "/root": ("root", True),
        "/r2e_tests": ("hidden", True),
    }
    assert spec["initContainers"][0]["command"][3:] == ["prepare", "/aem-sandbox", "/calc", "1000:1000"]
    assert spec["initContainers"][0]["args"] == ["r2e_tests"] and spec["containers"][0]["workingDir"] == "/calc"
    # without an image of its own, an instance has no folder in the image
    spec = manifest()["spec"]
    assert {mount["mountPath"] for mount in spec["containers"][0]["volumeMounts"]} == {"/testbed", "/tmp"}
    assert spec["initContainers"][0]["command"][-2] == "" and spec["containers"][0]["workingDir"] == "/testbed"


TEMPLATE = """
kind: Pod
metadata:
  name: ignored
  labels: {team: rl}
spec:
  runtimeClassName: gvisor
  nodeSelector: {pool: sandboxes}
  tolerations: [{key: sandboxes, operator: Exists}]
  containers:
    - name: sandbox
      imagePullPolicy: Always
      resources: {requests: {cpu: 250m}}
      env: [{name: OWN, value: "1"}]
"""


def test_a_template_adds_to_a_pod(tmp_path):
    (tmp_path / "pod.yaml").write_text(TEMPLATE)
    pod = laid_over(read_template(str(tmp_path / "pod.yaml")), manifest())
    spec = pod["spec"]
    assert pod["metadata"]["name"] == "aem-1" and pod["metadata"]["labels"]["team"] == "rl"
    assert pod["metadata"]["labels"]["app.kubernetes.io/component"] == "sandbox"
    assert spec["runtimeClassName"] == "gvisor" and spec["nodeSelector"] == {"pool": "sandboxes"}
    (main,), (prepare,) = spec["containers"], spec["initContainers"]
    assert main["resources"]["requests"] == {"cpu": "250m", "memory": "4096Mi", "ephemeral-storage": "2112Mi"}
    assert main["resources"]["limits"]["cpu"] == "2" and prepare["resources"] == main["resources"]
    assert main["env"][-1] == {"name": "OWN", "value": "1"} and main["env"][0]["name"] == "HOME"
    assert main["imagePullPolicy"] == prepare["imagePullPolicy"] == "Always"
    assert laid_over({}, manifest()) == manifest()


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("spec: {hostNetwork: true}", r"spec.hostNetwork to be left out, .* sets it to False, got True"),
        ("spec: {containers: [{name: other}]}", r"only the container 'sandbox' in .*containers, got \['other'\]"),
        (
            "spec: {containers: [{name: sandbox, securityContext: {runAsUser: 0}}]}",
            r"runAsUser to be left out, .* sets it to 1000, got 0",
        ),
        ("spec: {containers: [{name: sandbox, resources: {limits: {cpu: 8}}}]}", r"limits.cpu to be left out"),
        ("kind: Deployment", r"expected a YAML file of one pod \(kind: Pod\)"),
        ("- a", r"expected a YAML file of one pod"),
        ("a: [", r"cannot be read"),
    ],
)
def test_a_template_that_contradicts_the_sandbox_is_refused(tmp_path, template, message):
    (tmp_path / "pod.yaml").write_text(template)
    with pytest.raises(ValueError, match=f"--swe.kubernetes.pod-template.*{message}"):
        read_template(str(tmp_path / "pod.yaml"))


def policy(types: list[str], selector: dict[str, Any] | None = None, **rules: Any) -> dict[str, Any]:
    spec = {"podSelector": selector or {}, **rules} | ({"policyTypes": types} if types else {})
    return {"metadata": {"name": "p"}, "spec": spec}


BOTH = ["Ingress", "Egress"]


@pytest.mark.parametrize(
    ("policies", "reason"),
    [
        ([], "no policy that selects them denies egress or ingress"),
        ([policy(BOTH)], ""),
        ([policy(["Egress"]), policy([])], ""),  # a policy without types is one for ingress
        ([policy([])], "no policy that selects them denies egress"),
        ([policy(BOTH, {"matchLabels": {"a": "1"}})], ""),
        ([policy(BOTH, {"matchLabels": {"a": "2"}})], "no policy that selects them denies egress or ingress"),
        ([policy(BOTH, {"matchExpressions": [{"key": "a", "operator": "In", "values": ["1"]}]})], ""),
        (
            [policy(BOTH, {"matchExpressions": [{"key": "a", "operator": "DoesNotExist"}]})],
            "no policy that selects them denies egress or ingress",
        ),
        ([policy(BOTH), policy(["Egress"], egress=[{}])], "the policy 'p' allows egress for them"),
        ([policy(BOTH), policy([], egress=[{}])], "the policy 'p' allows egress for them"),
        ([policy(BOTH), policy(["Egress"], {"matchLabels": {"a": "2"}}, egress=[{}])], ""),
    ],
)
def test_network_policies_are_read_as_the_cluster_reads_them(policies, reason):
    assert open_network(policies, {"a": "1"}) == reason


def pod(phase: str, state: dict[str, Any] | None = None, init: dict[str, Any] | None = None, **status: Any) -> Any:
    states = {"containerStatuses": [{"state": state}]} if state is not None else {}
    inits = {"initContainerStatuses": [{"state": init}]} if init is not None else {}
    return {"status": {"phase": phase, **states, **inits, **status}}


UNSCHEDULABLE = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/3 nodes"}


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        (pod("Running", {"running": {}}), ("", False)),
        (pod("Pending"), ("its phase is Pending", False)),
        (pod("Pending", conditions=[UNSCHEDULABLE]), ("Unschedulable 0/3 nodes", False)),
        (
            pod("Pending", init={"waiting": {"reason": "ErrImagePull", "message": "rate limit"}}),
            ("ErrImagePull rate limit", False),
        ),
        (
            pod("Pending", init={"waiting": {"reason": "InvalidImageName", "message": "X"}}),
            ("InvalidImageName X", True),
        ),
        (
            pod("Failed", init={"terminated": {"exitCode": 1, "reason": "Error", "message": "no folder"}}),
            ("Error no folder", True),
        ),
        (pod("Failed", reason="Evicted", message="low on disk"), ("Evicted low on disk", True)),
        (pod("Pending", init={"terminated": {"exitCode": 0, "reason": "Completed"}}), ("its phase is Pending", False)),
    ],
)
def test_a_pod_that_does_not_run_says_why(state, expected):
    assert why_waiting(state) == expected


def test_settings_are_checked():
    with pytest.raises(ValueError, match="start_s above 0, got 0"):
        KubernetesConfig(start_s=0)
    with pytest.raises(ValueError, match="name of a namespace, got an empty one"):
        KubernetesConfig(namespace="")
