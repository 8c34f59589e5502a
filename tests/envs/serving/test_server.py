"""The messages on the wire, and the life cycle of a server process."""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import pytest
from envs.servers import REPOSITORY, run_server, served
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from aem_jax.envs import protocol
from aem_jax.envs.protocol import EnvError, RefusedError, StepResult
from aem_jax.envs.registry import SERVED, environment_spec
from aem_jax.envs.serving import field_mapping, server
from aem_jax.envs.serving.client import RemoteEnvironment
from aem_jax.envs.serving.field_mapping import FieldMapping
from aem_jax.envs.serving.server import ACTION_SCHEMA, OBSERVATION_SCHEMA, ServerConfig
from aem_jax.envs.serving.session import Session, encode_result
from aem_jax.envs.suite import EnvironmentSpec
from aem_jax.envs.testing.echo import EchoEnv
from aem_jax.envs.testing.scripted import ScriptedEnv
from aem_jax.files import parse_mapping


@dataclass(frozen=True)
class _Inner:
    urls: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Outer:
    inner: _Inner = field(default_factory=_Inner)


def ask(session, request):
    """A session's answer to a raw request, as data."""
    return json.loads(session.answer(request if isinstance(request, (str, bytes)) else json.dumps(request)))


# The messages.


def test_an_episode_message_by_message():
    session = Session(EchoEnv(), send_admissible=False)
    assert ask(session, {"type": "state"}) == {"type": "state", "data": {"episode_id": None, "step_count": 0}}
    assert ask(session, {"type": "reset", "data": {"word": "hi", "length": 2, "episode_id": "e1"}}) == {
        "type": "observation",
        "data": {
            "observation": {
                "text": "say hi",
                "won": False,
                "terminated": False,
                "truncated": False,
                "valid_action": True,
                "admissible": None,
                "info": {"steps": 0},
            },
            "reward": 0.0,
            "done": False,
        },
    }
    step = ask(session, {"type": "step", "data": {"text": " "}})["data"]
    assert (step["observation"]["valid_action"], step["done"]) == (False, False)
    assert ask(session, {"type": "state"})["data"] == {"episode_id": "e1", "step_count": 1}
    last = ask(session, {"type": "step", "data": {"text": "hi", "metadata": {}}})["data"]
    assert (last["reward"], last["done"], last["observation"]["won"]) == (1.0, True, True)
    after = ask(session, {"type": "step", "data": {"text": "hi"}})
    assert (after["type"], after["data"]["code"]) == ("error", "EXECUTION_ERROR")
    assert session.answer('{"type": "close"}') is None


def test_after_a_failed_reset_there_is_no_episode():
    session = Session(ScriptedEnv(), send_admissible=False)
    ask(session, {"type": "reset", "data": {"seed": 1, "episode_id": "e1"}})
    ask(session, {"type": "step", "data": {"text": "x"}})
    assert ask(session, {"type": "reset", "data": {"seed": "bad", "episode_id": "e2"}})["type"] == "error"
    assert ask(session, {"type": "state"})["data"] == {"episode_id": None, "step_count": 0}


@pytest.mark.parametrize(("given", "kept"), [(0, "0"), ("e", "e"), (None, None), ("", None)])
def test_an_episode_has_the_id_that_it_is_given(given, kept):
    session = Session(EchoEnv(), send_admissible=False)
    ask(session, {"type": "reset", "data": {"episode_id": given}})
    named = ask(session, {"type": "state"})["data"]["episode_id"]
    assert named == kept if kept else len(named) == 36


def test_truncation_and_termination_are_distinct_on_the_wire():
    session = Session(EchoEnv(), send_admissible=False)
    session.answer('{"type": "reset", "data": {"length": 1}}')
    result = field_mapping.decode_result(
        session.answer('{"type": "step", "data": {"text": "x"}}') or "", FieldMapping()
    )
    assert (result.terminated, result.truncated, result.info["won"]) == (False, True, False)


def test_a_result_survives_the_wire():
    info = {"won": True, "valid_action": False, "score": 0.5, "admissible": ["a", "b"]}
    result = StepResult("ü€𝄞\ud800\x00", -0.1, True, False, info)
    arrived = field_mapping.decode_result(encode_result(result, send_admissible=True), FieldMapping())
    assert arrived == replace(result, observation="ü€𝄞\ufffd\x00")  # half a surrogate pair is no text
    without = field_mapping.decode_result(encode_result(result, send_admissible=False), FieldMapping())
    assert without.info == {name: value for name, value in info.items() if name != "admissible"}


