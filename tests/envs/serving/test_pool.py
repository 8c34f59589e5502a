"""The pool's contract, and its errors. test_pool_chaos tests servers that fail in use."""

import asyncio
import contextlib
import dataclasses
import json
import os
import re
import signal
import threading
import time
from concurrent.futures import Future
from unittest.mock import AsyncMock, Mock

import pytest
from envs.servers import foreign_server, served
from websockets.exceptions import ConnectionClosed

from aem_jax.envs import protocol
from aem_jax.envs.protocol import EnvError, LostError, RefusedError
from aem_jax.envs.serving.address import bearer
from aem_jax.envs.serving.client import RemoteEnvironment
from aem_jax.envs.serving.field_mapping import FieldMapping, decode_step
from aem_jax.envs.serving.pool import EnvPool, PoolConfig
from aem_jax.envs.serving.pool_session import Clock, Connection, PoolSession
from aem_jax.envs.serving.supervisor import Supervisor

SMALL = PoolConfig(num_servers=2, sessions_per_server=2, first_pause_s=0.05)


def gone(pid):
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    return True


def test_sessions_are_separate_and_spread_over_the_servers():
    with EnvPool(SMALL, ("echo", {"length": 3})) as pool:
        assert pool.capacity == 4 and len(set(pool.server_pids)) == 2
        assert [pool.server_of(session) for session in range(4)] == [0, 1, 0, 1]
        firsts = [pool.reset(session, {"word": f"w{session}"}) for session in range(4)]
        assert all(isinstance(future, Future) for future in firsts)
        assert [future.result(10).observation for future in firsts] == ["say w0", "say w1", "say w2", "say w3"]
        for step in range(1, 4):
            futures = [pool.step(session, f"{session}") for session in range(4)]
            results = [future.result(10) for future in futures]
            assert [result.observation for result in results] == [f"{step}: {session}" for session in range(4)]
            assert [result.truncated for result in results] == [step == 3] * 4
        assert pool.step(0, "more").exception(10) is not None  # the episode is over
        assert pool.reset(0, {"word": "again"}).result(10).observation == "say again"
        assert pool.stats().calls == 18 and pool.stats().failed_calls == 1 and pool.stats().restarts == (0, 0)


def test_a_reset_in_the_middle_of_an_episode():
    with EnvPool(PoolConfig(num_servers=1, sessions_per_server=1), ("echo", {})) as pool:
        pool.reset(0, {}).result(10)
        pool.step(0, "a").result(10)
        pool.reset(0, {}).result(10)
        assert pool.step(0, "b").result(10).observation == "1: b"


def test_a_step_before_any_reset_is_an_env_error():
    with EnvPool(SMALL, ("echo", {})) as pool:
        with pytest.raises(RefusedError, match="expected a reset before this step"):
            pool.step(1, "x").result(10)
        assert pool.reset(1, {"word": "a"}).result(10).observation == "say a"


def test_admissible_actions_are_sent_only_with_send_admissible():
    for wanted in (False, True):
        config = PoolConfig(num_servers=1, sessions_per_server=1, send_admissible=wanted)
        with EnvPool(config, ("echo", {})) as pool:
            assert ("admissible" in pool.reset(0, {}).result(10).info) == wanted


def test_close_ends_servers_and_calls_under_way():
    pool = EnvPool(SMALL, ("echo-slow", {"step_latency_s": 30.0}))
    pool.reset(0, {}).result(10)
    future, pids = pool.step(0, "x"), pool.server_pids
    begin = time.monotonic()
    pool.close()
    pool.close()
    assert time.monotonic() - begin < 5
    with pytest.raises(EnvError, match="the pool was closed"):
        future.result(0)
    assert all(gone(pid) for pid in pids)
    with pytest.raises(ValueError, match="expected an open pool"):
        pool.reset(0, {})


