"""The command lines of docker and podman, recorded by a fake executable; test_engines.py uses a real engine."""

import dataclasses
import json
import sys
import tarfile

import pytest
from envs.swe.sandboxes import CHECKOUT, INSTANCE, QUICK

from aem_jax.envs.swe.r2e import R2EInstance
from aem_jax.envs.swe.sandbox.containers import ContainerConfig, Containers, probe, run_arguments
from aem_jax.envs.swe.sandbox.workspace import Limits, SandboxError, WorkspaceError

# Records its arguments. `exec` runs only the commands below; an image's /testbed has one file.
ENGINE = f"""#!{sys.executable}
import json, os, sys, time
arguments = sys.argv[1:]
with open(os.path.dirname(sys.argv[0]) + "/log", "a") as log:
    print(json.dumps(arguments), file=log)
words = " ".join(arguments)
if os.path.exists(os.path.dirname(sys.argv[0]) + "/broken"):
    sys.exit("Cannot connect to the Docker daemon")
if arguments[0] == "run":
    print("started", flush=True); sys.stdin.read()
elif arguments[0] == "cp":
    open(arguments[2] + "/from_image.py", "w").write("x = 1\\n")
elif "tar --extract" in words:
    open(os.path.dirname(sys.argv[0]) + "/unpacked.tar", "wb").write(sys.stdin.buffer.read())
elif "kill -KILL" in words:
    sys.exit(137 if os.path.exists(os.path.dirname(sys.argv[0]) + "/stuck") else 1)
elif "head -c" in words:
    sys.exit("no such file") if "nothing" in words else sys.stdout.buffer.write(b"\\0data")
elif "cat >" in words:
    open(os.path.dirname(sys.argv[0]) + "/written", "wb").write(sys.stdin.buffer.read())
elif "sleep 99" in words:
    print("begun", flush=True); time.sleep(99)
elif "echo" in words:
    print("out", flush=True); print("err", file=sys.stderr); sys.exit(3)
"""


@pytest.fixture
def engine(tmp_path):
    path = tmp_path / "engine"
    path.write_text(ENGINE)
    path.chmod(0o755)
    return path


def calls(engine) -> list[list[str]]:
    return [json.loads(line) for line in (engine.parent / "log").read_text().splitlines()]


def test_processor_time_is_limited_if_a_limit_is_set():
    commands = [run_arguments("docker", "name", "image", Limits(cpu_seconds=seconds), 2) for seconds in (0, 7)]
    assert ["cpu=7:7" in words for words in commands] == [False, True]


def test_podman_does_not_copy_the_images_files():
    for engine, count in (("docker", 0), ("podman", 2)):  # docker does not, and has no such option
        assert " ".join(run_arguments(engine, "name", "image", QUICK, 2)).count(",notmpcopyup") == count


def test_a_container_for_an_instance_without_an_image(engine):
    runtime = Containers("docker", ContainerConfig(image="python:3.11", prelude=""), str(engine))
    workspace = runtime.open(INSTANCE, CHECKOUT, limits=QUICK)
    run, permit, unpack, kill = calls(engine)
    container = run[run.index("--name") + 1]
    words = " ".join(run)
    for expected in (
        *("--rm", "--network none", "--cap-drop ALL", "--security-opt no-new-privileges", "--read-only"),
        *(
            "--stop-signal KILL",
            "--user 0:0",
            "--pids-limit 36",
            "--memory 288m",
            "--memory-swap 288m",
            "--shm-size 4m",
            "--cpus 2",
        ),
        *("--ulimit core=0:0", "--ulimit fsize=8388608:8388608", "--oom-score-adj 1000", "--ipc private"),
        "--tmpfs /testbed:rw,exec,nosuid,nodev,mode=1777,size=24m",
        "--tmpfs /tmp:rw,exec,nosuid,nodev,mode=1777,size=4m",
    ):
        assert f" {expected} " in words, expected
    assert run[-5:-2] == ["--entrypoint", "bash", "python:3.11"]
    assert not {"--privileged", "--volume", "-v", "--mount", "--device", "--cap-add"} & set(run)
    assert permit == ["exec", "--user", "0:0", container, "chmod", "1777", "/testbed", "/tmp"]
    assert unpack[:5] == ["exec", "--interactive", "--user", "1000:1000", container] and unpack[5] == "tar"
    with tarfile.open(engine.parent / "unpacked.tar") as archive:
        assert {"./calc.py", "./.git/HEAD"} <= set(archive.getnames())
    assert kill == ["exec", "--user", "1000:1000", container, "bash", "-c", "kill -KILL -1"]
    workspace.close()
    workspace.close()
    assert calls(engine)[4:] == [["rm", "--force", container]]


