"""Runs the checks in a child process. A crash or a hang is a finding, and a new child runs the remaining checks."""

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Generator, Iterator, Sequence
from time import monotonic
from typing import Any

from aem_jax.doctor.config import DoctorConfig
from aem_jax.doctor.finding import Finding
from aem_jax.errors import ConfigError
from aem_jax.overrides import as_values

CHILD = (sys.executable, "-m", "aem_jax.doctor.child")
LIMIT_S = 300.0
"""Seconds after which a check counts as hung."""
WAIT_S = 0.5


def findings(names: Sequence[str], config: DoctorConfig) -> Generator[str | Finding, None, None]:
    """Yields the model's name, then the finding of each check, in order.

    Raises:
        ConfigError: the child found an error in the config.
    """
    left, is_begun = list(names), False
    while left:
        child = _Child(config, left)
        try:
            for item in child.items():
                if "error" in item:
                    raise ConfigError(item["error"])
                if "model" not in item:
                    left.pop(0)
                    yield Finding(**item)
                elif not is_begun:
                    is_begun = True
                    yield item["model"]
        finally:
            ended = child.end()
        if left:  # reports all of them as crashed if the child failed before it found the devices
            for name in [left.pop(0)] if is_begun else [left.pop(0) for _ in names]:
                yield _crashed(name, ended)


class _Child:
    """A process that runs the remaining checks."""

    def __init__(self, config: DoctorConfig, names: Sequence[str]) -> None:
        command = [*CHILD, json.dumps(as_values(config)), *names]
        # Ctrl-C does not reach a process in its own session. Its standard input shows whether this process is alive.
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, start_new_session=True
        )
        self._hangs = self._is_ending = False

    def items(self) -> Iterator[dict[str, Any]]:
        """Yields the child's items until the child ends, or prints nothing for too long."""
        assert self._process.stdout
        said, rest, deadline = self._process.stdout.fileno(), b"", monotonic() + LIMIT_S
        while True:
            # The wait is short: Python handles a signal that arrives just before a wait only after that wait.
            if not select.select([said], [], [], WAIT_S)[0]:
                if monotonic() > deadline:
                    self._hangs = True
                    return
                continue
            data = os.read(said, 2**16)
            if not data:  # an incomplete line after a crash is lost
                self._is_ending = True
                return
            *lines, rest = (rest + data).split(b"\n")
            yield from map(json.loads, lines)
            deadline = monotonic() + LIMIT_S

    def end(self) -> str:
        """Stops the child if it does not exit by itself; describes how it ended."""
        try:
            status = self._process.wait(5.0 if self._is_ending else 0.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            status = self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream:
                stream.close()
        if self._hangs:
            return f"said nothing for {LIMIT_S:.0f} s"
        return f"crashed ({signal.Signals(-status).name})" if status < 0 else f"ended with status {status}"


def _crashed(name: str, how: str) -> Finding:
    advice = f"alone: PYTHONFAULTHANDLER=1 python -m aem_jax.launch doctor {name}; take the versions of constraints.txt"
    return Finding(False, f"the process {how}", advice, name=name)
