"""The command lines of docker and podman, recorded by a fake executable; test_engines.py uses a real engine."""

import dataclasses
import json
import subprocess
import sys
import tarfile

import pytest
from envs.swe.sandboxes import CHECKOUT, GOLD, INSTANCE, QUICK

from aem_jax.envs.swe.r2e import R2EInstance
from aem_jax.envs.swe.sandbox import images
from aem_jax.envs.swe.sandbox.admission import Admission, HostConfig
from aem_jax.envs.swe.sandbox.containers import ContainerConfig, Containers, run_arguments
from aem_jax.envs.swe.sandbox.engine import probe
from aem_jax.envs.swe.sandbox.host import Resource, owner
from aem_jax.envs.swe.sandbox.running import KILL
from aem_jax.envs.swe.sandbox.workspace import EngineError, Limits, SandboxError, WorkspaceError

# Records its arguments. `exec` runs only the commands below; an image's /testbed has one file.
ENGINE = f"""#!{sys.executable}
import json, os, sys, time
arguments = sys.argv[1:]
with open(os.path.dirname(sys.argv[0]) + "/log", "a") as log:
    print(json.dumps(arguments), file=log)
words = " ".join(arguments)
if os.path.exists(os.path.dirname(sys.argv[0]) + "/broken"):
    sys.exit("Cannot connect to the Docker daemon")
here = os.path.dirname(sys.argv[0])
if arguments[0] == "image":  # of the prepared images, those that were committed are there
    name = arguments[-1]
    there = name + "\\n" in open(here + "/images").read() if os.path.exists(here + "/images") else False
    sys.exit("no such image") if "aem-swe" in name and not there or "missing" in name else print("sha256:id")
elif arguments[0] == "commit":
    print(arguments[-1], file=open(here + "/images", "a"))
elif arguments[0] == "ps":
    print(open(here + "/ps").read() if os.path.exists(here + "/ps") else "Up 1 minute")
elif arguments[0] == "pull":
    sys.exit("there is no " + arguments[1])
elif "--storage-opt" in arguments and not os.path.exists(here + "/quota"):
    sys.exit("--storage-opt is supported only for overlay over xfs with 'pquota' mount option")
elif arguments[0] == "run" and "prepare" in arguments:
    sys.exit("the image has no folder /testbed" if "empty" in words else 0)
elif arguments[0] == "run":
    print("started", flush=True); sys.stdin.read()
elif arguments[0] == "cp":
    open(arguments[2] + "/from_image.py", "w").write("x = 1\\n")
elif "tar --extract" in words:
    open(os.path.dirname(sys.argv[0]) + "/unpacked.tar", "wb").write(sys.stdin.buffer.read())
elif "kill -KILL" in words:
    if os.path.exists(here + "/stuck"):
        sys.stderr.write(open(here + "/stuck").read()); sys.exit(137)
    print("kills"); sys.exit(1)
elif "./*" in words:  # packs a prepared repository
    sys.stdout.buffer.write(open(here + "/unpacked.tar", "rb").read())
elif "head -c" in words:
    sys.exit("no such file") if "nothing" in words else sys.stdout.buffer.write(b"\\0data")
elif "cat >" in words:
    open(os.path.dirname(sys.argv[0]) + "/written", "wb").write(sys.stdin.buffer.read())
elif "sleep 99" in words:
    print("begun", flush=True); time.sleep(99)
elif "echo" in words:
    print("out", flush=True); print("err", file=sys.stderr); sys.exit(3)
"""


MEMORY = {"memory_mib": Resource(8000, 8000)}


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
    runtime = Containers("docker", ContainerConfig(image="python:3.11", prelude="", storage="memory"), str(engine))
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
    assert permit[:6] == ["exec", "--user", "0:0", container, "bash", "-ec"]
    assert permit[6] == "cd /; chmod 1777 /tmp; find /tmp -mindepth 1 -delete; chmod 1777 /testbed"
    assert unpack[:5] == ["exec", "--interactive", "--user", "1000:1000", container] and unpack[5] == "tar"
    with tarfile.open(engine.parent / "unpacked.tar") as archive:
        assert {"./calc.py", "./.git/HEAD"} <= set(archive.getnames())
    assert kill == ["exec", "--user", "1000:1000", container, "bash", "-c", KILL]
    workspace.close()
    workspace.close()
    assert calls(engine)[4:] == [["rm", "--force", container]]


