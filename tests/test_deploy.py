"""deploy/: scripts parse, requeue and pass on their arguments; manifests have the fields that their readers need."""

import importlib
import json
import math
import re
import subprocess
import time
import tomllib
import types
from datetime import datetime, timedelta
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from command_lines import commands, unknown_options

from aem_jax.distributed import join
from aem_jax.envs.swe.sandbox.lease import LABELS
from aem_jax.envs.swe.sandbox.pods import KubernetesConfig, open_network, read_template

REPOSITORY = Path(__file__).resolve().parents[1]
DEPLOY = REPOSITORY / "deploy"
SCRIPTS = [DEPLOY / "slurm.sbatch", DEPLOY / "tpu_vm.sh"]
DOCKERFILES = sorted(DEPLOY.glob("Dockerfile.*"))
HOW_TO = {
    "slurm.sbatch": "slurm.md",
    "tpu_vm.sh": "tpu_vm.md",
    "gke_jobset.yaml": "gke.md",
    "gke_gpu_jobset.yaml": "gke.md",
    "skypilot.yaml": "skypilot.md",
    "Dockerfile.cuda": "container.md",
    "Dockerfile.tpu": "container.md",
    **{f"sandbox{name}.yaml": "kubernetes.md" for name in ("es", "_pod", "_images", "_gvisor")},
}


