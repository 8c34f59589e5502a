"""Workspaces in pods: the official client, a local API server that speaks its protocol, and namespaces of this machine.

They need the package kubernetes (`pip install 'aem_jax[kubernetes]'`) and root.
"""

import dataclasses
import datetime
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import pytest
from envs.swe.kubernetes_api import NAMESPACE, ApiServer
from envs.swe.kubernetes_node import skip_without_node
from envs.swe.samples import CALC, FIXED
from envs.swe.sandboxes import CHECKOUT, FILES, GOLD, INSTANCE
from envs.swe.test_calls import block
from envs.swe.test_r2e import PATCHES
from envs.swe.test_r2e import SCRIPT as R2E_SCRIPT
from envs.swe.test_r2e import TEST as R2E_TEST
from envs.swe.test_r2e import instance as r2e_instance

from aem_jax.envs.swe import formats
from aem_jax.envs.swe.env import SweConfig, SweEnv
from aem_jax.envs.swe.grading import grade
from aem_jax.envs.swe.repos import files_checkout
from aem_jax.envs.swe.sandbox import choose, cluster, kubernetes
from aem_jax.envs.swe.sandbox.containers import ContainerConfig
from aem_jax.envs.swe.sandbox.kubernetes import Kubernetes
from aem_jax.envs.swe.sandbox.pods import KubernetesConfig
from aem_jax.envs.swe.sandbox.workspace import Limits, SandboxError, WorkspaceError

pytestmark = pytest.mark.skipif(find_spec("kubernetes") is None, reason="the package kubernetes is not installed")

LIMITS = Limits(seconds=60, memory_mib=512, processes=32, file_mib=8, disk_mib=32, output_bytes=4096)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    skip_without_node()
    folder = tmp_path_factory.mktemp("cluster")
    server = ApiServer(folder)
    (folder / "base").mkdir()
    server.node.images["base"] = folder / "base"
    server.node.images["own/calc"] = published(folder / "calc")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("KUBECONFIG", str(server.kubeconfig))
        yield server
    server.close()


@pytest.fixture(autouse=True)
def healthy(server, monkeypatch):
    monkeypatch.setattr(cluster, "pause", lambda attempt: time.sleep(0.05))
    yield
    server.reset()


def make(**changes) -> Kubernetes:
    return Kubernetes(KubernetesConfig(**{"start_s": 60, **changes}), ContainerConfig(image="base"))


@pytest.fixture(scope="module")
def runtime(server):
    runtime = make()
    yield runtime
    runtime.close()


@pytest.fixture
def workspace(runtime, server):
    workspace = runtime.open(INSTANCE, CHECKOUT, limits=LIMITS)
    yield workspace
    workspace.close()
    assert not server.pods


def published(image: Path) -> Path:
    """The files of an image in R2E-Gym's layout: its interpreter is below /root, which only root may enter."""
    program = image / "root" / "py" / "bin" / "python"
    for folder in (program.parent, image / "testbed" / ".venv" / "bin", image / "r2e_tests"):
        folder.mkdir(parents=True)
    program.write_text('#!/bin/bash\nexec /opt/venv/bin/python "$@"\n')
    for path in (program, program.parent.parent, image / "root"):
        path.chmod(0o700)
    (image / "testbed" / ".venv" / "bin" / "python").symlink_to("/root/py/bin/python")
    (image / "testbed" / "calc.py").write_text(CALC["calc.py"])
    (image / "testbed" / ".gitignore").write_text(".venv\n")
    git = ["git", "-C", str(image / "testbed"), "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (
        ["init", "-q"],
        ["add", "calc.py", ".gitignore"],
        ["commit", "-qm", "base"],
        ["commit", "-q", "--allow-empty", "-m", "the fix"],
        ["checkout", "-q", "HEAD~1"],
    ):
        subprocess.run([*git, *words], check=True)
    (image / "r2e_tests" / "test_1.py").write_text(R2E_TEST)
    (image / "testbed" / "run_tests.sh").write_text(R2E_SCRIPT)
    return image


