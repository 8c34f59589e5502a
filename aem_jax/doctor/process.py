"""Runs the checks in a child process. A crash or a hang is a finding, and a new child runs the remaining checks.

The child is `python -m aem_jax.doctor.process CONFIG NAME …`. It prints one JSON line for each check to standard
output; output of libraries goes to standard error.
"""

import importlib
import json
import math
import os
import select
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from time import monotonic
from typing import Any

from aem_jax.doctor.config import DoctorConfig
from aem_jax.doctor.finding import CHECKS, Finding, first_line
from aem_jax.envs.serving.server import end_with_parent
from aem_jax.errors import ConfigError
from aem_jax.overrides import as_values, override

CHILD = (sys.executable, "-m", "aem_jax.doctor.process")
LIMIT_S = 300.0
"""Seconds after which a check counts as hung."""
WAIT_S = 0.5
ON_CPU, ON_ACCELERATOR = "tiny", "qwen2.5-0.5b"
"""The default model on a CPU, and on an accelerator."""


def findings(names: Sequence[str], config: DoctorConfig) -> Generator[str | Finding, None, None]:
    """Yields the model's name, then the finding of each check, in order.

    Raises:
        ConfigError: the child reports an error in the config.
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
        output, rest, deadline = self._process.stdout.fileno(), b"", monotonic() + LIMIT_S
        while True:
            # The wait is short: Python handles a signal that arrives just before a wait only after that wait.
            if not select.select([output], [], [], WAIT_S)[0]:
                if monotonic() > deadline:
                    self._hangs = True
                    return
                continue
            data = os.read(output, 2**16)
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
            return f"printed nothing for {LIMIT_S:.0f} s"
        return f"crashed ({signal.Signals(-status).name})" if status < 0 else f"ended with status {status}"


def _crashed(name: str, how: str) -> Finding:
    advice = f"alone: PYTHONFAULTHANDLER=1 python -m aem_jax.launch doctor {name}; take the versions of constraints.txt"
    return Finding(False, f"the process {how}", advice, name=name)


# In the child.


def main(words: Sequence[str]) -> int:
    """Runs the checks named after the config; returns 0, or 2 for an error in the config."""
    end_with_parent()
    lines = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    try:
        for item in examine_all(words[1:], override(DoctorConfig(), json.loads(words[0]))):
            print(as_line(item), file=lines, flush=True)
    except ConfigError as error:
        print(json.dumps({"error": str(error)}), file=lines, flush=True)
        return 2
    return 0


def examine_all(names: Sequence[str], config: DoctorConfig) -> Generator[str | Finding, None, None]:
    """Yields the model's name, then the finding of each check.

    Raises:
        ConfigError: the platform named in the config is missing.
    """
    config, trouble = _set_up(config)
    yield config.model
    for name in names:
        yield trouble if trouble and name == trouble.name else examine(name, config)


def examine(name: str, config: DoctorConfig) -> Finding:
    """Runs one check. An exception becomes a finding."""
    module, _, function = CHECKS[name].partition(":")
    start = time.perf_counter()
    try:
        finding = getattr(importlib.import_module(f"aem_jax.doctor.{module}"), function)(config)
    except Exception as error:
        advice = f"alone: doctor {name}; with --json, facts.traceback says where"
        finding = Finding(False, first_line(error), advice, {"traceback": traceback.format_exc()})
    return replace(finding, name=name, seconds=time.perf_counter() - start)


def as_line(item: str | Finding) -> str:
    """An item of `examine_all` as JSON. Non-finite numbers are written by name, and keys as text."""
    return json.dumps({"model": item} if isinstance(item, str) else _plain(asdict(item)))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return value if isinstance(value, (bool, int, str, type(None))) else str(value)


def _set_up(config: DoctorConfig) -> tuple[DoctorConfig, Finding | None]:
    """Sets up jax and chooses the model. Also returns the devices' fault if the other checks must run on the CPU.

    Raises:
        ConfigError: the platform named in the config is missing.
    """
    import jax

    from aem_jax.distributed import runtime

    trouble = None
    try:
        runtime.set_up(replace(config.runtime, distributed="off"))
    except ConfigError as error:
        if config.runtime.platform or "--runtime.platform" not in str(error):
            raise
        advice = "install jax for the driver's CUDA (aem_jax[cuda12] or aem_jax[cuda13]), or set JAX_PLATFORMS=cpu"
        trouble = Finding(False, f"{str(error).splitlines()[0]}; all else is done on the CPU", advice, name="devices")
        jax.config.update("jax_platforms", "cpu")
    default = ON_CPU if jax.default_backend() == "cpu" else ON_ACCELERATOR
    return replace(config, model=config.model or default), trouble


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