def fake(folder: Path, name: str, body: str) -> None:
    """A fake of another system's program, on the test's PATH."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
    (folder / name).chmod(0o755)


def run(script: Path, *words: str, programs: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    path = f"{programs}:/usr/bin:/bin"
    return subprocess.run(
        ["bash", str(script), *words], capture_output=True, text=True, cwd=REPOSITORY, env={"PATH": path, **environment}
    )


def test_every_file_of_deploy_is_documented():
    assert {path.name for path in DEPLOY.iterdir()} == set(HOW_TO)
    for name, page in HOW_TO.items():
        assert f"(../../deploy/{name})" in (REPOSITORY / "docs" / "howto" / page).read_text(), (name, page)


@pytest.mark.parametrize("path", sorted(DEPLOY.iterdir()), ids=lambda path: path.name)
def test_options_of_the_package_exist(path: Path):
    for words in commands(path.read_text()):
        assert unknown_options(words) == [], words


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse(path: Path):
    subprocess.run(["bash", "-n", str(path)], check=True)


def test_slurm_has_a_task_for_each_gpu():
    directives = dict(re.findall(r"^#SBATCH --([\w-]+)=?(\S*)$", (DEPLOY / "slurm.sbatch").read_text(), re.MULTILINE))
    assert directives["ntasks-per-node"] == directives["gpus-per-node"]
    assert re.fullmatch(r"TERM@\d+", directives["signal"]) and "requeue" in directives
    text = (DEPLOY / "slurm.sbatch").read_text()
    last = max(match.start() for match in re.finditer(r"^#SBATCH", text, re.MULTILINE))
    assert not re.search(r"^[^#\n]", text[:last], re.MULTILINE), "SLURM reads directives up to the first command"


def in_slurm(
    folder: Path, *statuses: int, minutes_left: float = 600, preempted: str = "None", **environment: str
) -> tuple[int, bool, str]:
    """(the job's status, whether it requeues, its output), of tasks with these statuses.

    As in SLURM, srun ends with the highest status of its tasks, and `--signal` comes before the job's time limit.
    """
    end = datetime.now() + timedelta(minutes=minutes_left)
    job = f"JobId=7 JobName=aem RunTime=01:00:00 TimeLimit=1-00:00:00 EndTime={end:%Y-%m-%dT%H:%M:%S} Deadline=N/A"
    job += f" PreemptEligibleTime=2026-01-01T00:00:00 PreemptTime={preempted} SuspendTime=None"
    fake(folder / "bin", "srun", f'echo "srun $*"; exit {max(statuses)}')
    fake(folder / "bin", "scontrol", f'echo "scontrol $*"; [ "$1" != show ] || echo "{job}"')
    variables = {"SLURM_SUBMIT_DIR": "/home/me", "SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "8"} | environment
    result = run(DEPLOY / "slurm.sbatch", "--seed", "1", programs=folder / "bin", **variables)
    return result.returncode, "scontrol requeue 7" in result.stdout, result.stdout + result.stderr


LOST = join.PEER_FAILED


@pytest.mark.parametrize(
    ("statuses", "again"),
    [
        ((0, 0), False),
        ((2, 2), False),  # refused
        ((1, 1), False),  # an exception in one task, which the others were told of
        ((130, 130), False),
        ((LOST, 137), True),  # killed
        ((LOST, 139), True),
        ((LOST, 253), True),  # out of memory, in SLURM's words
        ((134, 137), True),  # task 0 killed, and the others aborted by JAX
        ((134, 0), True),
        ((LOST, LOST), True),  # a node that is silent
    ],
)
def test_slurm_requeues_lost_runs(tmp_path: Path, statuses: tuple[int, ...], again: bool):
    status, requeued, output = in_slurm(tmp_path, *statuses)
    assert (status, requeued) == (max(statuses), again)
    assert "srun --cpus-per-task=8 --kill-on-bad-exit=0 /home/me/.venv/bin/python -m aem_jax.launch" in output
    assert "aem_jax.launch --runs-dir /home/me/runs --seed 1" in output


def test_slurm_gives_up_a_run_that_is_lost_again_and_again(tmp_path: Path):
    assert in_slurm(tmp_path, LOST, 137, SLURM_RESTART_COUNT="19")[1]
    status, requeued, output = in_slurm(tmp_path, LOST, 137, SLURM_RESTART_COUNT="20")
    assert (status, requeued) == (137, False) and "lost with status 137 after 20 restarts" in output
    assert in_slurm(tmp_path, LOST, 137, SLURM_RESTART_COUNT="20", MAX_RESTARTS="50")[1]


def test_slurm_requeues_what_it_stopped_itself(tmp_path: Path):
    """SIGTERM from the time limit or a preemption; a stop that somebody asked for is final."""
    assert in_slurm(tmp_path, 143, 143, minutes_left=8)[:2] == (143, True)
    assert in_slurm(tmp_path, 143, 143, minutes_left=8, SLURM_RESTART_COUNT="30")[1]
    assert in_slurm(tmp_path, 143, 143)[:2] == (143, False)
    assert in_slurm(tmp_path, 143, 143, preempted="2026-11-30T11:00:00")[1]


def test_tpu_vm_runs_the_same_command_on_all_hosts(tmp_path: Path):
    fake(tmp_path / "bin", "gcloud", 'printf "%s\\n" "$@"')
    script, words = DEPLOY / "tpu_vm.sh", ["--preset", "alfworld-tiny", "--name", "two words"]
    result = run(script, "train", "my-slice", "us-east5-a", *words, programs=tmp_path / "bin")
    assert result.returncode == 0, result.stderr
    target, command = result.stdout.splitlines()[:7], result.stdout
    assert target == ["compute", "tpus", "tpu-vm", "ssh", "my-slice", "--zone=us-east5-a", "--worker=all"]
    assert r"-m aem_jax.launch --runs-dir /runs --preset alfworld-tiny --name two\ words >>log" in command
    create = run(script, "create", "my-slice", "us-east5-a", "v5p-32", "v2-alpha-tpuv5", programs=tmp_path / "bin")
    assert create.stdout.splitlines()[3:] == [
        *("create", "my-slice", "--zone=us-east5-a", "--accelerator-type=v5p-32", "--version=v2-alpha-tpuv5")
    ]
    for mistake in ([], ["train", "my-slice"], ["dance", "my-slice", "us-east5-a"], ["create", "a", "b"]):
        assert run(script, *mistake, programs=tmp_path / "bin").returncode == 2


def test_a_run_on_tpu_vms_outlives_the_connection_until_it_is_stopped(tmp_path: Path):
    """The commands of the hosts, run here: a fake gcloud, and a fake Python that ends its step."""
    host, programs = tmp_path / "host", tmp_path / "bin"
    fake(programs, "gcloud", f'cd {host} || exit 1; for word; do :; done; exec bash -c "${{word#--command=}}"')
    (host / "aem_jax" / ".venv").mkdir(parents=True)
    step = "trap 'echo saved; exit 143' TERM; echo \"$HF_TOKEN: $*\"; for i in $(seq 300); do sleep 0.1; done"
    fake(host / "aem_jax" / ".venv" / "bin", "python", step)
    act = lambda action, *words: run(
        DEPLOY / "tpu_vm.sh", action, "a", "b", *words, programs=programs, HF_TOKEN="my token"
    )
    assert act("train", "--name", "two words").returncode == 0  # at once
    log = host / "aem_jax" / "log"
    deadline = time.monotonic() + 60
    while not (log.exists() and log.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    again = act("train")
    assert again.returncode == 1 and "a run is under way" in again.stderr
    stopped = act("stop")
    assert stopped.returncode == 0
    assert log.read_text() == stopped.stdout == "my token: -m aem_jax.launch --runs-dir /runs --name two words\nsaved\n"
    assert act("stop").returncode == 1


@pytest.mark.parametrize("name", ["gke_jobset.yaml", "gke_gpu_jobset.yaml"])
def test_jobset_is_one_pod_a_host(name: str):
    manifest = objects(name)["JobSet"]
    assert manifest["apiVersion"] == "jobset.x-k8s.io/v1alpha2"
    assert re.fullmatch(r"[a-z0-9-]+", manifest["metadata"]["name"])
    (group,) = manifest["spec"]["replicatedJobs"]
    policy = manifest["spec"]["failurePolicy"]
    assert policy["maxRestarts"] > 0
    job = group["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    # A reported error (1, 2) ends the job set; a lost or stopped pod (75, 134, 137, 143) starts all of them again.
    (final,) = policy["rules"]
    assert final["action"] == "FailJobSet" and final["onJobFailureReasons"] == ["PodFailurePolicy"]
    assert final["targetReplicatedJobs"] == [group["name"]]
    (rule,) = job["podFailurePolicy"]["rules"]
    codes = {"containerName": container["name"], "operator": "In", "values": [1, 2]}
    assert rule == {"action": "FailJob", "onExitCodes": codes}
    ((resource, devices),) = container["resources"]["limits"].items()
    if resource == "google.com/tpu":
        chips = math.prod(map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")))
        assert job["parallelism"] == chips // devices
    assert job["parallelism"] == job["completions"] and job["completionMode"] == "Indexed"
    # A failed pod ends the job, and the job set restarts all pods.
    assert job["backoffLimit"] == 0 and pod["restartPolicy"] == "Never" and group["replicas"] == 1
    assert [mount["name"] for mount in container["volumeMounts"]] == [volume["name"] for volume in pod["volumes"]]
    assert container["command"] == ["python", "-m", "aem_jax.launch"]
    arguments = container["args"]
    assert all(isinstance(word, str) for word in arguments) and unknown_options(arguments) == []
    assert arguments[arguments.index("--runs-dir") + 1] == container["volumeMounts"][0]["mountPath"]
    assert "--name" in arguments


def test_pods_of_gpus_may_ask_for_their_job():
    """JAX's K8sCluster lists pods to find its own, and gets the job for its parallelism."""
    found = objects("gke_gpu_jobset.yaml")
    rights = {(*rule["apiGroups"], *rule["resources"]): set(rule["verbs"]) for rule in found["Role"]["rules"]}
    assert rights == {("", "pods"): {"get", "list"}, ("batch", "jobs"): {"get"}}
    assert {item["metadata"]["namespace"] for item in found.values()} == {"default"}
    account = found["ServiceAccount"]["metadata"]["name"]
    assert [subject["name"] for subject in found["RoleBinding"]["subjects"]] == [account]
    assert found["RoleBinding"]["roleRef"]["name"] == found["Role"]["metadata"]["name"]
    (group,) = found["JobSet"]["spec"]["replicatedJobs"]
    assert group["template"]["spec"]["template"]["spec"]["serviceAccountName"] == account


def test_skypilot_has_the_fields_of_a_task():
    task = yaml.safe_load((DEPLOY / "skypilot.yaml").read_text())
    assert set(task) == {"name", "resources", "num_nodes", "workdir", "envs", "setup", "run"}
    assert re.fullmatch(r"\w+:\d+", task["resources"]["accelerators"]) and task["num_nodes"] == 1
    for name in ("setup", "run"):
        subprocess.run(["bash", "-n"], input=task[name], text=True, check=True)
    used = set(re.findall(r"\$(\w+)", task["run"]))
    assert used == set(task["envs"])
    assert len(commands(task["run"])) == 2


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_dockerfiles_copy_existing_files_and_install_an_extra(path: Path):
    text = re.sub(r"^#.*\n", "", path.read_text(), flags=re.MULTILINE)
    lines = [line for line in re.sub(r"\\\n\s*", " ", text).splitlines() if line.strip()]
    steps = [line.split(maxsplit=1) for line in lines]
    known = {"FROM", "RUN", "WORKDIR", "COPY", "USER", "ENV", "VOLUME", "ENTRYPOINT", "CMD"}
    assert {name for name, _ in steps} <= known and steps[0][0] == "FROM"
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    python = re.fullmatch(r"python:(\d\.\d+)-slim-\w+", steps[0][1])
    assert python and f"Programming Language :: Python :: {python[1]}" in project["classifiers"]

    copied = [source for name, words in steps if name == "COPY" for source in words.split()[:-1]]
    let_through = (REPOSITORY / ".dockerignore").read_text().splitlines()
    assert all((REPOSITORY / source).exists() and f"!{source}" in let_through for source in copied)
    (install,) = [words for name, words in steps if name == "RUN" and "pip install" in words]
    (extras,) = re.findall(r"'\.\[([\w,]+)\]'", install)
    assert set(extras.split(",")) <= set(project["optional-dependencies"]) and "--constraint constraints.txt" in install
    for name, words in steps:
        if name == "RUN":
            subprocess.run(["bash", "-n"], input=words, text=True, check=True)

    last = dict(steps)  # of each instruction
    assert last["USER"] != "root"
    assert json.loads(last["ENTRYPOINT"]) == ["python", "-m", "aem_jax.launch"]
    assert unknown_options(json.loads(last["CMD"])) == []
    assert json.loads(last["VOLUME"])[0] == json.loads(last["CMD"])[-1] == "/runs"


SANDBOXES = sorted(DEPLOY.glob("sandbox*.yaml"))


def objects(name: str) -> dict[str, dict]:
    """The objects of a manifest, by kind."""
    return {item["kind"]: item for item in yaml.safe_load_all((DEPLOY / name).read_text())}


@pytest.mark.parametrize("path", SANDBOXES, ids=lambda path: path.name)
def test_manifests_follow_the_schemas(path: Path):
    """By the published schemas where they are installed, else by the official client's classes."""
    validate = pytest.importorskip("kubernetes_validate") if find_spec("kubernetes_validate") else None
    if validate is None and not find_spec("kubernetes"):
        pytest.skip("neither kubernetes-validate nor kubernetes is installed")
    for item in yaml.safe_load_all(path.read_text()):
        if validate is not None:
            validate.validate(item, desired_version=validate.latest_version(), strict=True)
            continue
        client = importlib.import_module("kubernetes.client")
        if path.name == "sandbox_pod.yaml":
            item["spec"]["containers"][0]["image"] = "from/the/task"
        response = types.SimpleNamespace(data=json.dumps(item), status=200, getheader=lambda *a: "application/json")
        kind = f"V1{item['kind']}"
        made = client.ApiClient().deserialize(response, kind)
        assert client.ApiClient().sanitize_for_serialization(made) == item


def test_sandboxes_have_no_network_and_a_run_has_its_rights():
    found = objects("sandboxes.yaml")
    namespace = KubernetesConfig().namespace
    assert found["Namespace"]["metadata"]["name"] == namespace
    named = {kind: item["metadata"].get("namespace") for kind, item in found.items()}
    assert {kind for kind, name in named.items() if name == namespace} == set(found) - {"Namespace", "ServiceAccount"}
    assert open_network([found["NetworkPolicy"]], LABELS) == ""
    rights = {rule["resources"][0]: set(rule["verbs"]) for rule in found["Role"]["rules"]}
    assert rights == {
        "pods": {"create", "get", "list", "watch", "delete"},
        "pods/exec": {"create", "get"},
        "leases": {"create", "get", "list", "patch", "delete"},
        "networkpolicies": {"list"},
    }
    (subject,) = found["RoleBinding"]["subjects"]
    assert subject["name"] == found["ServiceAccount"]["metadata"]["name"]


def test_the_pod_template_fits_a_sandbox():
    template = read_template(str(DEPLOY / "sandbox_pod.yaml"))
    assert (
        template["spec"]["nodeSelector"] == objects("sandbox_gvisor.yaml")["RuntimeClass"]["scheduling"]["nodeSelector"]
    )
    images = objects("sandbox_images.yaml")["DaemonSet"]["spec"]["template"]["spec"]
    for name in ("nodeSelector", "tolerations"):
        assert images[name] == template["spec"][name]
