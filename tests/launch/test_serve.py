"""`serve` as a process: it prints its address, answers requests, and ends on a signal."""

import json
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from aem_jax.envs.serving.pool import EnvPool, PoolConfig
from aem_jax.launch import cli

ROOT = Path(__file__).resolve().parents[2]


def has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


@pytest.mark.parametrize(("host", "shown"), [("127.0.0.1", r"127\.0\.0\.1"), ("::", r"\[::1\]")])
def test_a_server_started_by_hand_serves_a_pool_at_the_address_that_it_prints(host, shown):
    if host == "::" and not has_ipv6():
        pytest.skip("this machine has no IPv6")
    command = [sys.executable, "-m", "aem_jax.launch", "serve", "echo", "--port", "0", "--settings", '{"length": 2}']
    command += ["--host", host]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=ROOT) as process:
        try:
            assert process.stdout
            line = process.stdout.readline()
            match = re.search(rf"--env\.urls (ws://{shown}:\d+)$", line.strip())
            assert match, line
            url = match[1]
            with urllib.request.urlopen(url.replace("ws", "http") + "/metadata", timeout=10) as page:
                assert json.load(page)["name"] == "echo"
            with EnvPool(PoolConfig(urls=(f"{url}/?who=test",), sessions_per_server=2), ("", {})) as pool:
                pool.reset(0, {}).result()
                assert not pool.step(0, "a").result().done
                assert pool.step(0, "b").result().truncated
        finally:
            process.send_signal(signal.SIGINT)
        assert process.wait(timeout=10) == 0


def test_a_port_in_use_is_refused_in_one_line(capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert cli.main(["serve", "echo", "--port", str(taken.getsockname()[1])]) == 2
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith("error: ") and "Traceback" not in error


def test_bad_settings_are_refused_in_one_line(capsys):
    assert cli.main(["serve", "echo", "--settings", '{"lenght": 2}']) == 2
    assert "did you mean 'length'?" in capsys.readouterr().err


def test_an_environment_without_a_web_site_is_refused(capsys):
    assert cli.main(["serve", "echo", "--html"]) == 2
    assert "--html: expected an environment with a web site, of webshop, got echo" in capsys.readouterr().err