def test_misuse_is_refused_at_once():
    with EnvPool(SMALL, ("echo-slow", {"step_latency_s": 0.3})) as pool:
        for session in (-1, 4):
            with pytest.raises(ValueError, match=f"expected a session from 0 to 3, got {session}"):
                pool.reset(session, {})
        with pytest.raises(ValueError, match="expected a task as a mapping of plain JSON values"):
            pool.reset(0, {"x": object()})
        pool.reset(0, {}).result(10)
        future = pool.step(0, "x")
        with pytest.raises(ValueError, match="expected one call at a time on session 0"):
            pool.step(0, "y")
        assert not future.cancel()
        assert future.result(10).observation == "1: x"
        assert pool.step(0, "y").result(10).observation == "2: y"


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_servers", 0), ("sessions_per_server", 0), ("step_deadline_s", 0.0), ("restart_wait_s", float("nan"))],
)
def test_bad_config_values(field, value):
    with pytest.raises(ValueError, match=f"expected {field} "):
        PoolConfig(**{field: value})
    with pytest.raises(ValueError, match="expected urls beside token_variable, got none"):
        PoolConfig(token_variable="TOKEN")
    for url in ("my-space.hf.space", "ws://a:1", "http://localhost.evil.org"):
        with pytest.raises(ValueError, match="expected urls of https:// or wss:// beside token_variable, got"):
            PoolConfig((url,), token_variable="TOKEN")
    for url in ("https://my-space.hf.space", "wss://a:1", "localhost:8000", "ws://127.0.0.1:1/ws"):
        PoolConfig((url,), token_variable="TOKEN")


def test_a_failure_is_blamed_on_the_process_that_was_connected_to(monkeypatch):
    """A session connects to a server process that is then replaced. Its failure does not restart the new process."""

    class Dead:
        usable = True

        async def call(self, request, on_waiting):
            raise ConnectionResetError

        def abort(self):
            pass

    async def connect(*_, **__):
        return Dead()

    async def run():
        server = Supervisor(0, "", AsyncMock(), 0.01, lambda *failure: failures.append(failure), restarts.append)
        server.process = old
        server.up.set()
        session = PoolSession(0, server, PoolConfig(), Clock())
        await session._connect(1.0)
        server.process = new
        with pytest.raises(LostError):
            await session.call("{}", 1.0, decode_step)
        assert server.up.is_set() and server.process is new and not failures
        await session._connect(1.0)
        session._expires = 0.0
        server.failed(old, "once more")
        assert server.up.is_set() and not failures
        session.end_if_expired()
        assert not server.up.is_set() and len(failures) == 1  # this failure is the new process's
        restarts.pop().close()

    failures, restarts, old, new = [], [], Mock(pid=1, port=1), Mock(pid=2, port=1)
    monkeypatch.setattr(Connection, "open", connect)
    asyncio.run(run())


# Starting.


def test_an_unknown_environment():
    with pytest.raises(ValueError, match="got 'ecko'; did you mean 'echo'"):
        EnvPool(SMALL, ("ecko", {}))


def test_a_failed_start_quotes_the_servers_output():
    with pytest.raises(EnvError) as caught:
        EnvPool(SMALL, ("echo", {"lenght": 3}))
    assert "environment server 'echo' did not start (exit status 2); output:" in str(caught.value)
    assert "'lenght'; did you mean 'length'?" in str(caught.value)


def test_a_start_that_takes_too_long():
    begin = time.monotonic()
    with pytest.raises(EnvError, match=r"environment server 'echo' was not up in 0\.5 s"):
        EnvPool(PoolConfig(start_deadline_s=0.5), ("echo", {"make_latency_s": 30.0}))
    assert time.monotonic() - begin < 10


def test_a_slow_start_is_waited_for():
    with EnvPool(PoolConfig(num_servers=1, sessions_per_server=1), ("echo", {"make_latency_s": 1.0})) as pool:
        assert pool.reset(0, {"word": "a"}).result(10).observation == "say a"


