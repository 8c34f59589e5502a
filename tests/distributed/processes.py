"""Starts processes that are to be one run."""

import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def free_port() -> int:
    """A port of this host that nobody listens on as of now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(words: Sequence[str], environment: dict[str, str]) -> subprocess.Popen[str]:
    """A Python process with its output in one pipe."""
    return subprocess.Popen(
        [sys.executable, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, env=environment
    )


def finish(processes: Sequence[subprocess.Popen[str]], statuses: Sequence[int], timeout_s: float = 500) -> list[str]:
    """What each said until it ended, which it must with its status; none is left behind."""
    deadline, said = time.monotonic() + timeout_s, []
    try:
        for process in processes:
            said.append(process.communicate(timeout=max(deadline - time.monotonic(), 1.0))[0])
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == list(statuses), "\n".join(said)
    return said
