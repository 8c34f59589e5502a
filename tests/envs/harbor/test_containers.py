"""Harbor tasks in containers: the command lines of docker and podman, and whole episodes in an engine of our own."""

import dataclasses
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from envs.harbor.engine import Engine
from envs.harbor.test_env import FINISH, play
from envs.harbor.test_task import TASKS, make
from envs.swe.sandboxes import working_bubblewrap
from envs.swe.test_calls import block

from aem_jax.envs.harbor import sandbox
from aem_jax.envs.harbor.check import problems
from aem_jax.envs.harbor.config import HarborConfig
from aem_jax.envs.harbor.env import HarborEnv
from aem_jax.envs.harbor.sandbox import Sandboxes, image_tag, run_arguments
from aem_jax.envs.harbor.task import read_task
from aem_jax.envs.swe.sandbox.bubblewrap import Bubblewrap
from aem_jax.envs.swe.sandbox.workspace import EngineError, Limits, SandboxError

CONFIG = HarborConfig(max_steps=4, memory_mib=512, disk_mib=64, file_mib=8, processes=32)
LIMITS = Limits(memory_mib=512, disk_mib=64, file_mib=8, processes=32)


@pytest.fixture
def engine(tmp_path):
    working_bubblewrap()  # the engine uses it
    return Engine(tmp_path)


def env_of(engine, name="docker", **changes) -> HarborEnv:
    config = dataclasses.replace(CONFIG, **changes)
    return HarborEnv(config, Sandboxes(config, engine.runtime(name)))


def test_a_container_is_writable_and_bounded_and_has_no_privileges_over_the_host():
    words = run_arguments("aem-harbor-1", "own/image", LIMITS, 1.5)
    line = f" {' '.join(words)} "
    for expected in (
        *("--rm", "--network none", "--cap-drop ALL", "--security-opt no-new-privileges", "--ipc private"),
        *("--user 0:0", "--pids-limit 36", "--memory 512m", "--memory-swap 512m", "--cpus 1.5", "--shm-size 64m"),
        *("--ulimit core=0:0", "--ulimit fsize=8388608:8388608", "--oom-score-adj 1000", "--stop-signal KILL"),
        *("--hostname sandbox", "--env PAGER=cat"),
    ):
        assert f" {expected} " in line, expected
    assert words[-5:-2] == ["--entrypoint", "bash", "own/image"]
    assert not {"--privileged", "--volume", "-v", "--mount", "--device", "--read-only", "--storage-opt"} & set(words)
    added = {words[i + 1] for i, word in enumerate(words) if word == "--cap-add"}
    assert not added & {"SYS_ADMIN", "SYS_PTRACE", "NET_ADMIN", "NET_RAW", "MKNOD", "SYS_MODULE", "SETPCAP", "SETFCAP"}
    with_more = run_arguments("a", "i", LIMITS, 1, network=True, storage_quota=True)
    assert "--network" not in with_more and with_more[with_more.index("--storage-opt") + 1] == "size=64m"


def test_an_image_is_built_once_and_named_by_the_content_of_its_folder(engine):
    env = env_of(engine)
    task = read_task(TASKS / "dockerfile")
    for _ in range(2):
        assert play(env, "dockerfile", "echo 12 $MODE > sum.txt")[-1].info["won"]
    environment = TASKS / "dockerfile" / "environment"
    tag = image_tag(task)
    assert engine.calls("build") == [
        ["build", "--tag", tag, "--file", str(environment / "Dockerfile"), str(environment)]
    ]
    assert tag.startswith("localhost/aem-harbor/dockerfile:") and len(tag.rpartition(":")[2]) == 24
    runs = engine.calls("run")
    assert [run[run.index("--entrypoint") + 2] for run in runs] == [tag, tag]
    line = " ".join(runs[0])
    assert "--memory 512m" in line and "--cpus 1 " in line  # of the task: cpus, memory_mb; of the config: disk


def test_a_changed_folder_has_another_image(tmp_path):
    folder = make(tmp_path / "My Task!", environment__Dockerfile="FROM x", environment__data_txt="1")
    first = image_tag(read_task(folder))
    (folder / "environment/data.txt").write_text("2")
    second = image_tag(read_task(folder))
    assert first != second and first.startswith("localhost/aem-harbor/my-task:")
    (folder / "instruction.md").write_text("Another text needs no other image.")
    assert image_tag(read_task(folder)) == second


def test_one_of_several_servers_builds(engine):
    task, built = read_task(TASKS / "dockerfile"), threading.Barrier(4)

    def open_one(_) -> None:
        sandboxes = Sandboxes(CONFIG, engine.runtime())
        built.wait()
        sandboxes.open(task).close()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(open_one, range(4)))
    assert len(engine.calls("build")) == 1 and len(engine.calls("run")) == 4