def test_no_server_at_a_url():
    with pytest.raises(EnvError, match=r"environment server 0 \(ws://127.0.0.1:1/ws\) did not come back in time"):
        EnvPool(PoolConfig(urls=("127.0.0.1:1",), restart_wait_s=1.0), ("", {}))


def test_too_few_sessions_at_a_url():
    with served("echo", "--sessions", "1") as (address, _):
        config = PoolConfig(urls=(address,), sessions_per_server=2, first_pause_s=0.5)
        with pytest.raises(EnvError, match=r"expected 2 sessions on environment server 0 .* CAPACITY_REACHED"):
            EnvPool(config, ("", {}))


# Deadlines.


def test_a_missed_deadline_names_session_and_server():
    config = PoolConfig(num_servers=1, sessions_per_server=1, reset_deadline_s=5.0, step_deadline_s=0.5)
    with EnvPool(config, ("echo", {})) as pool:
        pool.reset(0, {"fault": {"kind": "hang", "step": 1}}).result(10)
        begin = time.monotonic()
        message = (
            f"session 0: environment server 0 (pid {pool.server_pids[0]}): session 0 had no answer before its deadline"
        )
        with pytest.raises(EnvError, match=re.escape(message)):
            pool.step(0, "x").result(10)
        assert 0.4 < time.monotonic() - begin < 3
        with pytest.raises(EnvError, match="session 0 has no episode, reset it"):
            pool.step(0, "x").result(10)
        assert pool.reset(0, {"word": "a"}).result(10).observation == "say a"


def test_servers_are_not_blamed_for_the_time_in_which_this_process_was_stopped():
    config = PoolConfig(num_servers=1, sessions_per_server=2, step_deadline_s=1.0)
    with EnvPool(config, ("echo-slow", {"step_latency_s": 0.3})) as pool:
        for session in range(2):
            pool.reset(session, {}).result(10)
        futures = [pool.step(session, "x") for session in range(2)]
        pool._loop.call_soon_threadsafe(time.sleep, 3.0)  # like a suspended process
        assert [future.result(10).observation for future in futures] == ["1: x", "1: x"]
        assert pool.stats().restarts == (0,)


def test_a_reset_does_not_wait_for_ever_for_a_server_that_stays_away(tmp_path):
    config = PoolConfig(num_servers=1, sessions_per_server=1, restart_wait_s=1.0, start_deadline_s=30.0)
    with EnvPool(config, ("echo", {})) as pool:
        pool._servers[0]._launch = _fails  # later starts fail
        os.kill(pool.server_pids[0], signal.SIGKILL)
        with pytest.raises(EnvError):
            pool.reset(0, {}).result(10)
        begin = time.monotonic()
        with pytest.raises(EnvError, match="did not come back in time: no memory"):
            pool.reset(0, {}).result(10)
        assert time.monotonic() - begin < 5
        assert any("could not be started again: no memory" in error for error in pool.stats().errors)


async def _fails():
    raise EnvError("no memory")


def test_an_exception_in_an_environment_is_quoted():
    with EnvPool(PoolConfig(num_servers=1, sessions_per_server=1), ("echo", {})) as pool:
        pool.reset(0, {"fault": {"kind": "raise", "step": 1}}).result(10)
        with pytest.raises(RefusedError, match="EXECUTION_ERROR: RuntimeError: scripted fault"):
            pool.step(0, "x").result(10)
        assert pool.stats().restarts == (0,)
        assert pool.reset(0, {"word": "a"}).result(10).observation == "say a"  # in a fresh environment


def test_a_request_above_the_size_limit_is_refused_before_it_is_sent():
    """It costs no connection, and the server's other sessions go on."""
    with EnvPool(PoolConfig(num_servers=1, sessions_per_server=2), ("echo", {})) as pool:
        pool.reset(1, {}).result(10)
        message = r"expected a request of at most 16 MiB \(a task, or a response of the policy\), got 17.0 MiB"
        with pytest.raises(EnvError, match=message):
            pool.reset(0, {"word": "a" * (17 << 20)}).result(10)
        assert pool.reset(0, {"word": "a"}).result(10).observation == "say a"
        with pytest.raises(EnvError, match=message):
            pool.step(0, "a" * (17 << 20)).result(10)
        assert pool.step(0, "b").result(10).observation == "1: b"
        assert pool.step(1, "c").result(10).observation == "1: c"
        assert pool.stats().restarts == (0,)


