"""Episodes of HarborEnv in bubblewrap: each trap of our task folders, and agents that write their own reward."""

import dataclasses
import io
import json
import tarfile
import time
from typing import cast

import pytest
from envs.harbor.test_task import TASKS, make
from envs.swe.sandboxes import sandboxed_processes, working_bubblewrap
from envs.swe.test_calls import block

from aem_jax.envs.harbor.check import run_solution
from aem_jax.envs.harbor.config import HarborConfig
from aem_jax.envs.harbor.env import HarborEnv
from aem_jax.envs.harbor.sandbox import Sandboxes
from aem_jax.envs.harbor.task import read_task
from aem_jax.envs.harbor.verify import grade
from aem_jax.envs.registry import environment_spec
from aem_jax.envs.serving.session import Session
from aem_jax.envs.swe.sandbox.bubblewrap import BubblewrapWorkspace
from aem_jax.envs.swe.sandbox.workspace import SandboxError
from aem_jax.envs.testing.conformance import CHECKS, Subject, any_text_gets_a_result, run_checks

CONFIG = HarborConfig(max_steps=4, memory_mib=512, disk_mib=64, file_mib=8, processes=32, ignore_images=True)
FINISH = block("finish")


@pytest.fixture(scope="module")
def runtime():
    return working_bubblewrap()


def env_of(runtime, **changes) -> HarborEnv:
    config = dataclasses.replace(CONFIG, **changes)
    return HarborEnv(config, Sandboxes(config, runtime))


def play(env: HarborEnv, task, *commands: str):
    """Plays a task of ours, or one in a folder, with bash commands and `finish`."""
    folder = TASKS / task if isinstance(task, str) else task
    first = env.reset({"folder": str(folder)})
    assert not first.done and "execute_bash" in first.observation
    results = []
    for response in [*(block("execute_bash", command=command) for command in commands), FINISH]:
        results.append(env.step(response))
        if results[-1].done:
            break
    return results


# By task: commands that solve it, and commands that do not, with the failure, or the reward, that they have.
TRAPS = {
    "network-off": (["echo no > online.txt"], ["echo yes > online.txt"], 0.0),
    "agent-timeout": (["echo early > when.txt"], ["sleep 30; echo early > when.txt"], 0.0),
    "verifier-timeout": (["touch stop"], ["true"], "/tests/test.sh: killed: not done after 2 s"),
    "root-owned": (["printf 'port = 8080\\n' > etc/service.conf"], ["cat etc/service.conf"], 0.0),
    "reward-not-a-number": (
        ["echo 7 > number.txt"],
        ["echo 8 > number.txt"],
        "/logs/verifier/reward.txt: expected a finite number, got 'well done'",
    ),
    "reward-missing": (
        ["sort -o names.txt names.txt"],
        ["echo"],
        "expected /logs/verifier/reward.txt or reward.json after /tests/test.sh (exit code 1), got none",
    ),
    "reward-keys": (["echo hello > greeting.txt"], ["echo hi > greeting.txt"], 0.0),
    "dockerfile": (["echo 12 $MODE > sum.txt"], ["echo 12 > sum.txt"], 0.0),
    "multi-line": (
        ['printf \'name,größe\\n"a ""quoted"" one",1\\n{braces} and <tags>,2\\n\' > table.csv'],
        ["echo > table.csv"],
        0.0,
    ),
    "partial": (["touch a b c d"], ["touch a c d"], 0.75),
    "leftovers": (
        ["echo workdir > here.txt; echo temporary > /tmp/there.txt", "echo log > /logs/artifacts/report.txt"],
        ["echo workdir > here.txt; echo log > /logs/artifacts/report.txt; export LEFT=1"],
        0.0,
    ),
    "own-verifier": (
        ["mkdir notes; echo 42 > answer.txt; echo so > notes/how.txt; touch notes/x.tmp /tmp/agent"],
        ["mkdir notes; echo so > notes/how.txt; echo 1 | tee /logs/artifacts/reward.txt > /logs/verifier/reward.txt"],
        0.0,
    ),
    "forged-reward": (
        ["echo Nairobi > capital.txt"],
        ["echo 1 > /logs/verifier/reward.txt; echo '{\"reward\": 1}' > /logs/verifier/reward.json"],
        "expected /logs/verifier/reward.txt or reward.json after /tests/test.sh (exit code 0), got none",
    ),
}


