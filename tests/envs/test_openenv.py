"""Our pool plays on OpenEnv's servers, its clients play on ours. Skipped without OpenEnv, which is no dependency.

    pip install openenv-core==0.3.0 textarena reasoning-gym      # and again with openenv>=0.10

test_openenv_recorded tests recorded answers of its servers without OpenEnv.
"""

import contextlib
import shlex
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest

pytest.importorskip("openenv.core.generic_client", reason="OpenEnv (pip install openenv-core) is not installed")

from envs.servers import served
from envs.swe.sandboxes import working_bubblewrap
from envs.swe.test_calls import block
from openenv.core.generic_client import GenericEnvClient

from aem_jax.envs.alfworld.generator.config import GeneratorConfig
from aem_jax.envs.alfworld.tasks import generated_tasks as household_tasks
from aem_jax.envs.protocol import EnvError
from aem_jax.envs.registry import environment_spec
from aem_jax.envs.serving.field_mapping import FieldMapping
from aem_jax.envs.serving.pool import EnvPool, PoolConfig
from aem_jax.envs.swe.tasks import generated_tasks, whole_payload
from aem_jax.envs.testing.conformance_wire import ServerSubject, check_server
from aem_jax.envs.webshop.shop import ShopConfig, open_shop
from aem_jax.envs.webshop.tasks import goal_tasks

BARE = FieldMapping(
    won_field="", truncated_field="", terminated_field="", valid_field="", admissible_field="", info_field=""
)
COMMAND = replace(BARE, action_field="command", text_field="output", truncated_field="out_of_steps")
GUESS = replace(BARE, action_field="message", text_field="messages.-1.content", won_above=0.99)
ANSWER = replace(BARE, action_field="answer", text_field="question|", score_field="score", won_above=0.99)
ECHO = replace(BARE, action_field="message", text_field="echoed_message")


def command(name, sessions):
    script = Path(__file__).with_name("openenv_server.py")
    return f"{shlex.join([sys.executable, str(script), name])} {{port}} {sessions}"


@contextlib.contextmanager
def playing(command, mapping, *, servers, sessions):
    """A pool whose servers are started by the command."""
    config = PoolConfig(
        command=command, num_servers=servers, sessions_per_server=sessions, field_mapping=mapping, start_deadline_s=180
    )
    with EnvPool(config, ("", {})) as pool:
        yield pool


def conforms(pool, mapping, tasks, actions, *, sessions):
    """Runs our conformance suite on the pool's first server, after releasing its sessions."""
    url = pool._servers[0].url
    for session in pool._sessions:
        session.drop("the suite needs the room")
    return check_server(ServerSubject(url, tasks, actions, mapping, sessions, guarded=False))


def test_their_server_serves_our_pool():
    with playing(command("command", 4), COMMAND, servers=1, sessions=4) as pool:
        futures = [pool.reset(session, {"seed": 1, "prefix": f"{session}> "}) for session in range(4)]
        assert [future.result(30).observation for future in futures] == [f"{session}> ready" for session in range(4)]
        won = pool.step(0, "done").result(30)
        assert (won.observation, won.reward, won.terminated, won.info["won"]) == ("0> done", 1.0, True, True)
        for _ in range(5):
            result = pool.step(1, "ls").result(30)
        assert (result.terminated, result.truncated, result.info["won"]) == (False, True, False)
        assert conforms(pool, COMMAND, ({"prefix": "a"}, {"prefix": "b"}), ("ls", "done"), sessions=4) == []


def test_their_capacity_is_understood():
    refused = pytest.raises(EnvError, match=r"CAPACITY_REACHED.*set --env.sessions-per-server")
    with refused, playing(command("command", 2), COMMAND, servers=1, sessions=3):
        pass


@pytest.mark.skipif(not find_spec("textarena"), reason="textarena is not installed")
def test_textarena_is_played():
    with playing(command("textarena", 3), GUESS, servers=1, sessions=3) as pool:
        # bisection finds one of twenty numbers in at most five guesses; every session plays its own game
        for future in [pool.reset(session, {"seed": 7 + session}) for session in range(3)]:
            assert future.result(60).observation.startswith("You are Player 0.")
        found = []
        for session in range(3):
            low, high, result = 1, 20, None
            while result is None or not result.done:
                guess = (low + high) // 2
                result = pool.step(session, f"I say [{guess}]").result(60)
                low, high = (guess + 1, high) if result.observation.endswith("higher.") else (low, guess - 1)
            assert (result.reward, result.terminated, result.info["won"]) == (1.0, True, True)
            found.append(guess)
        assert len(set(found)) > 1
        assert conforms(pool, GUESS, ({"seed": 1}, {"seed": 2}), ("[1]", "[20]"), sessions=3) == []