def test_the_repository_comes_from_the_instances_image(engine):
    runtime = Containers("podman", ContainerConfig(), str(engine))
    instance = dataclasses.replace(INSTANCE, image="swebench/x:latest")
    runtime.open(instance, CHECKOUT, limits=QUICK).close()
    create, copy, remove, run = calls(engine)[:4]
    assert create[:3] == ["create", "--network", "none"] and create[-2:] == ["swebench/x:latest", "true"]
    assert copy[0] == "cp" and copy[1] == f"{create[4]}:/testbed/." and remove == ["rm", "--force", create[4]]
    assert "swebench/x:latest" in run
    with tarfile.open(engine.parent / "unpacked.tar") as archive:
        assert "./from_image.py" in archive.getnames()
    forget = calls(engine)[7]
    assert "rm -rf .git" in forget[7] and forget[-1] == INSTANCE.base_commit
    runtime.open(instance, CHECKOUT, limits=QUICK).close()
    assert [call[0] for call in calls(engine)].count("create") == 1


def test_hidden_tests_in_an_images_root_are_moved_and_masked(engine):
    runtime = Containers("docker", ContainerConfig(), str(engine))
    row = R2EInstance("id", "own/calc", "a" * 40, "", "", "own/image", "b" * 40, (("test_a", "PASSED"),))
    runtime.open(row, CHECKOUT, limits=QUICK).close()
    _, testbed, tests, _, run = calls(engine)[:5]
    assert testbed[1].endswith(":/testbed/.") and tests[1].endswith(":/r2e_tests/.")
    assert tests[2] == f"{testbed[2]}/r2e_tests"
    assert "--tmpfs /r2e_tests:ro,noexec,nosuid,nodev,mode=0000,size=64k" in " ".join(run)
    with tarfile.open(engine.parent / "unpacked.tar") as archive:
        assert {"./from_image.py", "./r2e_tests/from_image.py"} <= set(archive.getnames())


def test_commands_files_and_deadlines_use_the_engine(engine):
    runtime = Containers("docker", ContainerConfig(image="x", prelude="prepare"), str(engine))
    workspace = runtime.open(INSTANCE, CHECKOUT, limits=QUICK)
    outcome = workspace.run("echo")
    assert (outcome.exit_code, sorted(outcome.output.split()), outcome.timed_out) == (3, ["err", "out"], False)
    assert calls(engine)[-2][5:] == ["bash", "-c", "prepare\necho"]
    late = workspace.run("sleep 99", limits=dataclasses.replace(QUICK, seconds=4))
    assert (late.exit_code, late.timed_out) == (None, True) and late.output in ("", "begun\n")
    assert calls(engine)[-1][-1] == "kill -KILL -1"
    assert workspace.read("file") == b"\0data"
    with pytest.raises(WorkspaceError, match="could not read 'nothing': no such file"):
        workspace.read("nothing")
    workspace.write("file", b"\0written")
    assert (engine.parent / "written").read_bytes() == b"\0written"
    workspace.close()


def test_a_container_whose_processes_cannot_be_killed_is_removed(engine):
    workspace = Containers("docker", ContainerConfig(image="x"), str(engine)).open(INSTANCE, CHECKOUT, limits=QUICK)
    (engine.parent / "stuck").touch()
    assert workspace.run("echo").notice == "the sandbox was ended by what ran in it"
    assert calls(engine)[-1][:2] == ["rm", "--force"]
    assert workspace.run("echo").exit_code is None


def test_a_missing_image_or_engine_is_refused(engine):
    with pytest.raises(SandboxError, match="expected an image for 'own__calc-1'"):
        Containers("docker", ContainerConfig(), str(engine)).open(INSTANCE, CHECKOUT)
    (engine.parent / "broken").touch()
    with pytest.raises(SandboxError, match="status 1: Cannot connect to the Docker daemon"):
        Containers("docker", ContainerConfig(image="x"), str(engine)).open(INSTANCE, CHECKOUT)
    assert "Cannot connect" in probe(str(engine))
    assert probe("no-such-engine") == "there is no `no-such-engine` on the PATH"