def test_the_environments_own_mistakes_are_execution_errors():
    class Bad(EchoEnv):
        def step(self, action_text):
            if action_text == "exit":
                sys.exit(3)
            if action_text == "interrupt":
                raise KeyboardInterrupt("not Ctrl-C,\nand not in one line")
            return {"nan": StepResult("x", float("nan")), "type": "x", "raise": 1 / 1}[action_text]

        def close(self):
            raise OSError("cannot")

    session = Session(Bad(), send_admissible=False)
    for text, why in (
        ("exit", "SystemExit: 3 (line "),
        ("interrupt", "KeyboardInterrupt: not Ctrl-C, and not in one line (line "),
        ("nan", "expected a number, finite"),
        ("type", "expected a StepResult"),
    ):
        session.answer('{"type": "reset"}')
        reply = ask(session, {"type": "step", "data": {"text": text}})
        assert reply["data"]["code"] == "EXECUTION_ERROR" and why in reply["data"]["message"]
    session.close()


@pytest.mark.parametrize(
    "raw",
    [
        "rubbish",
        b"\xff\xfe",
        "[]",
        "7",
        "null",
        "{}",
        '{"type": "observation"}',
        '{"type": "state", "data": {}}',
        '{"type": "observation", "data": []}',
        '{"type": "observation", "data": {"observation": "x", "done": false}}',
        '{"type": "observation", "data": {"observation": {}, "reward": 0, "done": false}}',
        '{"type": "observation", "data": {"observation": {"text": 7}, "reward": 0, "done": false}}',
        "[" * 100_000,
    ],
)
def test_invalid_replies_are_env_errors(raw):
    with pytest.raises(EnvError, match="invalid reply"):
        field_mapping.decode_result(
            raw, FieldMapping(won_field="", truncated_field="", terminated_field="", info_field="")
        )


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"reward": float("nan")}, "finite reward"),
        ({"reward": "1"}, "finite reward"),
        ({"reward": 10**400}, "finite reward"),
        ({"reward": 1e39}, "finite reward"),
        ({"done": "yes"}, "done flag"),
        ({"done": None}, "done flag"),
        ({"won": 1}, "'won'"),
        ({"info": 3}, "'info'"),
        ({"done": True, "terminated": False, "truncated": False}, "terminated or truncated"),
    ],
)
def test_every_field_of_a_reply_is_checked(change, why):
    data = json.loads(encode_result(StepResult("x"), send_admissible=False))["data"]
    for name, value in change.items():
        (data if name in data else data["observation"])[name] = value
    with pytest.raises(EnvError, match=why):
        field_mapping.decode_result(json.dumps({"type": "observation", "data": data}), FieldMapping())


def test_a_foreign_servers_fields_are_mapped():
    mapping = FieldMapping(
        action_field="command",
        action_constants='{"session": "s", "timeout": 3}',
        text_field="result.stdout",
        won_field="",
        truncated_field="cut",
        terminated_field="",
        valid_field="",
        admissible_field="",
        info_field="",
    )
    request = json.loads(field_mapping.step_encoder(mapping)("ls"))
    assert request == {"type": "step", "data": {"session": "s", "timeout": 3, "command": "ls"}}

    def reply(cut, reward, done):
        observation = {"result": {"stdout": "a.py"}, "cut": cut, "more": [1]}
        raw = json.dumps({"type": "observation", "data": {"observation": observation, "reward": reward, "done": done}})
        return field_mapping.decode_result(raw, mapping)

    def info(won):
        return {"won": won, "valid_action": True}

    assert reply(False, None, False) == StepResult("a.py", 0.0, info=info(False))
    assert reply(False, True, True) == StepResult("a.py", 1.0, terminated=True, info=info(True))
    assert reply(True, 1.0, True) == StepResult("a.py", 1.0, truncated=True, info=info(False))
    unmapped = field_mapping.decode_result(
        '{"type": "observation", "data": {"observation": {"a": 1}, "reward": 0, "done": false}}',
        FieldMapping("x", "{}", "", "", "", "", "", "", ""),
    )
    assert unmapped.observation == '{"a": 1}'