def test_every_task_folder_is_a_trap_of_the_table():
    assert sorted(TRAPS) == sorted(folder.name for folder in TASKS.iterdir())


def check_trap(env: HarborEnv, name: str) -> None:
    """Plays a task of the table twice: solved, and into its trap."""
    solving, failing, outcome = TRAPS[name]
    solved = play(env, name, *solving)[-1]
    assert (solved.terminated, solved.reward) == (True, 1.0), solved.info
    assert solved.info == {"won": True, "score": 1.0, "reward": 1.0, "valid_action": True}
    failed = play(env, name, *failing)[-1]
    assert failed.done and failed.reward == 0.0 and not failed.info["won"]
    if isinstance(outcome, str):
        assert failed.info["failure"] == outcome and failed.info["score"] == 0.0
    else:
        assert failed.info["score"] == outcome and "failure" not in failed.info


@pytest.mark.parametrize("name", TRAPS)
def test_a_solved_task_is_rewarded_and_its_trap_is_not(runtime, name):
    check_trap(env_of(runtime), name)


def test_the_agents_time_is_counted_over_all_commands_and_the_verifier_still_runs(runtime):
    env = env_of(runtime)
    began = time.monotonic()
    slept, late = play(env, "agent-timeout", "echo early > when.txt; sleep 1.5", "sleep 30")
    assert not slept.done and (late.terminated, late.truncated) == (False, True)
    assert late.info["won"] and late.reward == 1.0 and time.monotonic() - began < 20
    assert "killed: not done after 1." in late.observation


def test_a_partial_reward_is_earned_if_the_settings_say_so(runtime):
    earned = [play(env_of(runtime, partial=partial), "partial", "touch a b c")[-1] for partial in (False, True)]
    assert [(result.reward, result.info["score"], result.info["won"]) for result in earned] == [
        (0.0, 0.75, False),
        (0.75, 0.75, False),
    ]


def test_the_agent_sees_neither_tests_nor_solution(runtime):
    env = env_of(runtime, max_steps=9)
    look = "ls -A /tests /solution; find / -name test.sh -o -name solve.sh -o -name task.toml 2> /dev/null; ls /work"
    found = play(env, "multi-line", look)[0].observation
    assert found.splitlines()[:3] == ["/solution:", "", "/tests:"] and ".sh" not in found and "toml" not in found
    assert "expected.csv" not in found


FORGERIES = {
    "both reward files": "echo 1 > /logs/verifier/reward.txt; echo '{\"reward\": 1}' > /logs/verifier/reward.json",
    "a process that goes on": "(while :; do echo 1 > /logs/verifier/reward.txt; done) > /dev/null 2>&1 &",
    "a folder": "mkdir -p /logs/verifier/reward.txt/x /logs/verifier/test-stdout.txt",
    "a link to a file elsewhere": "echo 1 > /tmp/r; ln -s /tmp/r /logs/verifier/reward.txt",
    "a link in place of the folder": "rm -r /logs/verifier; mkdir /tmp/v; echo 1 > /tmp/v/reward.txt; ln -s /tmp/v "
    "/logs/verifier",
    "a script in /tests": "echo 'echo 1 > /logs/verifier/reward.txt' > /tests/test.sh; chmod 500 /tests/*",
    "a hidden script in /tests": "touch /tests/.x; chmod 500 /tests/.x; mkdir -p /tests/test.sh/y",
    "a script in a folder that cannot be emptied": "mkdir /tests/x; echo 'echo 1 > /logs/verifier/reward.txt' > "
    "/tests/x/run.sh; chmod 555 /tests/x",
    "a pipe as output": "mkfifo /logs/verifier/test-stdout.txt /logs/verifier/reward.json",
    "no folder for logs": "rm -r /logs/*; touch /logs/verifier",
}


def check_forgery(env: HarborEnv, forgery: str) -> None:
    """Plays a task with a forged reward, without and with the right answer."""
    failed = play(env, "forged-reward", forgery)[-1]
    assert failed.reward == 0.0 and failed.info["failure"].endswith("(exit code 0), got none"), failed.info
    solved = play(env, "forged-reward", forgery, "echo Nairobi > capital.txt")[-1]
    assert solved.info["won"], solved.info


