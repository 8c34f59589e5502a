"""Workspaces in containers of a real engine. They need the name of an image with bash, git, tar, python and pytest:

AEM_JAX_TEST_ENGINE=podman AEM_JAX_TEST_IMAGE=localhost/debian-pytest \
    make test ARGS=tests/envs/swe/sandbox/test_engines.py
"""

import dataclasses
import os
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
from envs.swe.sandboxes import CHECKOUT, FILES, GOLD, INSTANCE

from aem_jax.envs.swe import check
from aem_jax.envs.swe.grading import grade
from aem_jax.envs.swe.repos import files_checkout
from aem_jax.envs.swe.sandbox.containers import ContainerConfig, Containers
from aem_jax.envs.swe.sandbox.workspace import Limits
from aem_jax.envs.swe.tasks import generated_tasks

ENGINE, IMAGE = os.environ.get("AEM_JAX_TEST_ENGINE", "podman"), os.environ.get("AEM_JAX_TEST_IMAGE", "")
pytestmark = pytest.mark.skipif(not IMAGE, reason="AEM_JAX_TEST_IMAGE names no image for docker or podman")

LIMITS = Limits(seconds=60, memory_mib=256, processes=32, file_mib=8, disk_mib=32, output_bytes=4096)


def engine(*words: str) -> str:
    return subprocess.run([ENGINE, *words], capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def runtime() -> Containers:
    return Containers("podman" if "podman" in ENGINE else "docker", ContainerConfig(image=IMAGE), ENGINE)


@pytest.fixture
def workspace(runtime: Containers):
    workspace = runtime.open(INSTANCE, CHECKOUT, limits=LIMITS)
    yield workspace
    began = time.monotonic()
    workspace.close()
    assert time.monotonic() - began < 9  # an engine that sends SIGTERM first takes ten seconds
    assert workspace._container not in engine("ps", "--all", "--format", "{{.Names}}")


def test_a_command_sees_the_repository_and_its_user(workspace):
    outcome = workspace.run("id -u; pwd; git status --short; git log --oneline | wc -l; ls; echo err >&2; exit 3")
    assert (outcome.exit_code, outcome.timed_out, outcome.notice) == (3, False, "")
    assert outcome.output.split() == ["1000", "/testbed", "1", *sorted(FILES), "err"]
    assert workspace.run("echo changed > calc.py; sleep 300 & echo begun").output == "begun\n"
    left = workspace.run("cat calc.py; set -- /proc/[0-9]*; echo $#")
    assert left.output.split() == ["changed", "2"]  # the first process and this shell
    assert len(workspace.run("yes | head -c 100000").output) < 5000
    assert workspace.run("cat", stdin=b"given").output == "given"


def test_files_are_written_and_read(workspace):
    workspace.write("new/file", b"\0data")
    assert workspace.read("/testbed/new/file") == b"\0data"
    assert workspace.run("stat -c %s new/file").output == "5\n"


def test_limits_are_enforced(workspace):
    late = workspace.run("sleep 300", limits=dataclasses.replace(LIMITS, seconds=2))
    assert (late.exit_code, late.timed_out) == (None, True) and "not done after 2 s" in late.notice
    for attempt in (
        "python3 -c 'bytearray(10**9)'",
        "head -c 10000000 /dev/zero > large",
        "for i in 1 2 3 4 5; do head -c 8000000 /dev/zero > $i || exit 1; done",
        "touch /usr/x",
        "touch /var/tmp/x",
        "echo x > /proc/1/fd/2",
        "echo x > /proc/1/fd/0",
        "python3 -c 'import socket; socket.create_connection((\"1.1.1.1\", 53), 5)'",
    ):
        assert workspace.run(attempt).exit_code not in (0, None), attempt
    assert workspace.run("rm -f 1 2 3 4 5; echo well").output == "well\n"
    running = workspace.run("for i in $(seq 60); do sleep 60 & done 2> /dev/null; jobs -r | wc -l").output.split()
    assert not running or int(running[-1]) < 40
    # the engine cannot start the process that kills the others, so the container is removed
    after = workspace.run("echo well")
    assert after.output == "well\n" or after.notice == "the sandbox was ended by what ran in it"


def test_an_images_repository_has_no_history(runtime, tmp_path):
    CHECKOUT(INSTANCE, tmp_path)
    (tmp_path / "later.py").write_text("fixed = True\n")
    identity = ["-c", "user.name=x", "-c", "user.email=x@example.invalid"]
    for words in (["add", "."], [*identity, "commit", "--quiet", "-m", "the fix"], ["checkout", "-q", "HEAD~1"]):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True)
    name, image = f"aem-test-{uuid.uuid4().hex[:8]}", f"localhost/aem-test-{uuid.uuid4().hex[:8]}:latest"
    engine("create", "--name", name, IMAGE, "true")
    try:
        engine("cp", f"{tmp_path}/.", f"{name}:/testbed")
        engine("commit", name, image)
        instance = dataclasses.replace(INSTANCE, image=image)
        workspace = runtime.open(instance, files_checkout({}), limits=LIMITS)
        outcome = workspace.run(f"ls; git log --all --oneline | wc -l; git diff {instance.base_commit} && echo same")
        workspace.close()
        assert outcome.output.split() == [*sorted(FILES), "1", "same"], outcome
        assert grade(instance, GOLD, runtime, files_checkout({}), limits=LIMITS).resolved
        assert not grade(instance, "", runtime, files_checkout({}), limits=LIMITS).resolved
    finally:
        engine("rm", "--force", name)
        subprocess.run([ENGINE, "rmi", "--force", image], capture_output=True)


ORPHAN = """
import os, sys
from envs.swe.sandboxes import CHECKOUT, INSTANCE
from aem_jax.envs.swe.sandbox.containers import ContainerConfig, Containers
engine, image = sys.argv[1:]
runtime = Containers("podman" if "podman" in engine else "docker", ContainerConfig(image=image), engine)
workspace = runtime.open(INSTANCE, CHECKOUT)
print(workspace._container, flush=True)
workspace.run("sleep 1000")
"""


def test_a_container_does_not_outlive_a_killed_server():
    here = os.pathsep.join(str(Path(__file__).parents[number]) for number in (3, 4))
    environment = {**os.environ, "PYTHONPATH": here}
    command = [sys.executable, "-c", ORPHAN, ENGINE, IMAGE]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout
        name = process.stdout.readline().strip()
        assert name in engine("ps", "--format", "{{.Names}}")
        process.kill()
    deadline = time.monotonic() + 30
    while name in engine("ps", "--all", "--format", "{{.Names}}"):
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.parametrize("difficulty", ["easy", "hard"])
def test_tasks_are_graded_alike_in_all_runtimes(runtime, difficulty):
    assert check.problems(generated_tasks("test", [difficulty])[0], runtime) == []
