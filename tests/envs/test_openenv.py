"""Their servers serve us, ours serve their clients. Needs OpenEnv itself, no dependency of ours: skipped without it."""

import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("openenv.core.generic_client", reason="OpenEnv (pip install openenv-core) is not installed")

from envs.serving import served
from openenv.core.generic_client import GenericEnvClient

from aem_jax.envs.client import CONNECTION_ERRORS, RemoteEnvironment, websocket_url
from aem_jax.envs.conformance_wire import ServerSubject, check_server
from aem_jax.envs.pool import EnvPool, PoolConfig
from aem_jax.envs.protocol import EnvError, WireMapping

MAPPING = WireMapping(
    action_field="command",
    text_field="output",
    won_field="",
    truncated_field="out_of_steps",
    terminated_field="",
    valid_field="",
    admissible_field="",
    info_field="",
)


@pytest.fixture(scope="module")
def their_server():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = Path(__file__).with_name("openenv_server.py")
    process = subprocess.Popen([sys.executable, str(script), str(port), "4"])
    deadline = time.monotonic() + 60
    while True:
        try:
            RemoteEnvironment(f"127.0.0.1:{port}", MAPPING).close()
            break
        except (EnvError, *CONNECTION_ERRORS):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.1)
    yield f"127.0.0.1:{port}"
    process.kill()
    process.wait()


def test_their_server_serves_our_pool(their_server):
    config = PoolConfig(urls=(their_server,), sessions_per_server=4, wire=MAPPING)
    with EnvPool(config, ("", {})) as pool:
        futures = [pool.reset(session, {"seed": 1, "prefix": f"{session}> "}) for session in range(4)]
        assert [future.result(30).observation for future in futures] == [f"{session}> ready" for session in range(4)]
        won = pool.step(0, "done").result(30)
        assert (won.observation, won.reward, won.terminated, won.info["won"]) == ("0> done", 1.0, True, True)
        for _ in range(5):
            result = pool.step(1, "ls").result(30)
        assert (result.terminated, result.truncated, result.info["won"]) == (False, True, False)


def test_their_capacity_is_understood(their_server):
    with pytest.raises(EnvError, match="CAPACITY_REACHED"):
        EnvPool(PoolConfig(urls=(their_server,), sessions_per_server=5, wire=MAPPING), ("", {}))


def test_their_server_passes_our_suite(their_server):
    subject = ServerSubject(
        websocket_url(their_server),
        tasks=({"prefix": "a"}, {"prefix": "b"}),
        actions=("ls", "done"),
        mapping=MAPPING,
        sessions=4,
        guarded=False,
    )
    assert check_server(subject) == []


def test_our_server_serves_their_client():
    with served("echo") as (address, _), GenericEnvClient(base_url=f"http://{address}").sync() as client:
        result = client.reset(seed=3, episode_id="e1", word="hi")
        assert result.observation["text"] == "say hi" and not result.done
        assert client.state() == {"episode_id": "e1", "step_count": 0}
        result = client.step({"text": "ho"})
        assert (result.observation["text"], result.reward, result.done) == ("1: ho", 0.0, False)
        result = client.step({"text": "hi"})
        assert (result.observation["won"], result.reward, result.done) == (True, 1.0, True)
        with pytest.raises(RuntimeError, match="EXECUTION_ERROR"):
            client.step({"text": "hi"})
        with pytest.raises(RuntimeError, match="VALIDATION_ERROR"):
            client.step({"command": "hi"})
