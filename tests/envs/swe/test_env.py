"""Episodes of SweEnv: an honest one, limits, and agents that manipulate the grading."""

import dataclasses
import json
from pathlib import Path

import pytest
from envs.swe.sandboxes import FILES, INSTANCE, sandboxed_processes, working_bubblewrap
from envs.swe.test_calls import block

from aem_jax.envs.registry import environment_spec
from aem_jax.envs.serving.session import Session
from aem_jax.envs.swe.env import SweConfig, SweEnv
from aem_jax.envs.swe.tasks import load_task, make_payload
from aem_jax.envs.testing.conformance import CHECKS, Subject, any_text_gets_a_result, run_checks

CONFIG = SweConfig(
    max_steps=4, command_s=60, grade_s=120, memory_mib=512, processes=32, file_mib=8, disk_mib=32, partial=True
)
FIX = block("execute_bash", command="sed -i 's/(len(xs) - 1)/len(xs)/' calc.py")
FINISH = block("finish")
TASK = make_payload(INSTANCE, files=FILES)


@pytest.fixture(scope="module")
def runtime():
    return working_bubblewrap()


@pytest.fixture(scope="module")
def shared_env(runtime):
    return make(runtime)


@pytest.fixture
def env(shared_env):
    """The same environment for all tests, each of which ends its episode."""
    yield shared_env
    shared_env.close()


def make(runtime, **changes) -> SweEnv:
    return SweEnv(dataclasses.replace(CONFIG, **changes), runtime)


def play(env: SweEnv, *responses: str, task=TASK):
    first = env.reset(task)
    assert "mean() is wrong." in first.observation and "execute_bash" in first.observation
    return [env.step(response) for response in responses]


def test_a_fix_is_rewarded(env):
    fixed, finished = play(env, FIX, FINISH)
    assert not fixed.done and fixed.info == {"won": False, "valid_action": True}
    assert (finished.terminated, finished.truncated, finished.reward) == (True, False, 1.0)
    assert finished.info == {
        "won": True,
        "valid_action": True,
        "score": 1.0,
        "applied": True,
        "fail_to_pass": 1.0,
        "pass_to_pass": 1.0,
    }
    with pytest.raises(ValueError, match="expected a running episode, got none"):
        env.step(FINISH)


def test_an_empty_patch_is_not_rewarded(env):
    (finished,) = play(env, FINISH)
    assert (finished.reward, finished.info["won"], finished.info["score"]) == (0.0, False, 0.0)
    assert finished.info["pass_to_pass"] == 1.0


def test_the_last_step_is_graded(env):
    results = play(env, "what?", FIX, "<function=x></function>", "hm")
    assert [result.info["valid_action"] for result in results] == [False, True, False, False]
    assert "expected a call of a tool" in results[0].observation
    assert (results[-1].terminated, results[-1].truncated, results[-1].reward) == (False, True, 1.0)


def test_a_recipe_is_used_and_named_in_the_prompt(runtime):
    env = make(runtime, recipe="r2e-gym")
    assert "more than 200 lines" in env.reset(TASK).observation
    seen = env.step(block("execute_bash", command="echo a; exit 3")).observation
    assert seen == "Exit code: 3\nExecution output of [execute_bash]:\na"
    env.close()
    with pytest.raises(ValueError, match="recipe to be one of own, r2e-gym, got 'other'"):
        make(runtime, recipe="other")


def test_too_many_invalid_responses_end_an_episode(runtime):
    env = make(runtime, max_invalid=2, reward_invalid=-0.5)
    results = play(env, "a", "b")
    assert [(result.truncated, result.reward) for result in results] == [(False, -0.5), (True, -0.5)]


def test_partial_reward_is_the_fraction_of_fixed_tests(runtime):
    """Fixing one of two failing tests without breaking any earns half; breaking a test earns nothing."""
    both = ("test_calc.py::test_mean", "test_calc.py::test_nothing")
    task = make_payload(dataclasses.replace(INSTANCE, fail_to_pass=both), files=FILES)
    env = make(runtime)
    assert play(env, FIX, FINISH, task=task)[-1].reward == 0.5
    breaks = block("execute_bash", command="printf 'def mean(xs):\\n    return 2\\n' > calc.py")
    broken = play(env, breaks, FINISH, task=task)[-1]
    assert (broken.info["fail_to_pass"], broken.info["pass_to_pass"], broken.reward) == (0.5, 0.0, 0.0)


def test_code_that_ends_its_sandbox_ends_its_episode_unsolved(env):
    env.reset(TASK)
    env._session.workspace._process.kill()
    env._session.workspace._process.wait()  # by then all its processes have been killed, too
    assert env.step(FIX).observation == "[the sandbox was ended by what ran in it]"
    finished = env.step(FINISH)
    assert finished.terminated and finished.info["failure"].endswith("ended by what ran in it")
    assert play(env, FIX, FINISH)[-1].info["won"]


