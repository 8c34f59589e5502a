"""The attempts to escape, in containers of a real engine; see test_engines.py for the variables that name it.

No attempt reaches the host. An engine keeps some of them out in its own way (`OTHERWISE`), and allows some inside the
container (`ALLOWED`), which bubblewrap's system call filter refuses. docs/swe.md has the table.
"""

import subprocess
from collections.abc import Callable, Mapping

import pytest
from envs.swe.escapes import LIMITS, Attempt, Host, never, says
from envs.swe.escapes_reach import REACH
from envs.swe.escapes_take import TAKE
from envs.swe.sandbox.test_engines import IMAGE, containers
from envs.swe.sandboxes import CHECKOUT, INSTANCE

from aem_jax.envs.swe.sandbox.workspace import Outcome

pytestmark = pytest.mark.skipif(not IMAGE, reason="AEM_JAX_TEST_IMAGE names no image for docker or podman")


def out_of_memory(outcome: Outcome) -> bool:
    """The engine's memory limit killed the command, some of its processes, or the container."""
    return outcome.exit_code in (None, 137) or "Killed" in outcome.output or outcome.seconds > 40


OTHERWISE: Mapping[str, Callable[[Outcome], bool]] = {
    # these files and folders are the image's
    "the host's passwords": says("/etc/shadow: Permission denied"),
    "the homes, and what lies beside this project": never("pyproject.toml", "aem_jax"),
    "the host's environment": says("HOME=/tmp", "HOSTNAME=sandbox"),
    "signals to process 1": says("alive", "Operation not permitted"),
    "namespaces that there are": never("DONE"),
    "the kernel's larger doors": never("DONE"),
    "typing into a terminal": says("Operation not permitted"),
    "limits, priority and processors of process 1": says("prlimit64 EPERM\n" * 4 + "setpriority EPERM"),
    "memory of one process": out_of_memory,
    "memory of several processes": out_of_memory,
    "memory hidden in shared mappings": out_of_memory,
    "memory hidden in sockets": out_of_memory,
}
ALLOWED = {
    "other families of sockets (the hypervisor's, packets, the kernel's cryptography, …)",
    "new namespaces",
    "tracing other processes",
    "doors that are walled up",
    "calls by another architecture's numbers",
    "files without end",
    "memory that belongs to no process",
}


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    with subprocess.Popen(["sleep", "3600"]) as process:
        host = Host(tmp_path_factory.mktemp("host"), process.pid)
        yield host
        assert process.poll() is None, "a process of the host was killed"
        process.kill()
        host.close()


@pytest.mark.parametrize("attempt", [*REACH, *TAKE], ids=lambda attempt: attempt.name)
def test_attempts_to_escape_from_a_container_fail(attempt: Attempt, host: Host):
    workspace = containers("memory").open(INSTANCE, CHECKOUT, limits=LIMITS)
    try:
        outcome = workspace.run(attempt.command(host, "attempt-begins"), limits=attempt.limits)
        after = workspace.run("set -- /proc/[0-9]*; echo $#; stat -c %s /tmp/alive; sleep 0.2; stat -c %s /tmp/alive")
    finally:
        workspace.close()
    if attempt.name not in ALLOWED:
        own = OTHERWISE.get(attempt.name, lambda outcome: False)
        assert attempt.contained(outcome) or own(outcome), outcome
    assert host.token not in outcome.output and not host.received
    assert host.file.read_text() == host.token
    if after.exit_code is None:
        assert "the sandbox was ended" in after.notice
        return
    processes, *sizes = [line for line in after.output.splitlines() if line.isdigit()]
    assert int(processes) == 2, after  # the first process and bash
    assert len(set(sizes)) <= 1, after


def test_the_lists_name_attempts():
    names = {attempt.name for attempt in (*REACH, *TAKE)}
    assert ALLOWED | set(OTHERWISE) <= names | {"calls by another architecture's numbers"}