def test_a_command_sees_the_repository_and_its_user(workspace):
    outcome = workspace.run("id -u; pwd; git status --short; git log --oneline | wc -l; ls; echo err >&2; exit 3")
    assert (outcome.exit_code, outcome.timed_out, outcome.notice) == (3, False, "")
    assert outcome.output.split() == ["1000", "/testbed", "1", *sorted(FILES), "err"]
    # what a command leaves behind is killed, even if it holds the output open, or stops what would kill it
    assert workspace.run("echo changed > calc.py; sleep 300 & echo begun").output == "begun\n"
    assert workspace.run("(setsid sleep 300 &> /dev/null &); kill -KILL $PPID").exit_code == 137
    left = workspace.run("cat calc.py; set -- /proc/[0-9]*; echo $#; cat /proc/[0-9]*/comm")
    assert left.output.split() == ["changed", "3", "sleep", "bash", "cat"], left
    assert len(workspace.run("yes | head -c 1000000").output) < 5000
    assert workspace.run("kill -9 $$").exit_code == 137


def test_input_and_files_of_any_size_arrive(workspace):
    data = os.urandom(3_000_000)
    assert workspace.run("sha256sum", stdin=data).output == workspace.run("sha256sum; :", stdin=data).output
    echoed = workspace.run("cat", stdin=data, limits=dataclasses.replace(LIMITS, output_bytes=8_000_000))
    assert echoed.exit_code == 0 and len(echoed.output) > 1_000_000
    assert workspace.run("yes | head -c 2000000", stdin=data).exit_code == 0  # input that nobody reads
    assert workspace.run("wc -c").output == "0\n"
    long = "echo " + "x" * 150_000 + " | wc -c"
    assert workspace.run(long).output == "150001\n"
    workspace.write("new/file", b"\0data")
    assert workspace.read("/testbed/new/file") == b"\0data"
    with pytest.raises(WorkspaceError, match="could not read 'nothing'.*No such file"):
        workspace.read("nothing")


def test_limits_are_enforced(workspace):
    late = workspace.run("sleep 300", limits=dataclasses.replace(LIMITS, seconds=1))
    assert (late.exit_code, late.timed_out) == (None, True) and "not done after 1 s" in late.notice
    for attempt in (
        "python -c 'bytearray(10**9)'",
        "head -c 10000000 /dev/zero > large",
        "touch /usr/x",
        "touch /x",
        "kill -KILL 1; kill -TERM 1; exit 1",
        "python -c 'import socket; socket.create_connection((\"1.1.1.1\", 53), 5)'",
    ):
        assert workspace.run(attempt).exit_code not in (0, None), attempt
    late = workspace.run("while :; do :; done", limits=dataclasses.replace(LIMITS, cpu_seconds=1))
    assert late.exit_code == 137
    assert workspace.run("echo well").output == "well\n"


@pytest.mark.parametrize("protocol", ["v4.channel.k8s.io", "v5.channel.k8s.io"])
def test_both_protocols_are_spoken(server, workspace, protocol):
    server.protocols = (protocol,)
    assert workspace.run("wc -c; exit 4", stdin=b"x" * 50_000).output == "50000\n"


def test_an_image_of_r2e_gyms_layout_works_without_privileges(runtime, server):
    row = r2e_instance(docker_image="own/calc", execution_result_content=None)
    env = SweEnv(SweConfig(command_s=60, grade_s=60, memory_mib=512, disk_mib=256), runtime)
    look = (
        "id -u; command -v python; python -c 'print(6 * 7)'; ls -A; git log --all --oneline | wc -l; "
        "ls /r2e_tests; find / -name 'test_1.py' 2> /dev/null; python -c 'open(\"/testbed/new.py\", \"w\")'; ls new.py"
    )
    for fix, won in (("true", False), ("cat > calc.py <<'END'\n" + FIXED + "END", True)):
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr("aem_jax.envs.swe.env.load_task", lambda _: (row, files_checkout({})))
            env.reset({})
        seen = env.step(block("execute_bash", command=look)).observation
        assert seen.split("\n")[:3] == ["1000", "/testbed/.venv/bin/python", "42"], seen
        assert "1" in seen.split() and "new.py" in seen
        assert not [word for word in ("test_1", "run_tests") if word in seen], seen
        env.step(block("execute_bash", command=fix))
        finished = env.step(block("finish"))
        assert (finished.info["won"], finished.reward) == (won, float(won)), finished
    env.close()
    limits = Limits(seconds=60, disk_mib=256)
    for name in ("gold", "wrong"):
        patch, right = PATCHES[name]
        report = formats.grade(row, row.patch if patch is None else patch, runtime, files_checkout({}), limits=limits)
        assert report.resolved == right, (name, report.log)
    assert not server.pods
    annotations = {pod["metadata"]["annotations"]["aem-jax/instance"] for pod in server.created}
    assert row.instance_id in annotations


