"""Timing: warm up, wait for the device, take the median."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Measurement:
    """One rate, over some repetitions.

    Attributes:
        name: the benchmark.
        what: what was measured, at which shape.
        unit: of the rates, e.g. tokens/s.
        median: of the repetitions.
        best: the highest rate.
        worst: the lowest rate.
        repeats: how many there were.
    """

    name: str
    what: str
    unit: str
    median: float
    best: float
    worst: float
    repeats: int


def measure(
    name: str, what: str, unit: str, work: float, call: Callable[[], Any], *, repeats: int, warm_up: int = 1
) -> Measurement:
    """Rate of `call`, which does `work` units and returns only when they are done.

    Args:
        name: the benchmark.
        what: what is measured.
        unit: what a unit of work is, per second.
        work: units that one call does.
        call: what is timed.
        repeats: timed calls.
        warm_up: calls before them, which compile.
    """
    for _ in range(warm_up):
        call()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    rate = lambda each: work / each  # noqa: E731
    return Measurement(
        name, what, unit, rate(statistics.median(seconds)), rate(min(seconds)), rate(max(seconds)), repeats
    )