def value(command: list[str], option: str) -> str:
    return command[command.index(option) + 1]


def verbs(engine) -> list[str]:
    """The engine's verbs, and for programs in a container what they are for."""
    kinds = {
        "tar --extract": "unpack",
        "kill -KILL": "kill",
        "rm -rf .git": "forget",
        "git apply": "bug",
        "chmod 1777": "open",
    }
    return [next((kind for word, kind in kinds.items() if word in " ".join(call)), call[0]) for call in calls(engine)]


def test_the_repository_is_copied_into_memory_where_a_layer_has_no_limit(engine):
    runtime = Containers("podman", ContainerConfig(), str(engine))
    instance = dataclasses.replace(INSTANCE, image="swebench/x:latest")
    runtime.open(instance, CHECKOUT, limits=QUICK).close()
    made = calls(engine)
    assert made[0] == ["image", "inspect", "--format", "{{.Id}}", "swebench/x:latest"]
    assert made[1][:3] == ["create", "--storage-opt", "size=1g"] and made[2][:2] == ["rm", "--force"]
    at = next(i for i, call in enumerate(made) if call[0] == "cp")
    create, copy, remove = made[at - 1 : at + 2]
    prepared = create[-2]
    assert create[:3] == ["create", "--network", "none"] and prepared.startswith("localhost/aem-swe:")
    assert copy == ["cp", f"{create[4]}:/testbed/.", copy[2]] and remove == ["rm", "--force", create[4]]
    runs = [call for call in made if call[:2] == ["run", "--interactive"]]
    assert len(runs) == 2  # one made the tar file
    for run in runs:
        assert prepared in run and "--read-only" in run and "swebench/x:latest" not in run
    with tarfile.open(engine.parent / "unpacked.tar") as archive:
        assert "./from_image.py" in archive.getnames()
    (forget,) = (call for call in made if "rm -rf .git" in " ".join(call))
    assert forget[-1] == INSTANCE.base_commit
    count = len(made)
    runtime.open(instance, CHECKOUT, limits=QUICK).close()
    assert verbs(engine)[count:] == ["run", "open", "unpack", "kill", "rm"]


def test_a_work_tree_on_the_engines_disk_is_not_copied(engine):
    (engine.parent / "quota").touch()
    runtime = Containers("docker", ContainerConfig(processors=4), str(engine))
    limits = dataclasses.replace(QUICK, memory_mib=16384, disk_mib=30720)
    instance = dataclasses.replace(INSTANCE, image="own/image")
    runtime.open(instance, CHECKOUT, limits=limits).close()
    assert not {"cp", "unpack"} & set(verbs(engine))
    (_, run) = (call for call in calls(engine) if call[:2] == ["run", "--interactive"])
    assert value(run, "--storage-opt") == "size=30720m" and value(run, "--cpus") == "4"
    assert value(run, "--memory") == value(run, "--memory-swap") == "16384m" and value(run, "--shm-size") == "2048m"
    assert not {"--tmpfs", "--read-only", "--volume", "-v", "--mount", "--privileged", "--cap-add"} & set(run)
    for expected in ("--network none", "--cap-drop ALL", "--security-opt no-new-privileges", "--user 0:0"):
        assert f" {expected} " in " ".join(run)
    limits = dataclasses.replace(limits, cpus=1.5)  # of the instance
    for _ in range(2):
        runtime.open(instance, CHECKOUT, limits=limits).close()
    assert verbs(engine)[-4:] == ["run", "rm", "run", "rm"] and value(calls(engine)[-2], "--cpus") == "1.5"
    (_, commit) = (call for call in calls(engine) if call[0] == "commit")  # of the image, and of the instance
    assert commit[2] in run and commit[2] in calls(engine)[-2]
    # a checkout is unpacked into the layer
    runtime = Containers("docker", ContainerConfig(image="x", storage="disk"), str(engine))
    runtime.open(INSTANCE, CHECKOUT, limits=limits).close()
    assert "unpack" in verbs(engine)