def test_a_dockerfile_that_cannot_be_built_is_named(engine):
    (engine.folder / "broken").touch()
    with pytest.raises(
        SandboxError, match=r"environment/Dockerfile: expected a Dockerfile that can be built: .*COPY fai"
    ):
        env_of(engine).reset({"folder": str(TASKS / "dockerfile")})


def test_users_and_the_work_folder_are_the_tasks_or_the_images(engine):
    engine.image("own/image")
    env = env_of(engine, image="own/image")
    env.reset({"folder": str(TASKS / "root-owned")})
    env.step(block("execute_bash", command="id -u; pwd"))
    env.step(FINISH)
    execs = [call for call in engine.calls("exec") if "kill -KILL -1" not in call[-1]]
    inside = next(call for call in execs if "id -u; pwd" in call[-1])
    assert inside[1:6] == ["--interactive", "--user", "root", "--workdir", "/srv/service"]
    verifier = next(call for call in execs if "(/tests/test.sh)" in call[-1])
    assert verifier[1:6] == ["--interactive", "--user", "0", "--workdir", "/srv/service"]
    prepared = [call for call in execs if call not in (inside, verifier)]
    assert all(call[2:6] == ["--user", "0:0", "--workdir", "/"] for call in prepared) and prepared
    kills = [call for call in engine.calls("exec") if "kill -KILL -1" in call[-1]]
    assert len(kills) == len(execs) and all(call[1:3] == ["--user", "0:0"] for call in kills)
    assert "worker|/app" not in str(execs)

    play(env, "partial", "touch a")  # names neither user nor work folder: the image's
    agent = next(call for call in engine.calls("exec") if "touch a" in call[-1])
    assert agent[1:6] == ["--interactive", "--user", "worker", "--workdir", "/app"]


def test_root_owned_files_can_be_changed_and_the_sandbox_is_removed(engine):
    engine.image("own/image")
    env = env_of(engine, image="own/image")
    solving = "chmod u+w etc/service.conf && sed -i s/80/8080/ etc/service.conf && mkdir -m 000 locked"
    finished = play(env, "root-owned", "stat -c '%U %a' etc/service.conf", solving)[-1]
    assert finished.info["won"], finished.info
    assert [call[:2] for call in engine.calls("rm")] == [["rm", "--force"]]


def test_the_agent_of_a_container_sees_neither_tests_nor_solution(engine):
    look = "ls -A / /solution /tests; find / -xdev -name test.sh -o -name solve.sh -o -name Dockerfile"
    found = play(env_of(engine), "dockerfile", look)[0].observation
    assert "No such file" in found and ".sh" not in found


@pytest.mark.parametrize("name", ["partial", "forged-reward", "leftovers", "multi-line", "reward-keys", "dockerfile"])
def test_solutions_pass_and_empty_ones_do_not(engine, name):
    engine.image("own/image")
    config = dataclasses.replace(CONFIG, image="own/image")
    assert problems(read_task(TASKS / name), Sandboxes(config, engine.runtime()), config) == []


def test_a_verifier_with_its_own_image_gets_a_container_of_its_own(engine, tmp_path):
    engine.image("own/image")
    toml = (
        "[environment]\ndocker_image = 'own/image'\n[verifier]\nenvironment_mode = 'separate'\n[[verifier.collect]]\n"
    )
    folder = make(tmp_path / "task", f"{toml}command = 'cp a /logs/artifacts/'", tests__Dockerfile="FROM own/image")
    (folder / "tests/test.sh").write_text(
        "[ -s /logs/artifacts/a ] && [ ! -e a ] && echo 1 > /logs/verifier/reward.txt"
    )
    verifier = read_task(folder).verifier
    assert verifier
    tag = image_tag(verifier)
    env = env_of(engine)
    env.reset({"folder": str(folder)})
    assert [call[2] for call in engine.calls("build")] == [tag]  # a step has less time than a reset
    image = engine.folder / "images" / tag.replace("/", "_").replace(":", "_")
    (image / "app").rename(image / "tests")  # what COPY in the Dockerfile does
    (image / "tests/test.sh").chmod(0o755)
    (image / "app").mkdir()
    env.step(block("execute_bash", command="echo 1 > a"))
    assert env.step(FINISH).info["won"]
    assert [run[run.index("--entrypoint") + 2] for run in engine.calls("run")] == ["own/image", tag]
    assert [call[0] for call in engine.calls() if call[0] in ("run", "rm")] == ["run", "rm", "run", "rm"]