def test_a_connection_that_the_server_has_closed_can_be_aborted():
    async def run(address):
        connection = await Connection.open(f"ws://{address}/ws", timeout_s=10)
        with pytest.raises(ConnectionClosed):
            await connection.call("x" * (protocol.MAX_MESSAGE_BYTES + 1))
        await connection._socket.wait_closed()
        connection.abort()

    with served("echo") as (address, _):
        asyncio.run(run(address))


ALONE = """
import time
from aem_jax.envs.testing.echo import EchoEnv

ALIVE = []


class Alone(EchoEnv):
    def __init__(self):
        super().__init__()
        if ALIVE:
            raise RuntimeError("the port is in use")
        ALIVE.append(self)

    def close(self):
        time.sleep(0.5)
        ALIVE.clear()
"""


def test_a_session_that_is_opened_again_waits_for_the_close_of_the_previous_one(tmp_path):
    (tmp_path / "alone.py").write_text(ALONE)
    with EnvPool(PoolConfig(num_servers=1, sessions_per_server=1), (f"{tmp_path}/alone.py:Alone", {})) as pool:
        for word in ("a", "b", "c"):
            assert pool.reset(0, {"word": word}).result(10).observation == f"say {word}"
            pool.step(0, "x").result(10)
            pool.release(0)  # in the middle of an episode
        assert pool.stats().errors == ()


def test_released_sessions_meet_no_capacity_limit():
    with EnvPool(PoolConfig(num_servers=1, sessions_per_server=4, first_pause_s=5.0), ("echo", {})) as pool:
        for _ in range(20):
            for future in [pool.reset(session, {"word": "a"}) for session in range(4)]:
                assert future.result(4).observation == "say a"  # no pause
            for session in range(4):
                pool.release(session)
        assert pool.stats().errors == () and pool.stats().failed_calls == 0


# Foreign servers.


def test_own_servers_started_by_hand():
    with served("echo", "--sessions", "2") as (one, _), served("echo", "--sessions", "2") as (other, _):
        config = PoolConfig(urls=(one, f"ws://{other}/ws"), sessions_per_server=2)
        with EnvPool(config, ("", {})) as pool:
            assert pool.capacity == 4 and pool.server_pids == ()
            for session in range(4):
                assert pool.reset(session, {"word": f"w{session}"}).result(10).observation == f"say w{session}"
        with EnvPool(config, ("", {})) as pool:  # the first pool left no session behind
            assert pool.reset(3, {"word": "a"}).result(10).observation == "say a"


def test_a_restarted_server_at_a_url_is_connected_to_again():
    config_of = lambda address: PoolConfig(urls=(address,), sessions_per_server=2, first_pause_s=0.05)
    with contextlib.ExitStack() as stack:
        address, process = stack.enter_context(served("echo"))
        pool = stack.enter_context(EnvPool(config_of(address), ("", {})))
        pool.reset(0, {}).result(10)
        process.kill()
        process.wait()
        with pytest.raises(EnvError, match=re.escape(f"environment server 0 (ws://{address}/ws)")):
            pool.step(0, "x").result(10)
        future = pool.reset(0, {"word": "a"})
        time.sleep(0.5)
        assert not future.done()
        stack.enter_context(served("echo", port=int(address.partition(":")[2])))
        assert future.result(20).observation == "say a"
        assert pool.reset(1, {"word": "b"}).result(20).observation == "say b"