def test_the_disk_is_unlimited_only_by_name(engine):
    instance = dataclasses.replace(INSTANCE, image="own/image")
    config = ContainerConfig(storage="unlimited-disk")
    Containers("docker", config, str(engine)).open(instance, CHECKOUT, limits=QUICK).close()
    (_, run) = (call for call in calls(engine) if call[:2] == ["run", "--interactive"])
    assert not {"--storage-opt", "--tmpfs", "--read-only"} & set(run)
    with pytest.raises(SandboxError, match="pquota' mount option\n.*take --swe.container.storage memory"):
        Containers("docker", ContainerConfig(storage="disk"), str(engine)).open(instance, CHECKOUT, limits=QUICK)
    with pytest.raises(ValueError, match="storage to be one of auto, disk, memory, unlimited-disk, got 'ram'"):
        ContainerConfig(storage="ram")
    with pytest.raises(ValueError, match="processors above 0, got 0"):
        ContainerConfig(processors=0)


@pytest.mark.parametrize("storage", ["memory", "unlimited-disk"])
def test_an_image_is_prepared_once_for_a_user_without_privileges(engine, storage):
    instance = dataclasses.replace(INSTANCE, image="own/image", workdir="/calc")
    for _ in range(2):  # another process finds the prepared image
        runtime = Containers("docker", ContainerConfig(storage=storage), str(engine))
        runtime.open(instance, CHECKOUT, limits=QUICK).close()
    (prepare,) = (call for call in calls(engine) if "prepare" in call)
    (commit, *of_instance) = (call for call in calls(engine) if call[0] == "commit")
    assert len(of_instance) == (storage != "memory")
    assert (
        prepare[:2] == ["run", "--name"] and commit[1] == prepare[2] and ["rm", "--force", commit[1]] in calls(engine)
    )
    words = " ".join(prepare)
    for expected in ("--network none", "--user 0:0", "--cap-drop ALL", "--security-opt no-new-privileges"):
        assert f" {expected} " in words
    script = prepare[prepare.index("-c") + 1]
    assert "find /root" in script and "chmod o+rX" in script and "ln -s" in script
    assert prepare[prepare.index("prepare") :] == ["prepare", "/calc", "" if storage == "memory" else "1000:1000", ""]
    (run, *others) = (call for call in calls(engine) if call[:2] == ["run", "--interactive"])
    assert len(others) == (3 if storage == "memory" else 2)  # each process packs, one commits
    assert commit[2] in run and value(run, "--workdir") == "/calc"
    assert ("--tmpfs /calc:rw" in " ".join(run)) == (storage == "memory")
    count = len(calls(engine))
    runtime.open(instance, CHECKOUT, limits=QUICK).close()  # a process asks once
    assert "image" not in [call[0] for call in calls(engine)[count:]]
    other = dataclasses.replace(instance, workdir="/other")
    runtime.open(other, CHECKOUT, limits=QUICK).close()
    assert len({call[2] for call in calls(engine) if call[0] == "commit"}) == (2 if storage == "memory" else 4)


def test_the_preparing_script_works(tmp_path):
    """Runs in a copy of the folders that it changes; owners need root, so they are tested with an engine."""
    root, repo = tmp_path / "root", tmp_path / "calc"
    for folder in (root / "py" / "bin", repo, tmp_path / "r2e_tests"):
        folder.mkdir(parents=True)
    (root / "py" / "bin" / "python").write_text("#!/bin/sh\n")
    (tmp_path / "r2e_tests" / "test_1.py").touch()
    (repo / "r2e_tests").symlink_to(tmp_path / "r2e_tests")
    for path, mode in ((root / "py" / "bin" / "python", 0o700), (root / "py", 0o750), (root, 0o700)):
        path.chmod(mode)
    script = images._PREPARE.replace('"/$name"', f'"{tmp_path}/$name"').replace("/testbed", f"{tmp_path}/testbed")
    script = script.replace("/root", str(root))
    subprocess.run(["bash", "-c", script, "prepare", str(repo), "", "", "r2e_tests"], check=True)
    modes = [path.stat().st_mode & 0o777 for path in (root, root / "py", root / "py" / "bin" / "python")]
    assert modes == [0o705, 0o755, 0o705]
    assert (tmp_path / "testbed").readlink() == repo
    assert [path.name for path in (repo / "r2e_tests").iterdir()] == ["test_1.py"]
    assert not (repo / "r2e_tests").is_symlink() and not (tmp_path / "r2e_tests").exists()
    missing = subprocess.run(
        ["bash", "-c", script, "prepare", f"{tmp_path}/no", "", ""], capture_output=True, text=True
    )
    assert missing.returncode == 1 and f"the image has no folder {tmp_path}/no" in missing.stdout