FORGED = "PASSED test_calc.py::test_mean\\nPASSED test_calc.py::test_one"
ON_THE_GRADE = {
    "tests edited": "printf 'def test_one(): pass\\ndef test_mean(): pass\\n' > test_calc.py",
    "another pytest": f"""
        mkdir pytest; echo 'print("{FORGED}")' | tee pytest/__main__.py > pytest/__init__.py; cp -r pytest _pytest""",
    "results printed at the import, and an end": f"""
        echo 'print(">>>>> Start Test Output\\n{FORGED}\\n>>>>> End Test Output", flush=True)' > calc.py
        echo 'import os; os._exit(0)' >> calc.py""",
    "results printed at the exit": f"""echo 'import atexit; atexit.register(lambda: print("{FORGED}"))' >> calc.py""",
    "start-up files and settings": """
        echo 'import os; os._exit(0)' | tee sitecustomize.py usercustomize.py x.pth > /tmp/sitecustomize.py
        printf '[pytest]\naddopts = --collect-only\n' > pytest.ini""",
    "a grade that does not end": "echo 'import time; time.sleep(999)' > calc.py",
    "a grade that kills": "echo 'import os; os.kill(-1, 9)' > calc.py",
}


@pytest.mark.parametrize("attempt", ON_THE_GRADE.values(), ids=ON_THE_GRADE)
def test_manipulating_the_grading_earns_nothing(attempt, runtime, env):
    quick = make(runtime, grade_s=4 if "sleep" in attempt else 120)
    results = play(quick, block("execute_bash", command=f"{attempt}\ngit status --short"), FINISH)
    assert results[0].observation.endswith("[exit code 0]") and ".py" in results[0].observation + "pytest/.py"
    assert not results[-1].info["won"] and results[-1].reward <= 0, results[-1]


def test_after_attacks_a_fix_is_rewarded_and_no_process_remains(env):
    assert play(env, FIX, FINISH)[-1].info["won"]
    env.close()
    assert not sandboxed_processes()


def test_the_environment_passes_the_conformance_checks(runtime):
    subject = Subject(lambda: make(runtime), [TASK], [FIX], max_steps=1)
    checks = [check for check in CHECKS if check is not any_text_gets_a_result]  # test_calls.py; here it takes seconds
    assert run_checks(checks, subject) == []


def test_results_do_not_reveal_the_hidden_tests(env):
    results = play(env, FIX, FINISH)
    told = json.dumps([results[-1].observation, dict(results[-1].info)])
    assert "test_mean" not in told


def test_invalid_settings_are_refused():
    with pytest.raises(ValueError, match="expected max_steps of at least 1, got 0"):
        SweConfig(max_steps=0)
    with pytest.raises(ValueError, match="expected the limit seconds above 0, got 0"):
        SweConfig(grade_s=0)


def test_payloads_are_validated_and_equal_ones_share_a_checkout(tmp_path):
    payload = json.loads(json.dumps(make_payload(INSTANCE, files=FILES)))
    assert load_task(payload)[0] == INSTANCE
    assert load_task(payload)[1] is load_task(dict(payload))[1]
    half = make_payload(
        dataclasses.replace(INSTANCE, problem_statement="half \ud83d of it"), files=FILES | {"a.txt": "\udcff"}
    )
    assert load_task(half)[0].problem_statement == "half \ufffd of it"
    load_task(half)[1](INSTANCE, tmp_path)
    assert (tmp_path / "a.txt").read_text() == "\ufffd"
    with pytest.raises(ValueError, match="got keys \\['files', 'instance', 'repos'\\]"):
        load_task({**payload, "repos": "/data"})
    with pytest.raises(ValueError, match="expected a payload with 'instance'"):
        load_task({})
    with pytest.raises(ValueError, match="found no folder /no/such"):
        load_task(make_payload(INSTANCE, repos="/no/such"))
    instance, checkout = load_task(make_payload(INSTANCE))
    with pytest.raises(ValueError, match="expected 'files' or 'repos' in the payload of 'own__calc-1'"):
        checkout(instance, Path("/nowhere"))


def test_a_server_session_plays_an_episode(runtime):
    settings = {"disk_mib": 32, "bubblewrap": {"packages": ["pytest"]}, "host": {"warm": 0}}
    session = Session(environment_spec("swe").factory(settings)(), send_admissible=False)
    reset = json.dumps({"type": "reset", "data": make_payload(INSTANCE, files=FILES)})
    assert "mean() is wrong." in json.loads(session.answer(reset) or "")["data"]["observation"]["text"]
    reply = session.answer(json.dumps({"type": "step", "data": {"text": block("execute_bash", command="ls")}}))
    assert json.loads(reply or "")["data"]["observation"]["text"] == "calc.py\ntest_calc.py\n[exit code 0]"
    session.close()
    assert not sandboxed_processes()