def test_tasks_without_an_image_are_graded(runtime):
    assert grade(INSTANCE, GOLD, runtime, CHECKOUT, limits=LIMITS).resolved
    assert not grade(INSTANCE, "", runtime, CHECKOUT, limits=LIMITS).resolved


def test_many_workspaces_at_a_time_are_one_workspace_each(runtime, server):
    def play(number: int) -> str:
        workspace = runtime.open(INSTANCE, CHECKOUT, limits=LIMITS)
        try:
            workspace.run(f"echo {number} > mine")
            return "".join(workspace.run("cat mine").output for _ in range(3))
        finally:
            workspace.close()

    server.max_pods = 3  # two of five wait for the quota
    with ThreadPoolExecutor(5) as pool:
        assert list(pool.map(play, range(5))) == [f"{number}\n" * 3 for number in range(5)]
    assert not server.pods


def test_the_network_must_be_denied(server):
    server.policies = []
    with pytest.raises(SandboxError, match=r"expected a NetworkPolicy in the namespace .* kubectl apply -f deploy/"):
        make()
    server.reset()
    server.node.enforces_policies = False
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(kubernetes.time, "sleep", lambda seconds: None)
        open_runtime = make()
        with pytest.raises(SandboxError, match="a pod reached the API server: the cluster's network plugin does not"):
            open_runtime.open(INSTANCE, CHECKOUT, limits=LIMITS)
    open_runtime.close()
    assert not server.pods


def test_a_cluster_that_cannot_be_used_is_refused(server, tmp_path):
    with pytest.raises(SandboxError, match=r"namespace 'other' cannot be used: .* answered 404.* deploy/sandboxes"):
        make(namespace="other")
    text = server.kubeconfig.read_text()
    (tmp_path / "wrong").write_text(text.replace("test-token", "another"))
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("KUBECONFIG", str(tmp_path / "wrong"))
        with pytest.raises(SandboxError, match="answered 401: Unauthorized"):
            make()
        patched.setenv("KUBECONFIG", str(tmp_path / "missing"))
        with pytest.raises(SandboxError, match="no Kubernetes configuration can be read"):
            make()
        patched.setitem(sys.modules, "kubernetes.client", None)
        with pytest.raises(SandboxError, match=r"pip install 'aem_jax\[kubernetes\]'"):
            choose.choose_runtime("kubernetes")
    with pytest.raises(SandboxError, match="no Kubernetes configuration can be read.*nowhere"):
        make(context="nowhere")
    assert isinstance(choose.choose_runtime("kubernetes"), Kubernetes)
    with pytest.raises(ValueError, match="podman, kubernetes, got 'k8s'"):
        choose.choose_runtime("k8s")


def test_a_pod_that_does_not_start_says_why(runtime, server):
    bare = Kubernetes(KubernetesConfig(), ContainerConfig())
    with pytest.raises(SandboxError, match="expected an image for 'own__calc-1', which names none"):
        bare.open(INSTANCE, CHECKOUT)
    hasty = make(start_s=1)
    server.node.unschedulable = "0/3 nodes are available: insufficient cpu"
    with pytest.raises(SandboxError, match=r"did not start within 1 s \(--swe.kubernetes.start-s\): Unsch.* cpu"):
        hasty.open(INSTANCE, CHECKOUT)
    server.reset()
    with pytest.raises(SandboxError, match='within 1 s .*: ImagePullBackOff Back-off pulling image "own/missing"'):
        hasty.open(dataclasses.replace(INSTANCE, image="own/missing"), CHECKOUT)
    server.max_pods = 0
    with pytest.raises(SandboxError, match="answered 403: .*exceeded quota"):
        hasty.open(INSTANCE, CHECKOUT)
    hasty.close()
    server.reset()
    with pytest.raises(SandboxError, match="did not start: Error the image has no folder /calc"):
        runtime.open(dataclasses.replace(INSTANCE, image="base", workdir="/calc"), CHECKOUT)
    assert not server.pods


def test_a_busy_server_is_asked_again(runtime, server):
    server.refuse = 3
    runtime.open(INSTANCE, CHECKOUT, limits=LIMITS).close()
    assert server.refuse == 0 and not server.pods


