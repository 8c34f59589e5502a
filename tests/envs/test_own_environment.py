"""Environments and servers outside this package, named by a path or started by a command."""

import json
import os
import re
import signal
import sys

import pytest
from envs.servers import REPOSITORY, run_server, served

from aem_jax.envs.play import play
from aem_jax.envs.protocol import EnvError
from aem_jax.envs.registry import environment_spec
from aem_jax.envs.serving.client import RemoteEnvironment
from aem_jax.envs.serving.pool import EnvPool, PoolConfig
from aem_jax.envs.serving.session import Session

SOURCE = '''
from dataclasses import dataclass
from aem_jax.envs.protocol import StepResult


@dataclass
class Parrot:
    """Says everything twice."""

    between: str = " "

    def reset(self, task):
        return StepResult(task["word"], info={"won": False, "valid_action": True})

    def step(self, action_text):
        text = f"{action_text}{self.between}{action_text}"
        return StepResult(text, 1.0, terminated=True, info={"won": True, "valid_action": True})

    def close(self):
        pass


def mute():
    return object()


def boom():
    raise RuntimeError("no display\\nhere")


class Bad(Parrot):
    def reset(self, task):
        return task["word"]


class Vague(Parrot):
    def step(self, action_text):
        return StepResult(b"bytes")


SILENT = None
'''


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "parrot.py"
    path.write_text(SOURCE)
    (tmp_path / "parrot.py.late.py").write_text("{}['DISPLAY']\n")
    return path


def test_an_environment_in_a_file_is_served(source):
    with served(f"{source}:Parrot", settings={"between": "-"}) as (address, _):
        env = RemoteEnvironment(address)
        assert env.reset({"word": "hello"}).observation == "hello"
        assert env.step("polly").observation == "polly-polly"
        env.close()
    assert environment_spec(f"{source}:Parrot").description == "Says everything twice."


def test_an_environment_in_a_module_is_served(source, monkeypatch):
    monkeypatch.syspath_prepend(str(source.parent))
    env = environment_spec("parrot:Parrot").factory({})()
    assert env.step("a").observation == "a a"


@pytest.mark.parametrize(
    ("name", "settings", "why"),
    [
        (
            "{source}:Parot",
            {},
            "that makes an environment, got 'Parot'; did you mean 'Parrot'",
        ),
        ("{source}:SILENT", {}, "that makes an environment, got 'SILENT'"),
        (
            "{source}:Parrot",
            {"betwen": "-"},
            "expected settings that .* can be called with, got {'betwen': '-'}",
        ),
        ("{source}:mute", {}, "expected an environment with reset, step and close from .*:mute, got no reset"),
        (
            "{source}:boom",
            {},
            r"expected an environment from .*:boom, got RuntimeError: no display here \(line 28 of .*parrot.py\)",
        ),
        ("{source}.late.py:Parrot", {}, r"got '.*late.py': KeyError: 'DISPLAY' \(line 1 of .*late.py\)"),
        ("nowhere.py:Parrot", {}, "expected a Python file or module to import, got 'nowhere.py': no such file in "),
        ("no.such.module:Parrot", {}, "expected a Python file or module to import, got 'no.such.module'"),
        (":Parrot", {}, "expected an environment of alfworld, .* or file.py:attribute, got ':Parrot'"),
    ],
)
def test_an_invalid_environment_is_refused_with_its_reason(source, name, settings, why):
    with pytest.raises(ValueError, match=why):
        environment_spec(name.format(source=source)).factory(settings)()


def test_a_server_refuses_an_invalid_environment(source):
    status, error = run_server(f"{source}:boom")
    assert (status, error.count("\n")) == (2, 1) and "RuntimeError: no display here (line 28 of" in error
    with pytest.raises(ValueError) as error:
        environment_spec(f"{source}:boom").factory({})()
    assert isinstance(error.value.__cause__, RuntimeError)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        (
            "Bad",
            r"as info from Bad.reset, got str 'hello'; return aem_jax.envs.protocol.StepResult\(observation, reward",
        ),
        ("Vague", "from Vague.step, got bytes b'bytes' as observation"),
    ],
)
def test_an_invalid_result_is_an_error_with_its_reason(source, name, why):
    env = environment_spec(f"{source}:{name}").factory({})()
    with pytest.raises(ValueError, match=why):
        play(env, {"word": "hello"}, lambda result: "polly", 2)
    session = Session(env, send_admissible=False)
    replies = [
        session.answer(json.dumps({"type": kind, "data": data}))
        for kind, data in (("reset", {"word": "hello"}), ("step", {"text": "polly"}))
    ]
    messages = [json.loads(reply or "")["data"].get("message", "") for reply in replies]
    assert re.search(why, messages[name == "Vague"]), messages


ECHO = f"{sys.executable} -m aem_jax.envs.serving.server echo --sessions 1 --port {{port}}"


def small(command, **changes):
    return PoolConfig(command=command, num_servers=2, sessions_per_server=1, first_pause_s=0.05, **changes)


def test_a_command_starts_a_server_for_each_session_and_again_when_it_dies(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    with EnvPool(small(ECHO), ("", {})) as pool:
        assert pool.capacity == 2 and len(set(pool.server_pids)) == 2
        for session, word in enumerate(("a", "b")):
            assert pool.reset(session, {"word": word}).result(10).observation == f"say {word}"
        dead = pool.server_pids[0]
        os.kill(dead, signal.SIGKILL)
        with pytest.raises(EnvError, match="killed by SIGKILL|ConnectionClosed"):
            pool.step(0, "x").result(10)
        assert pool.step(1, "b").result(10).info["won"]
        assert pool.reset(0, {"word": "c"}).result(30).observation == "say c"
        assert pool.stats().restarts == (1, 0)
        alive = pool.server_pids
        assert dead not in alive
    for pid in alive:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.mark.parametrize(
    ("command", "deadline_s", "why"),
    [
        ("no-such-program {port}", 60, r"program \{port\}' did not start \(exit status 1\); output:\nno-such-program"),
        ("sh -c 'echo broken; exit 3' {port}", 60, r"did not start \(exit status 3\); output:\nbroken"),
        ("sh -c 'sleep 600' {port}", 1, "was not up in 1 s"),
    ],
)
def test_a_command_that_starts_no_server_is_an_error_with_its_reason(command, deadline_s, why):
    with pytest.raises(EnvError, match=why):
        EnvPool(small(command, start_deadline_s=deadline_s), ("", {}))


@pytest.mark.parametrize(("command", "urls"), [("serve", ()), ("serve {port}", ("a:1",))])
def test_a_command_needs_a_port_and_excludes_urls(command, urls):
    with pytest.raises(ValueError, match=r"expected command with \{port\} in it and no urls beside it"):
        PoolConfig(urls, command)