def test_an_image_that_cannot_be_prepared_says_why(engine):
    runtime = Containers("docker", ContainerConfig(storage="memory"), str(engine))
    with pytest.raises(SandboxError, match=r"image own/empty could not be prepared: .* no folder /testbed"):
        runtime.open(dataclasses.replace(INSTANCE, image="own/empty"), CHECKOUT, limits=QUICK)
    assert calls(engine)[-1][:2] == ["rm", "--force"]
    with pytest.raises(SandboxError, match="there is no own/missing"):
        runtime.open(dataclasses.replace(INSTANCE, image="own/missing"), CHECKOUT, limits=QUICK)


def test_the_patch_that_makes_a_bug_is_applied_before_the_history_is_removed(engine):
    (engine.parent / "quota").touch()
    instance = dataclasses.replace(INSTANCE, image="own/image", bug_patch=GOLD)
    Containers("docker", ContainerConfig(), str(engine)).open(instance, CHECKOUT, limits=QUICK).close()
    made = verbs(engine)
    assert made.index("open") < made.index("bug") < made.index("forget")
    assert calls(engine)[made.index("bug")][-1] == "calc.py"


def test_hidden_tests_in_an_images_root_are_moved_and_masked(engine):
    runtime = Containers("docker", ContainerConfig(storage="memory"), str(engine))
    row = R2EInstance("id", "own/calc", "a" * 40, "", "", "own/image", "b" * 40, (("test_a", "PASSED"),))
    runtime.open(row, CHECKOUT, limits=QUICK).close()
    (prepare,) = (call for call in calls(engine) if "prepare" in call)
    assert prepare[-4:] == ["/testbed", "", "", "r2e_tests"]
    (_, run) = (call for call in calls(engine) if call[:2] == ["run", "--interactive"])
    assert "--tmpfs /r2e_tests:ro,noexec,nosuid,nodev,mode=0000,size=64k" in " ".join(run)


def test_commands_files_and_deadlines_use_the_engine(engine):
    runtime = Containers("docker", ContainerConfig(image="x", prelude="prepare"), str(engine))
    workspace = runtime.open(INSTANCE, CHECKOUT, limits=QUICK)
    outcome = workspace.run("echo")
    assert (outcome.exit_code, sorted(outcome.output.split()), outcome.timed_out) == (3, ["err", "out"], False)
    assert calls(engine)[-2][5:] == ["bash", "-c", "prepare\necho"]
    late = workspace.run("sleep 99", limits=dataclasses.replace(QUICK, seconds=4))
    assert (late.exit_code, late.timed_out) == (None, True) and late.output in ("", "begun\n")
    assert calls(engine)[-1][-1] == KILL
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


@pytest.mark.parametrize("how", ["no daemon", "no engine", "no container", "no monitor"])
def test_an_engine_that_fails_is_no_fault_of_what_ran(engine, how):
    workspace = Containers("docker", ContainerConfig(image="x"), str(engine)).open(INSTANCE, CHECKOUT, limits=QUICK)
    assert workspace.run("echo").exit_code == 3
    if how == "no daemon":
        (engine.parent / "broken").touch()
    elif how == "no engine":
        engine.unlink()
    elif how == "no monitor":
        (engine.parent / "stuck").write_text("runc: exec failed: cannot exec in a stopped container")
    else:
        workspace._started.terminate()
        workspace._started.wait()
    reason = {
        "no daemon": "Cannot connect",
        "no engine": "could not be started",
        "no container": "ended with status -15",
        "no monitor": "it lost the container",
    }
    with pytest.raises(EngineError, match=reason[how]):
        workspace.run("echo")
    assert not workspace.is_alive
    workspace.close()