def test_a_foreign_server_under_a_mapping():
    received = []

    def reply(message):
        received.append(message)
        if message["type"] == "state":
            return '{"type": "state", "data": {"step_count": 0}}'
        done = message["type"] == "step"
        observation = {"echoed_message": message["data"].get("message", "ready"), "message_length": 5}
        data = {"observation": observation, "reward": 0.5 if done else None, "done": done}
        return json.dumps({"type": "observation", "data": data})

    mapping = FieldMapping("message", "{}", "echoed_message", "", "", "", "", "", "")
    with foreign_server(reply) as address:
        config = PoolConfig(urls=(address,), sessions_per_server=1, field_mapping=mapping)
        with EnvPool(config, ("", {})) as pool:
            assert pool.reset(0, {"seed": 3}).result(10).observation == "ready"
            result = pool.step(0, "hello").result(10)
            assert (result.observation, result.reward, result.terminated) == ("hello", 0.5, True)
            assert result.info == {"won": True, "valid_action": True}
    assert received[1:3] == [{"type": "reset", "data": {"seed": 3}}, {"type": "step", "data": {"message": "hello"}}]


def test_a_server_that_wants_a_token(monkeypatch):
    def reply(message):
        data = {"observation": {"text": "welcome"}, "reward": None, "done": False}
        answer = {"type": "state", "data": {}} if message["type"] == "state" else {"type": "observation", "data": data}
        return json.dumps(answer)

    mapping = FieldMapping("message", "{}", "text", "", "", "", "", "", "")
    monkeypatch.setenv("SERVER_TOKEN", " abc-123\n")
    with foreign_server(reply, token="abc-123") as address:
        config = PoolConfig(
            (address,), sessions_per_server=2, restart_wait_s=1.0, field_mapping=mapping, token_variable="SERVER_TOKEN"
        )
        with EnvPool(config, ("", {})) as pool:
            assert pool.reset(1, {}).result(10).observation == "welcome"
        remote = RemoteEnvironment(address, mapping, headers=bearer("SERVER_TOKEN"))
        assert remote.reset({}).observation == "welcome"
        remote.close()
        with pytest.raises(EnvError, match="HTTP 401"):
            EnvPool(dataclasses.replace(config, token_variable=""), ("", {}))
        with pytest.raises(ValueError, match="expected the name of an environment variable") as refused:
            bearer("hf_abc")
        assert "hf_abc" not in str(refused.value)
        for value, kind in (("", "nothing"), ("two words", "something else"), ("abc\r\nHost: x", "something else")):
            monkeypatch.setenv("SERVER_TOKEN", value)
            with pytest.raises(ValueError, match=f"expected a token in the .* SERVER_TOKEN, found {kind}; export"):
                EnvPool(config, ("", {}))


@pytest.mark.parametrize("answer", ["rubbish", '{"type": "state", "data": {}}', None])
def test_an_invalid_or_missing_reply_costs_one_session(answer):
    spoiled = threading.Event()

    def reply(message):
        if message["type"] == "state":
            return '{"type": "state", "data": {}}'
        if message["data"].get("text") == "spoil":
            spoiled.set()
            return answer
        fields = {"text": "fine", "won": False, "truncated": False, "terminated": False, "valid_action": True}
        data = {"observation": {**fields, "admissible": None, "info": {}}, "reward": 0, "done": False}
        return json.dumps({"type": "observation", "data": data})

    with foreign_server(reply) as address:
        config = PoolConfig(urls=(address,), sessions_per_server=2, step_deadline_s=1.0)
        with EnvPool(config, ("", {})) as pool:
            for session in range(2):
                pool.reset(session, {}).result(10)
            bad = pool.step(0, "spoil")
            assert pool.step(1, "x").result(10).observation == "fine"
            with pytest.raises(EnvError, match=r"no answer before its deadline" if answer is None else "invalid reply"):
                bad.result(10)
            assert pool.step(1, "x").result(10).observation == "fine"
            assert pool.reset(0, {}).result(10).observation == "fine"
    assert spoiled.is_set()
