"""`doctor [NAME …]`: whether this machine trains correctly, and how fast. The first thing to type on a new machine.

Each check is a function of the config that returns a `Finding`. It stands alone: one that raises is a fault, and the
next goes on. Findings are printed as they come, so that a run that is cut off leaves what it had. Numbers come from
what training itself runs (rollout, sampler, learner, pool) and from `bench`, with random weights.
"""

import contextlib
import importlib
import json
import math
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import date
from typing import TYPE_CHECKING, Any

from aem_jax.launch.doctor.finding import Finding, first_line
from aem_jax.launch.overrides import ConfigError, nearest

if TYPE_CHECKING:
    from aem_jax.launch.doctor.config import DoctorConfig

CHECKS: Mapping[str, str] = {
    "versions": "machine:versions",
    "devices": "machine:devices",
    "memory": "machine:memory",
    "disk": "machine:disk",
    "parity-float32": "parity:float32",
    "parity-bfloat16": "parity:bfloat16",
    "parity-int8-weights": "parity:int8_weights",
    "parity-int8-cache": "parity:int8_cache",
    "parity-lora": "parity:lora_apart",
    "parity-lora-merged": "parity:lora_merged",
    "greedy": "parity:greedy",
    "attention-xla": "attention:xla",
    "attention-splash": "attention:splash",
    "attention-cudnn": "attention:cudnn",
    "attention-triton": "attention:triton",
    "mesh": "training:mesh",
    "recompiles": "training:recompiles",
    "servers": "training:servers",
    "sandbox-bubblewrap": "machine:bubblewrap",
    "sandbox-docker": "machine:docker",
    "sandbox-podman": "machine:podman",
    "ceilings": "speed:peaks",
    "decode": "speed:decode",
    "learner": "speed:learn",
}
"""Name -> module and function, in order; imported when it is its turn."""

ON_CPU, ON_ACCELERATOR = "tiny", "qwen2.5-0.5b"
"""The model where none is named."""


def lacking() -> bool:
    """Says which packages are missing, if some are: without them nothing else can be looked at."""
    from aem_jax.launch.doctor.machine import missing_packages

    found = missing_packages()
    if found:
        print(f"x {found.name}: {found.text}\n  -> {found.advice}", file=sys.stderr)
    return found is not None


def run(names: Sequence[str], config: "DoctorConfig") -> int:
    """Does the checks named (all of them by default); returns the exit status.

    Returns:
        0 if nothing is wrong, 1 if something is, 130 or 143 if it was stopped.

    Raises:
        ConfigError: an unknown check or model, or a platform that is not there.
    """
    for name in names:
        if name not in CHECKS:
            raise ConfigError(f"unknown check {name!r}{nearest(name, CHECKS) or '; known are ' + ', '.join(CHECKS)}")
    chosen = [name for name in CHECKS if name in names] if names else list(CHECKS)

    from aem_jax.launch.build import known_model

    if config.model:
        known_model(config.model)
    config, trouble = _set_up(config)

    from aem_jax.launch.doctor.page import Page

    page = Page(sys.stderr if config.json else sys.stdout)
    found: list[Finding] = []
    work = _Worker()
    start = time.perf_counter()
    stopped = 0
    try:
        with _stopped_by_sigterm():
            page.head(config)
            for name in chosen:
                with page.at_work(name), _stdout_for_json_alone(config.json):
                    one = trouble if trouble and name == trouble.name else work(lambda name=name: examine(name, config))
                found.append(one)
                page.show(one)
    except _StoppedError as error:
        stopped = error.status
    except KeyboardInterrupt:
        stopped = 130
    seconds = time.perf_counter() - start
    page.foot(found, seconds, len(chosen))
    is_well = not any(each.ok is False for each in found)
    if config.json:
        document = {
            "kind": "doctor",
            "date": date.today().isoformat(),
            "model": config.model,
            "ok": is_well,
            "complete": len(found) == len(chosen),
            "seconds": seconds,
            "results": [asdict(each) for each in found],
        }
        print(json.dumps(_plain(document)), flush=True)
    if work.is_busy:  # stopped amid a compilation, which nothing ends but the end of the process
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(stopped)
    return stopped or (0 if is_well else 1)


def examine(name: str, config: "DoctorConfig") -> Finding:
    """Does one check. What it raises is what it found."""
    module, _, function = CHECKS[name].partition(":")
    start = time.perf_counter()
    try:
        found = getattr(importlib.import_module(f"{__name__}.{module}"), function)(config)
    except Exception as error:
        advice = f"alone: doctor {name}; with --json, facts.traceback says where"
        found = Finding(False, first_line(error), advice, {"traceback": traceback.format_exc()})
    return replace(found, name=name, seconds=time.perf_counter() - start)


def _set_up(config: "DoctorConfig") -> tuple["DoctorConfig", Finding | None]:
    """jax set up and the model chosen; and what is wrong with the devices, if all else has to be done on the CPU.

    Raises:
        ConfigError: a platform that was asked for by name is not there.
    """
    import jax

    from aem_jax.launch.runtime import set_up

    trouble = None
    try:
        set_up(replace(config.runtime, distributed="off"))
    except ConfigError as error:
        if config.runtime.platform or "--runtime.platform" not in str(error):
            raise
        advice = "reinstall jax with the driver's CUDA (pip install 'aem_jax[cuda]'), or set JAX_PLATFORMS=cpu"
        trouble = Finding(False, f"{str(error).splitlines()[0]}; all else is done on the CPU", advice, name="devices")
        jax.config.update("jax_platforms", "cpu")
    default = ON_CPU if jax.default_backend() == "cpu" else ON_ACCELERATOR
    return replace(config, model=config.model or default), trouble


class _Worker:
    """Calls in a thread of their own. The main one only waits, so that a signal need not wait for a compilation."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None

    @property
    def is_busy(self) -> bool:
        """Whether a call is still under way."""
        return self._thread is not None and self._thread.is_alive()

    def __call__(self, call: Callable[[], Finding]) -> Finding:
        """What the call returns or raises."""
        done: list[Finding] = []
        failed: list[BaseException] = []

        def do() -> None:
            try:
                done.append(call())
            except BaseException as error:
                failed.append(error)

        self._thread = threading.Thread(target=do, name="check", daemon=True)
        self._thread.start()
        self._thread.join()
        if failed:
            raise failed[0]
        return done[0]


class _StoppedError(BaseException):
    """SIGTERM came. No `Exception`: a check that is under way must not take it for its own."""

    status = 143


@contextlib.contextmanager
def _stopped_by_sigterm() -> Iterator[None]:
    """SIGTERM (`timeout`, a scheduler) raises, so that what was found is still written."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise _StoppedError

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _stdout_for_json_alone(json: bool) -> contextlib.AbstractContextManager[Any]:
    return contextlib.redirect_stdout(sys.stderr) if json else contextlib.nullcontext()


def _plain(value: Any) -> Any:
    """As JSON takes it: numbers that are not finite by name, keys as text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return value if isinstance(value, (bool, int, str, type(None))) else str(value)