def test_bad_action_constants_are_refused():
    for constants in ("{", "[]"):
        with pytest.raises(ValueError, match="expected action_constants as a JSON mapping"):
            field_mapping.step_encoder(FieldMapping(action_constants=constants))


def test_a_task_that_is_no_json_is_refused():
    for task in ({"x": object()}, {"x": float("nan")}):
        with pytest.raises(ValueError, match="expected a task as a mapping of plain JSON"):
            field_mapping.encode_reset(task)


# Names and settings.


def test_names_and_settings_are_checked_with_the_nearest_named():
    with pytest.raises(ValueError, match="got 'alfwrld'; did you mean 'alfworld'"):
        environment_spec("alfwrld")
    with pytest.raises(ValueError, match="'lenght'; did you mean 'length'"):
        environment_spec("echo").factory({"lenght": 3})
    for text in ("{", "[1]"):
        with pytest.raises(ValueError, match="expected settings as a JSON mapping"):
            parse_mapping(text, "settings")
    with pytest.raises(ValueError, match="expected at least one session"):
        ServerConfig(sessions=0)
    with pytest.raises(ValueError, match="expected a port"):
        ServerConfig(port=70000)


def test_settings_become_nested_configs_and_tuples():
    spec = EnvironmentSpec(lambda config: EchoEnv, "for this test", config=_Outer)
    mapping = spec.configured({"inner": {"urls": ["a", "b"]}})
    assert mapping == _Outer(_Inner(("a", "b")))


# The process.


def test_pages_and_raw_socket():
    with served("echo", "--send-admissible") as (address, _):
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        pages = {page: json.load(opener.open(f"http://{address}/{page}")) for page in ("health", "metadata", "schema")}
        assert pages["health"] == {"status": "healthy"}
        assert pages["metadata"]["name"] == "echo"
        assert pages["schema"]["action"] == ACTION_SCHEMA and pages["schema"]["observation"] == OBSERVATION_SCHEMA
        with pytest.raises(urllib.error.HTTPError, match="404"):
            opener.open(f"http://{address}/other")
        with connect(f"ws://{address}/ws", proxy=None) as socket:
            socket.send('{"type":"reset","data":{"seed":42,"word":"hi"}}')
            observation = json.loads(socket.recv())["data"]["observation"]
            assert observation["admissible"] == ["say", "hi"]
            assert set(observation) == set(OBSERVATION_SCHEMA["required"])
            socket.send("x" * (protocol.MAX_MESSAGE_BYTES + 1))  # ends only this session
        env = RemoteEnvironment(address)
        assert env.reset({"word": "hi"}).info["admissible"] == ["say", "hi"]
        assert env.state()["step_count"] == 0
        env.close()
        env.close()
        with pytest.raises(EnvError, match="ConnectionClosed"):
            env.step("x")


def test_an_environment_that_cannot_be_made_later_is_a_factory_error():
    calls = iter(range(3))

    def make():
        if next(calls):
            raise OSError("no more")
        return EchoEnv()

    async def converse():
        ready = asyncio.get_running_loop().create_future()
        spec = environment_spec("echo")
        task = asyncio.create_task(server._run("echo", make, spec, ServerConfig(port=0), ready.set_result))
        port = await ready
        replies = await asyncio.to_thread(lambda: [_one_reply(port), _one_reply(port)])
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return replies

    first, second = asyncio.run(converse())
    assert first["type"] == "state"
    assert (second["type"], second["data"]["code"]) == ("error", "FACTORY_ERROR")
    assert "no more" in second["data"]["message"]


def _one_reply(port):
    with connect(f"ws://127.0.0.1:{port}/ws", proxy=None) as socket:
        with contextlib.suppress(ConnectionClosed):  # the server may have refused and closed already
            socket.send(protocol.STATE_REQUEST)
        return json.loads(socket.recv())


def test_a_bad_command_line_is_one_line_of_error():
    assert run_server("ecko") == (
        2,
        f"error: expected an environment of {', '.join(SERVED)}, or file.py:attribute, got 'ecko'; "
        "did you mean 'echo'?\n",
    )
    status, error = run_server("echo", settings={"lenght": 1})
    assert status == 2 and error.startswith("error: expected settings of EchoConfig") and error.count("\n") == 1
    status, error = run_server("echo", "--sessions", "0")
    assert (status, error) == (2, "error: expected at least one session, got 0\n")


