"""Each attempt to escape from the sandbox fails, and the next episode in the same environment is not affected."""

import subprocess
from collections.abc import Iterator

import pytest
from envs.swe.escapes import LIMITS, Attempt, Host
from envs.swe.escapes_reach import REACH
from envs.swe.escapes_take import TAKE
from envs.swe.sandboxes import CHECKOUT, INSTANCE, sandboxed_processes, working_bubblewrap

CANARY = "id -u; cat calc.py; git status --short; ls -A /tmp /dev/shm; set -- /proc/[0-9]*; echo $#"


class Episodes:
    """One runtime, one workspace after another."""

    def __init__(self):
        self.runtime = working_bubblewrap()
        self.begin()

    def begin(self) -> None:
        self.workspace = self.runtime.open(INSTANCE, CHECKOUT, limits=LIMITS)

    def canary(self) -> str:
        return self.workspace.run(CANARY).output


@pytest.fixture(scope="module")
def all_episodes():
    episodes = Episodes()
    yield episodes
    episodes.workspace.close()


@pytest.fixture
def episodes(all_episodes: Episodes) -> Iterator[Episodes]:
    """Each test starts with a fresh episode, even after a failed test."""
    used = all_episodes.workspace
    yield all_episodes
    if all_episodes.workspace is used:
        used.close()
        all_episodes.begin()


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    with subprocess.Popen(["sleep", "600"]) as process:
        host = Host(tmp_path_factory.mktemp("host"), process.pid)
        yield host
        assert process.poll() is None, "a process of the host was killed"
        process.kill()
        host.close()


@pytest.mark.parametrize("attempt", [*REACH, *TAKE], ids=lambda attempt: attempt.name)
def test_attempts_to_escape_fail(attempt: Attempt, episodes: Episodes, host: Host):
    before = episodes.canary()
    outcome = episodes.workspace.run(attempt.command(host, "attempt-begins"), limits=attempt.limits)
    assert outcome.output.startswith("attempt-begins\n"), outcome
    assert attempt.contained(outcome), outcome
    assert host.token not in outcome.output
    assert not host.received
    assert host.file.read_text() == host.token
    # after any attempt the workspace answers, and no process of the attempt is alive
    after = episodes.workspace.run(
        "set -- /proc/[0-9]*; echo $#; stat -c %s /tmp/alive; sleep 0.05; stat -c %s /tmp/alive"
    )
    processes, *sizes = after.output.splitlines()
    assert int(processes) == 2, after  # process 1 and bash
    assert len(set(sizes)) == 1, after
    episodes.workspace.close()
    assert sandboxed_processes() <= {host.pid}
    episodes.begin()
    assert episodes.canary() == before