def test_a_forged_reward_does_not_count(engine):
    engine.image("own/image")
    for forgery in (
        "echo 1 > /logs/verifier/reward.txt",
        "rm -r /logs/verifier; mkdir -p /tmp/v; ln -s /tmp/v /logs/verifier; echo 1 > /tmp/v/reward.txt",
    ):
        finished = play(env_of(engine, image="own/image"), "forged-reward", forgery)[-1]
        assert finished.info["failure"].endswith("(exit code 0), got none"), finished.info


@pytest.mark.parametrize("when", ["a command", "the verifier"])
def test_an_engine_that_fails_is_no_verdict(engine, when):
    engine.image("own/image")
    env = env_of(engine, image="own/image")
    env.reset({"folder": str(TASKS / "partial")})
    (engine.folder / "dead").touch()
    with pytest.raises(EngineError, match="the engine failed during an episode.*Cannot connect"):
        env.step(FINISH if when == "the verifier" else block("execute_bash", command="touch a"))
    (engine.folder / "dead").unlink()
    assert play(env, "partial", "touch a")[-1].info["score"] > 0  # the next episode


NETWORKS = {
    ("off", "", "public"): (False, []),
    ("task", "", "public"): (True, []),
    ("task", "", "no-network"): (False, []),
    ("verifier", "", "no-network"): (False, []),
    ("verifier", "", "public"): (False, [["disconnect", "none"], ["connect", "bridge"]]),
    ("task", "[agent]\nnetwork_mode = 'no-network'", "public"): (
        False,
        [["disconnect", "none"], ["connect", "bridge"]],
    ),
    ("task", "[verifier]\nnetwork_mode = 'no-network'", "public"): (True, [["disconnect", "bridge"]]),
}


@pytest.mark.parametrize("case", NETWORKS, ids=lambda case: f"{case[0]}, {case[1] or 'both'} {case[2]}")
def test_the_network_is_that_of_the_task_where_the_settings_allow_it(engine, tmp_path, case):
    setting, phase, mode = case
    connected, changes = NETWORKS[case]
    toml = f"[environment]\ndocker_image = 'own/image'\nnetwork_mode = '{mode}'\n{phase}"
    folder = make(tmp_path / "task", toml, tests__test_sh="echo 1 > /logs/verifier/reward.txt")
    engine.image("own/image")
    env = env_of(engine, network=setting)
    first = env.reset({"folder": str(folder)})
    assert ("There is a network." in first.observation) == connected
    run = engine.calls("run")[0]
    assert ("--network" not in run) == connected and engine.calls("network") == []
    assert env.step(FINISH).info["won"]
    container = run[run.index("--name") + 1]
    assert engine.calls("network") == [["network", *words, container] for words in changes]


def test_what_an_engine_cannot_serve_is_refused(engine, tmp_path):
    with pytest.raises(
        ValueError, match=r"partial/task.toml: environment.docker_image: expected an image or environ.*"
    ):
        env_of(engine).reset({"folder": str(TASKS / "partial")})
    folder = make(tmp_path / "task", "[environment]\ndocker_image = 'own/image'")
    with pytest.raises(ValueError, match=r"expected the same network for agent and verifier with podman, got none for"):
        env_of(engine, "podman", network="verifier").reset({"folder": str(folder)})
    assert engine.calls() == []


def test_files_beside_a_published_image_are_copied_to_the_work_folder(engine, tmp_path):
    folder = make(tmp_path / "task", "[environment]\ndocker_image = 'own/image'", environment__notes_txt="read me")
    engine.image("own/image")
    assert play(env_of(engine), folder, "cat notes.txt")[0].observation == "read me\n[exit code 0]"


def test_auto_takes_an_engine_for_images_and_bubblewrap_for_the_rest(engine, monkeypatch):
    asked = []

    def choose(name, bubblewrap, host):
        asked.append(name)
        if name == "docker":
            raise SandboxError("no daemon")
        return Bubblewrap() if name == "bubblewrap" else engine.runtime(name)

    monkeypatch.setattr(sandbox, "choose_runtime", choose)
    image, plain = read_task(TASKS / "dockerfile"), read_task(TASKS / "partial")
    sandboxes = Sandboxes(CONFIG)
    for task in (image, plain, image, plain):
        sandboxes.check(task)
    assert asked == ["docker", "podman", "bubblewrap"]
    asked.clear()
    Sandboxes(dataclasses.replace(CONFIG, ignore_images=True)).check(image)
    assert asked == ["bubblewrap"]
    monkeypatch.setattr(sandbox, "choose_runtime", lambda *_, **__: (_ for _ in ()).throw(SandboxError("no daemon")))
    with pytest.raises(SandboxError, match=r"dockerfile/task.toml: expected docker or podman for a task with an image"):
        Sandboxes(CONFIG).check(image)