def test_a_taken_port_is_one_line_of_error():
    with served("echo") as (address, _):
        status, error = run_server("echo", "--port", address.partition(":")[2])
        assert status == 2 and "error: " in error and "address already in use" in error and error.count("\n") == 1


UNRULY = """
import sys, threading, time
from aem_jax.envs.testing.echo import EchoEnv

print("hello from import")

class Unruly(EchoEnv):
    def step(self, action_text):
        if action_text == "read":
            return super().step(repr(sys.stdin.readline()))
        return super().step(action_text)

    def close(self):
        if threading.current_thread() is threading.main_thread():
            raise SystemExit
        time.sleep(600)
"""


def test_an_environment_that_reads_stdin_or_never_closes_harms_no_server(tmp_path):
    """Only the server reads the parent's stdin. The server does not wait for a slow close."""
    (tmp_path / "env.py").write_text(UNRULY)
    script = "import sys; from aem_jax.envs.serving import server; server._CLOSE_S = 0.2; sys.exit(server.main())"
    command = [sys.executable, "-c", script, f"{tmp_path}/env.py:Unruly", "--port", "0", "--with-parent"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=REPOSITORY, text=True, stdin=pipe, stdout=pipe, stderr=pipe) as process:
        assert process.stdin and process.stdout and process.stderr
        env = RemoteEnvironment(f"127.0.0.1:{json.loads(process.stdout.readline())['port']}")
        env.reset({})
        assert env.step("read").observation == "1: ''"
        env.close()
        process.stdin.close()  # as when the parent ends
        assert process.wait(10) == 0
        output = process.stderr.read()
        assert "hello from import" in output and "Unruly.close takes more than 0.2 s" in output


SLOW_START = "import os, time\nos.write(2, b'importing\\n')\ntime.sleep(600)\n"