def test_workspaces_ahead_and_forks_save_the_work_of_an_instance(engine, tmp_path):
    (engine.parent / "quota").touch()
    host = Admission(HostConfig(warm=1), tmp_path / "host", lambda disk: {"cpus": Resource(4, 4), **MEMORY})
    (tmp_path / "host").mkdir()
    runtime = Containers("docker", ContainerConfig(), str(engine), host)
    instance = dataclasses.replace(INSTANCE, image="own/image", bug_patch=GOLD)
    opened = [runtime.open(instance, CHECKOUT, limits=QUICK) for _ in range(2)]
    assert [verbs(engine).count(verb) for verb in ("bug", "forget", "commit")] == [1, 1, 2]
    runtime.prepare(instance, CHECKOUT, limits=dataclasses.replace(QUICK, seconds=300))  # a grading has more time
    runtime.prepare(dataclasses.replace(instance, instance_id="other"), CHECKOUT, limits=QUICK)  # no place
    limits = dataclasses.replace(QUICK, seconds=200)
    opened.append(runtime.open(instance, CHECKOUT, limits=limits))  # takes it, perhaps while it starts
    assert verbs(engine).count("run") == 5 and opened[-1]._limits == limits  # one prepared the image, one the instance
    runtime.prepare(instance, CHECKOUT, limits=QUICK)
    ((_, item),) = runtime._warm._items
    item.future.result(60)._started.kill()  # died while it waited
    item.future.result()._started.wait()
    opened.append(runtime.open(instance, CHECKOUT, limits=QUICK))
    assert opened[-1].is_alive and verbs(engine).count("run") == 7
    (ledger,) = (tmp_path / "host").glob("*.json")
    assert len(json.loads(ledger.read_text())["entries"]) == 4
    runtime.prepare(instance, CHECKOUT, limits=QUICK)
    for workspace in opened:
        workspace.close()
    assert json.loads(ledger.read_text())["entries"] == []
    runtime._warm.close()


def test_containers_of_processes_that_were_killed_are_removed(engine):
    pid, start, space = owner().split("-")
    dead = f"{pid}-{int(start) + 1}-{space}"
    lines = [
        f"mine|aem-jax.owner={owner()}",
        f"docker|a=b,aem-jax.owner={dead},c=d",
        f"podman|map[aem-jax.owner:{dead}]",
    ]
    (engine.parent / "ps").write_text("\n".join(lines))
    Containers("docker", engine=str(engine)).remove_orphans()
    assert [call for call in calls(engine) if call[0] == "rm"] == [["rm", "--force", n] for n in ("docker", "podman")]
    workspace = Containers("docker", ContainerConfig(image="x"), str(engine)).open(INSTANCE, CHECKOUT, limits=QUICK)
    workspace.close()
    assert [value(c, "--label") for c in calls(engine) if c[0] in ("run", "create")] == [f"aem-jax.owner={owner()}"] * 2
    (engine.parent / "broken").touch()
    Containers("docker", engine=str(engine)).remove_orphans()  # says so in the log


def test_a_missing_image_or_engine_is_refused(engine):
    with pytest.raises(SandboxError, match="expected an image for 'own__calc-1'"):
        Containers("docker", ContainerConfig(), str(engine)).open(INSTANCE, CHECKOUT)
    (engine.parent / "broken").touch()
    with pytest.raises(SandboxError, match="status 1: Cannot connect to the Docker daemon"):
        Containers("docker", ContainerConfig(image="x"), str(engine)).open(INSTANCE, CHECKOUT)
    assert "Cannot connect" in probe(str(engine))
    assert probe("no-such-engine") == "there is no `no-such-engine` on the PATH"