@pytest.mark.skipif(not find_spec("reasoning_gym"), reason="reasoning_gym is not installed")
def test_reasoning_gym_is_played_on_servers_of_one_session():
    import reasoning_gym

    tasks = [{"dataset_name": "leg_counting", "seed": seed, "size": 1} for seed in range(2)]
    with playing(command("reasoning_gym", 1), ANSWER, servers=2, sessions=1) as pool:
        for session, task in enumerate(tasks):
            right = reasoning_gym.create_dataset("leg_counting", seed=task["seed"], size=1)[0]
            assert pool.reset(session, task).result(60).observation == right["question"]
            result = pool.step(session, right["answer"] if session == 0 else "none").result(60)
            assert (result.terminated, result.observation, result.info["won"]) == (True, "", session == 0)
            assert (result.score, result.reward) == ((1.0, 1.0) if session == 0 else (0.0, 0.0))
        assert conforms(pool, ANSWER, tasks, ("12",), sessions=1) == []


def test_the_environment_that_openenv_begins_with_is_played(tmp_path, monkeypatch):
    done = subprocess.run(
        [sys.executable, "-m", "openenv.cli", "init", "echo_template"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    line = f"{sys.executable} -m uvicorn echo_template.server.app:app --app-dir {tmp_path} --port {{port}}"
    with playing(line, ECHO, servers=2, sessions=1) as pool:
        for session in range(2):
            assert pool.reset(session, {"seed": 1}).result(60).observation == "Echo Template environment ready!"
            result = pool.step(session, "hello").result(60)
            assert (result.observation, result.reward, result.done) == ("hello", 0.5, False)


def actions(*commands):
    return tuple(f"<action>{command}</action>" for command in commands)


# Our environments: a task and its actions, one line per environment.
OURS = {
    "echo": (lambda: {"word": "hi", "length": 3}, ("ho", "hi")),
    "alfworld": (
        lambda: household_tasks(GeneratorConfig(), "train", 0, range(1))[0].payload,
        (*actions("look", "inventory", "go to drawer 1"), "gibberish"),
    ),
    "webshop": (
        lambda: goal_tasks(open_shop(ShopConfig()), "train")[0].payload,
        (*actions("search[red lamp]", "click[next >]", "click[back to search]", "click[nowhere]"), "gibberish"),
    ),
    "swe": (
        lambda: whole_payload(generated_tasks("train")[0].payload),
        (block("execute_bash", command="ls; cat *.py | head -5"), "gibberish", block("finish")),
    ),
    "swe-choices": (lambda: generated_tasks("train")[0].payload, (*actions("run", "apply 1", "finish"),)),
}


@pytest.mark.parametrize("name", OURS)
def test_our_server_serves_their_client(name):
    if name.startswith("swe"):
        working_bubblewrap()
    task, said = OURS[name][0](), OURS[name][1]
    env = environment_spec(name).factory({})()
    with served(name) as (address, _), GenericEnvClient(base_url=f"http://{address}").sync() as client:
        found, wanted = client.reset(episode_id="e1", **task), env.reset(task)
        for count, text in enumerate(("", *said)):
            if count:
                found, wanted = client.step({"text": text}), env.step(text)
            assert found.observation["text"] == wanted.observation
            assert (found.reward, found.done) == (wanted.reward, wanted.done)
            assert found.observation["won"] == wanted.info["won"]
            assert found.observation["valid_action"] == wanted.info["valid_action"]
            assert client.state() == {"episode_id": "e1", "step_count": count}


def test_their_client_hears_our_errors():
    with served("echo") as (address, _), GenericEnvClient(base_url=f"http://{address}").sync() as client:
        client.reset(word="hi")
        assert client.step({"text": "hi"}).done
        with pytest.raises(RuntimeError, match="EXECUTION_ERROR"):
            client.step({"text": "hi"})
        with pytest.raises(RuntimeError, match="VALIDATION_ERROR"):
            client.step({"command": "hi"})