def kill_pod(server, workspace, container: str, status: dict) -> None:
    """The first process of a pod is killed from outside while a command runs; the node gives these reasons."""
    server.node.end_reason, server.node.end_status = container, status
    pod = server.pods[workspace._pod]
    threading.Timer(0.5, pod.main.kill).start()


@pytest.mark.parametrize(
    ("reason", "status", "notice"),
    [
        ("OOMKilled", {}, "(OOMKilled)"),
        ("Error", {"reason": "Evicted", "message": "Usage of EmptyDir exceeds"}, "(Usage of EmptyDir exceeds)"),
    ],
)
def test_code_that_ends_its_pod_loses_its_episode(server, workspace, reason, status, notice):
    kill_pod(server, workspace, reason, status)
    outcome = workspace.run("sleep 60")
    assert (outcome.exit_code, outcome.timed_out) == (None, False)
    assert outcome.notice == f"the sandbox was ended by what ran in it {notice}"
    assert workspace.run("echo").notice == outcome.notice
    assert not server.pods


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (
            {"reason": "Evicted", "message": "The node was low on resource: memory"},
            "outside: Evicted The node was",
        ),
        ({"reason": "DeadlineExceeded"}, "was ended from outside: DeadlineExceeded"),
        ({"conditions": [{"type": "DisruptionTarget", "status": "True"}]}, "ended from outside: disruption"),
    ],
)
def test_a_pod_that_the_cluster_ends_is_no_verdict(server, workspace, status, message):
    kill_pod(server, workspace, "Error", status)
    with pytest.raises(SandboxError, match=message):
        workspace.run("sleep 60")


def test_a_pod_that_is_gone_or_cannot_be_reached_is_no_verdict(server, runtime, monkeypatch):
    workspace = runtime.open(INSTANCE, CHECKOUT, limits=LIMITS)
    server.pods.pop(workspace._pod).delete()
    with pytest.raises(SandboxError, match="was deleted from outside while it was used"):
        workspace.run("echo")
    workspace = runtime.open(INSTANCE, CHECKOUT, limits=LIMITS)
    server.cut_off = True
    monkeypatch.setattr(kubernetes, "ENDED_S", 0.5)
    with pytest.raises(SandboxError, match="cannot be reached: .* (the connection|did not run to its end)"):
        workspace.run("sleep 60")
    workspace.close()
    assert not server.pods


def test_a_lease_owns_the_pods_of_a_process(server, runtime):
    own = make()
    workspace = own.open(INSTANCE, CHECKOUT, limits=LIMITS)
    (owner,) = server.created[-1]["metadata"]["ownerReferences"]
    lease = server.leases[owner["name"]]
    assert (owner["kind"], owner["uid"]) == ("Lease", lease["metadata"]["uid"])
    assert server.pods[workspace._pod].manifest["metadata"]["namespace"] == NAMESPACE
    # a renewal of another process finds it expired
    old = datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=400)
    lease["spec"]["renewTime"] = old.strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    runtime._cluster._lease._renew()
    assert owner["name"] not in server.leases and not server.pods
    # a process that was only slow makes its lease anew
    own._cluster._lease._renew()
    assert server.leases[owner["name"]]["metadata"]["uid"] != owner["uid"]
    own.open(INSTANCE, CHECKOUT, limits=LIMITS)
    own.close()
    assert owner["name"] not in server.leases and not server.pods


SERVER = """
import sys
from envs.swe.sandboxes import CHECKOUT, INSTANCE
from aem_jax.envs.swe.sandbox.containers import ContainerConfig
from aem_jax.envs.swe.sandbox.kubernetes import Kubernetes
from aem_jax.envs.swe.sandbox.pods import KubernetesConfig
Kubernetes(KubernetesConfig(), ContainerConfig(image="base")).open(INSTANCE, CHECKOUT)
print("opened", flush=True)
sys.stdin.read()
"""


def test_a_process_that_ends_leaves_no_pod(server):
    here = [str(Path(__file__).parents[number]) for number in (3, 4)]
    path = os.pathsep.join([*here, os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", SERVER]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env={**os.environ, "PYTHONPATH": path}) as child:
        assert child.stdout and child.stdin and child.stdout.readline() == "opened\n"
        assert len(server.pods) == 1
        child.stdin.close()
        assert child.wait(30) == 0
    assert not server.pods