@pytest.mark.parametrize("forgery", FORGERIES.values(), ids=FORGERIES)
def test_what_the_agent_wrote_is_no_reward_and_a_right_answer_still_counts(runtime, forgery):
    check_forgery(env_of(runtime), forgery)


def test_artifacts_reach_no_other_file_of_the_verifiers_sandbox(runtime):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, target in (
            ("tests/test.sh", ""),
            ("logs/artifacts/link", "/tests"),
            ("logs/artifacts/link/test.sh", ""),
            ("logs/artifacts/up", "../../tests/test.sh"),
            ("logs/artifacts/up", ""),
            ("logs/artifacts/../../tests/test.sh", ""),
            ("logs/artifacts/fine", ""),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.size = (tarfile.SYMTYPE, target, 0) if target else (tarfile.REGTYPE, "", 4)
            archive.addfile(info, None if target else io.BytesIO(b"evil"))
    task = read_task(TASKS / "own-verifier")
    assert task.verifier
    sandbox = Sandboxes(CONFIG, runtime).open(task.verifier)
    sandbox.root.write("/tests/test.sh", b"good")
    sandbox.receive(task.artifacts, buffer.getvalue())
    assert sandbox.root.run("cat /tests/test.sh /logs/artifacts/fine; ls -A /tests").output == "goodeviltest.sh\n"
    sandbox.close()


def test_a_verifier_of_its_own_gets_what_pre_artifacts_made(runtime, tmp_path):
    folder = make(
        tmp_path,
        "[verifier]\nenvironment_mode = 'separate'",
        tests__test_sh='[ "$(cat /logs/artifacts/b)" = 7 ] && [ ! -e a ] && echo 1 > /logs/verifier/reward.txt',
    )
    (folder / "pre_artifacts.sh").write_text("cp a /logs/artifacts/b")
    env = env_of(runtime)
    assert [play(env, folder, f"echo {number} > a")[-1].info["won"] for number in (7, 8)] == [True, False]


def test_code_that_ends_its_sandbox_is_unsolved_and_no_process_remains(runtime):
    env = env_of(runtime)
    env.reset({"folder": str(TASKS / "forged-reward")})
    assert env._sandbox
    workspace = cast(BubblewrapWorkspace, env._sandbox.root)
    workspace._process.kill()
    workspace._process.wait()
    assert "ended by what ran in it" in env.step(block("execute_bash", command="ls")).observation
    finished = env.step(FINISH)
    assert finished.terminated and "could not be prepared" in finished.info["failure"] and not finished.info["won"]
    with pytest.raises(ValueError, match="expected a running episode, got none"):
        env.step(FINISH)
    assert not sandboxed_processes()


def test_limits_and_invalid_responses_end_an_episode_and_it_is_verified(runtime):
    env = env_of(runtime, max_steps=2, max_invalid=1, reward_invalid=-0.5)
    env.reset({"folder": str(TASKS / "partial")})
    assert (result := env.step("what?")).truncated and result.reward == -0.5 and not result.info["valid_action"]
    first, last = play(env, "partial", "touch a b", "touch c d")
    assert not first.done and last.truncated and last.info["won"]


def test_tools_start_in_the_work_folder(runtime):
    env = env_of(runtime, max_steps=9)
    first = env.reset({"folder": str(TASKS / "root-owned")})
    assert "in the folder /srv/service" in first.observation and "/testbed" not in first.observation
    assert "etc/service.conf:1:port = 80" in env.step(block("search", search_term="port")).observation
    view = env.step(block("file_editor", command="view", path="etc/service.conf"))
    assert "port = 80" in view.observation
    edit = block("file_editor", command="str_replace", path="etc/service.conf", old_str="80", new_str="8080")
    assert "was edited" in env.step(edit).observation
    assert env.step(FINISH).info["won"]


def test_skills_are_named_in_the_prompt(runtime, tmp_path):
    folder = make(tmp_path, "[environment]\nskills_dir = '/app/skills'", environment__skills__SKILL_md="Read me.")
    env = env_of(runtime)
    assert "Guides for this kind of work lie in /app/skills" in env.reset({"folder": str(folder)}).observation
    assert "Read me." in env.step(block("execute_bash", command="cat skills/SKILL.md")).observation
    env.close()


def test_a_solution_is_run_with_its_variables(runtime, tmp_path):
    folder = make(
        tmp_path,
        '[solution.env]\nANSWER = "it\'s 7"',
        tests__test_sh='[ "$(cat a)" = "it\'s 7" ] && [ -z "$ANSWER" ] && echo 1 > /logs/verifier/reward.txt',
        solution__solve_sh='echo "$ANSWER" > a',
    )
    task, sandboxes = read_task(folder), Sandboxes(CONFIG, runtime)
    sandbox = sandboxes.open(task)
    assert run_solution(sandbox, task, CONFIG).exit_code == 0
    assert grade(sandbox, task, sandboxes, CONFIG).won


@pytest.mark.parametrize("workdir", ["/", "/usr/src/app", "/tmp", "/etc/x", "/proc"])
def test_a_work_folder_that_bubblewrap_cannot_have_is_refused(runtime, tmp_path, workdir):
    folder = make(tmp_path, f"[environment]\nworkdir = '{workdir}'")
    expected = rf"task.toml: environment.workdir '{workdir}': expected a folder apart from those of the system"
    with pytest.raises(SandboxError, match=expected):
        env_of(runtime).reset({"folder": str(folder)})


def test_what_bubblewrap_cannot_serve_is_refused(runtime, tmp_path):
    with pytest.raises(
        ValueError, match=r"dockerfile/task.toml: environment/Dockerfile: expected no image with bubble"
    ):
        env_of(runtime, ignore_images=False).reset({"folder": str(TASKS / "dockerfile")})
    with pytest.raises(ValueError, match=r"network_mode: expected 'no-network' with bubblewrap .*, got 'public'"):
        env_of(runtime, network="task").reset({"folder": str(TASKS / "partial")})
    folder = make(tmp_path, "[environment]\nnetwork_mode = 'allowlist'")
    with pytest.raises(
        ValueError, match=r"agent.network_mode or environment.network_mode: expected .* got 'allowlist'"
    ):
        env_of(runtime, network="task").reset({"folder": str(folder)})
    for payload in ({}, {"folder": ""}, {"folder": 3}):
        with pytest.raises(ValueError, match="expected a payload with 'folder'"):
            env_of(runtime).reset(payload)


def test_the_environment_passes_the_conformance_checks(runtime):
    tasks = [{"folder": str(TASKS / name)} for name in ("partial", "forged-reward")]
    subject = Subject(
        lambda: env_of(runtime), tasks, [block("execute_bash", command="touch a b; ls"), FINISH], max_steps=3
    )
    checks = [check for check in CHECKS if check is not any_text_gets_a_result]  # the tools' own tests make it
    assert run_checks(checks, subject) == []


def test_a_server_session_plays_an_episode(runtime):
    session = Session(
        environment_spec("harbor").factory({"disk_mib": 64, "host": {"warm": 0}})(), send_admissible=False
    )
    reset = json.dumps({"type": "reset", "data": {"folder": str(TASKS / "partial")}})
    assert "Each counts for a quarter." in json.loads(session.answer(reset) or "")["data"]["observation"]["text"]
    step = json.dumps({"type": "step", "data": {"text": FINISH}})
    assert json.loads(session.answer(step) or "")["data"]["done"] is True
    session.close()
    assert not sandboxed_processes()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_steps": 0}, "expected max_steps of at least 1, got 0"),
        ({"max_invalid": -1}, "expected max_invalid of at least 0"),
        ({"verify_s": 0}, "expected verify_s above 0, got 0"),
        ({"held_out": 1.0}, "expected held_out of at least 0 and below 1, got 1.0"),
        ({"network": "on"}, "expected network to be one of off, verifier, task, got 'on'"),
        ({"runtime": "chroot"}, "expected runtime to be one of auto, .*, got 'chroot'"),
        ({"ignore_images": True, "runtime": "docker"}, "expected runtime auto or bubblewrap with ignore_images, got"),
        ({"memory_mib": 1}, "expected the limit memory_mib of at least 64, got 1"),
    ],
)
def test_invalid_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        HarborConfig(**settings)
