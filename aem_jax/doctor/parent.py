"""Waits for the process that does the checks; where it crashes or hangs, that is a finding, and another goes on."""

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
"""Seconds after which a check counts as hanging."""
WAIT_S = 0.5


def findings(names: Sequence[str], config: DoctorConfig) -> Generator[str | Finding, None, None]:
    """The model's name, then what each check finds, in order.

    Raises:
        ConfigError: what the child says of the config.
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
        if left:  # all, where not even the devices were found
            for name in [left.pop(0)] if is_begun else [left.pop(0) for _ in names]:
                yield _crashed(name, ended)


class _Child:
    """One process at work on what is left."""

    def __init__(self, config: DoctorConfig, names: Sequence[str]) -> None:
        command = [*CHILD, json.dumps(as_values(config)), *names]
        # In a session of its own, Ctrl-C does not reach it. By its standard input it sees that this process is there.
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, start_new_session=True
        )
        self._hangs = self._is_ending = False

    def items(self) -> Iterator[dict[str, Any]]:
        """What it says, until it ends, or says nothing for too long."""
        assert self._process.stdout
        said, rest, deadline = self._process.stdout.fileno(), b"", monotonic() + LIMIT_S
        while True:
            # A short wait: Python answers a signal that comes just before one when that one is over.
            if not select.select([said], [], [], WAIT_S)[0]:
                if monotonic() > deadline:
                    self._hangs = True
                    return
                continue
            data = os.read(said, 2**16)
            if not data:  # what a crash left of a line is lost
                self._is_ending = True
                return
            *lines, rest = (rest + data).split(b"\n")
            yield from map(json.loads, lines)
            deadline = monotonic() + LIMIT_S

    def end(self) -> str:
        """Ends it, if it does not end by itself; says how it did."""
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
