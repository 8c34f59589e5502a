"""`doctor [NAME …]`: checks whether this machine trains correctly, and how fast. Run it first on a new machine.

Each check is a function of the config that returns a `Finding`. Checks are independent: an exception in one is a fault,
and the next check runs. All checks run in a child process (`process.py`), so a crash or a hang is also a fault.
Findings are printed immediately, so an interrupted run keeps its earlier findings. The checks use the components of
training (rollout, sampler, learner, pool) and of `bench`, with random weights.
"""

import contextlib
import json
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import date
from typing import TYPE_CHECKING

from aem_jax.distributed.signals import undone_on_interrupt
from aem_jax.doctor.finding import CHECKS, Finding
from aem_jax.errors import ConfigError
from aem_jax.overrides import nearest

if TYPE_CHECKING:
    from aem_jax.doctor.config import DoctorConfig


def lacking() -> bool:
    """Reports missing packages, if any; no other check can run without them."""
    from aem_jax.doctor.machine import missing_packages

    fault = missing_packages()
    if fault:
        print(f"x {fault.name}: {fault.text}\n  -> {fault.advice}", file=sys.stderr)
    return fault is not None


def run(names: Sequence[str], config: "DoctorConfig") -> int:
    """Runs the named checks in their order (by default all); returns the exit status.

    Returns:
        0 without faults, 1 with faults, 130 or 143 if it was interrupted.

    Raises:
        ConfigError: an unknown check or model, or a platform that is not there.
    """
    for name in names:
        if name not in CHECKS:
            raise ConfigError(f"unknown check {name!r}{nearest(name, CHECKS) or '; known are ' + ', '.join(CHECKS)}")
    chosen = list(dict.fromkeys(names)) or list(CHECKS)

    from aem_jax.config.components import known_model
    from aem_jax.doctor import process
    from aem_jax.doctor.page import Page

    if config.model:
        known_model(config.model, "--model")
    page = Page(sys.stderr if config.json else sys.stdout)
    model, findings, stopped, start = config.model, list[Finding](), 0, time.perf_counter()
    try:
        with (
            undone_on_interrupt(),
            _stopped_by_sigterm(),
            contextlib.closing(process.findings(chosen, config)) as checks,
        ):
            while len(findings) < len(chosen):
                with page.at_work(chosen[len(findings)]):
                    item = next(checks)
                if isinstance(item, str):
                    model = item
                    page.head(model)
                else:
                    findings.append(item)
                    page.show(item)
    except _StoppedError:
        stopped = 143
    except KeyboardInterrupt:
        stopped = 130
    seconds = time.perf_counter() - start
    page.foot(findings, seconds, len(chosen))
    passed = not any(finding.ok is False for finding in findings)
    if config.json:
        document = {
            "kind": "doctor",
            "date": date.today().isoformat(),
            "model": model,
            "ok": passed,
            "complete": len(findings) == len(chosen),
            "seconds": seconds,
            "results": [asdict(finding) for finding in findings],
        }
        print(json.dumps(document), flush=True)
    return stopped or (0 if passed else 1)


class _StoppedError(BaseException):
    """The process received SIGTERM."""


@contextlib.contextmanager
def _stopped_by_sigterm() -> Iterator[None]:
    """SIGTERM (from `timeout` or a scheduler) raises, so that the findings are still written."""
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