@pytest.mark.parametrize("module", ["aem_jax.envs.serving.server", "aem_jax.launch serve"])
def test_ctrl_c_while_a_server_starts_is_quiet(tmp_path, module):
    (tmp_path / "slow.py").write_text(SLOW_START)
    command = [sys.executable, "-m", *module.split(), f"{tmp_path}/slow.py:Env"]
    with subprocess.Popen(
        command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr
        while process.stderr.readline() != "importing\n":
            pass
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130
        assert process.stderr.read() == ""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_server_and_its_sessions(number):
    with served("echo") as (address, process):
        env = RemoteEnvironment(address)
        env.reset({})
        process.send_signal(number)
        assert process.wait(10) == 0
        with pytest.raises(EnvError):
            env.step("x")


def test_a_signal_ends_a_server_whose_environment_hangs():
    with served("echo-slow") as (address, process):
        env = RemoteEnvironment(address, deadline_s=0.3)
        with pytest.raises(EnvError, match="TimeoutError"):
            env.reset({"fault": {"kind": "hang"}})
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 1


def test_blocking_environments_do_not_wait_for_each_other():
    with served("echo-slow", settings={"step_latency_s": 0.5}) as (address, _):
        environments = [RemoteEnvironment(address) for _ in range(4)]
        for env in environments:
            env.reset({})
        begin = time.monotonic()
        with ThreadPoolExecutor(4) as threads:
            list(threads.map(lambda env: env.step("x"), environments))
        assert time.monotonic() - begin < 1.5  # not 4 x 0.5


SLOW_CLOSE = """
import time
from aem_jax.envs.testing.echo import EchoEnv

class Slow(EchoEnv):
    alive = 0

    def __init__(self):
        super().__init__()
        Slow.alive += 1

    def reset(self, task):
        return super().reset({"word": f"alive {Slow.alive}"})

    def close(self):
        time.sleep(0.5)
        Slow.alive -= 1
"""


@pytest.mark.parametrize("cut", [False, True])
def test_a_place_is_free_once_its_environment_has_closed(tmp_path, cut):
    """The number of sessions is that of living environments, whether a client says goodbye or vanishes."""
    (tmp_path / "slow.py").write_text(SLOW_CLOSE)
    with served(f"{tmp_path}/slow.py:Slow", "--sessions", "1") as (address, _):
        for _ in range(3):
            deadline = time.monotonic() + 10
            while not _plays_alone(address, cut=cut):
                assert time.monotonic() < deadline
                time.sleep(0.02)


def _plays_alone(address, *, cut):
    """Starts an episode and ends its session; False if the server is full."""
    with connect(f"ws://{address}/ws", proxy=None) as socket:
        with contextlib.suppress(ConnectionClosed):  # it is full and has closed
            socket.send('{"type": "reset"}')
        reply = json.loads(socket.recv())
        if reply["type"] == "error":
            assert reply["data"]["code"] == "CAPACITY_REACHED"
            return False
        assert reply["data"]["observation"]["text"] == "say alive 1"
        if cut:
            socket.socket.shutdown(2)
        else:
            socket.send(protocol.CLOSE_REQUEST)
            with pytest.raises(ConnectionClosed):  # the server closes the connection after the environment
                socket.recv(timeout=10)
    return True


def test_an_environment_that_never_closes_does_not_keep_its_place(tmp_path):
    (tmp_path / "slow.py").write_text(SLOW_CLOSE.replace("0.5", "600 * (Slow.alive > 1)"))
    script = (
        "import sys; from aem_jax.envs.serving import server; server._CLOSE_S = server._PLACE_S = 0.2; "
        "sys.exit(server.main())"
    )
    command = [sys.executable, "-c", script, f"{tmp_path}/slow.py:Slow", "--port", "0", "--sessions", "2"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=REPOSITORY, text=True, stdout=pipe, stderr=pipe) as process:
        assert process.stdout and process.stderr
        address = f"127.0.0.1:{json.loads(process.stdout.readline())['port']}"
        environments = [RemoteEnvironment(address) for _ in range(2)]
        for env in environments:
            env.reset({})
        environments[0].close()
        time.sleep(1.0)
        assert RemoteEnvironment(address).reset({}).observation == "say alive 3"
        process.send_signal(signal.SIGTERM)
        process.wait(20)
        assert "an environment takes more than 0.2 s to close; its place is given away" in process.stderr.read()


def test_a_refusal_carries_its_code():
    with served("echo") as (address, _):
        env = RemoteEnvironment(address)
        with pytest.raises(RefusedError, match="expected a reset before this step") as caught:
            env.step("x")
        assert caught.value.code == "EXECUTION_ERROR"
        assert env.reset({"word": "a"}).observation == "say a"


def test_no_server_at_the_address():
    with pytest.raises(EnvError, match=r"expected an environment server at ws://127.0.0.1:1/ws: ConnectionRefused"):
        RemoteEnvironment("127.0.0.1:1")


PARENT = """
import subprocess, sys
server = subprocess.Popen(
    [sys.executable, "-m", "aem_jax.envs.serving.server", "echo", "--port", "0", "--with-parent"],
    stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True)
server.stdout.readline()
print(server.pid, flush=True)
sys.stdin.read()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a stopped process is reached by Linux's parent-death signal alone")
@pytest.mark.parametrize("stopped", [False, True])
def test_a_server_ends_with_its_parent_even_if_that_is_killed(stopped):
    parent = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(PARENT)],
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout
    child = int(parent.stdout.readline())
    if stopped:
        os.kill(child, signal.SIGSTOP)
    parent.kill()
    parent.communicate()
    deadline = time.monotonic() + 10
    while _alive(child):
        assert time.monotonic() < deadline, "the server outlived its parent"
        time.sleep(0.02)


def _alive(pid):
    """Whether a process runs; a zombie that nobody has collected does not."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_output_of_an_engine_does_not_hide_the_port():
    script = textwrap.dedent("""
        import os, sys
        from aem_jax.envs.serving import server
        from aem_jax.envs.testing import echo
        class Noisy(echo.EchoEnv):
            def __init__(self, config):
                print("hello from an engine"); os.write(1, b"and from its C++\\n")
                super().__init__(config)
        echo.EchoEnv = Noisy
        sys.exit(server.main(["echo", "--port", "0"]))
    """)
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", script], cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout
    port = json.loads(process.stdout.readline())["port"]
    assert RemoteEnvironment(f"127.0.0.1:{port}").reset({"word": "a"}).observation == "say a"
    process.kill()
    out, err = process.communicate()
    assert out == "" and "hello from an engine\n" in err and "and from its C++\n" in err
