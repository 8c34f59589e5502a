"""Starts the processes of one run."""

import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def free_port() -> int:
    """A port of this host that is currently free."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(words: Sequence[str], environment: dict[str, str]) -> subprocess.Popen[str]:
    """A Python process with its output in one pipe."""
    return subprocess.Popen(
        [sys.executable, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, env=environment
    )


def finish(processes: Sequence[subprocess.Popen[str]], statuses: Sequence[int], timeout_s: float = 500) -> list[str]:
    """The output of each process. Each must end with its expected status, and none is left running."""
    deadline, outputs = time.monotonic() + timeout_s, []
    try:
        for process in processes:
            outputs.append(process.communicate(timeout=max(deadline - time.monotonic(), 1.0))[0])
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == list(statuses), "\n".join(outputs)
    return outputs
