"""Timing: warm up, wait for the device, take the median, and say how far that is from what the device could do."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from aem_jax.bench.roofline import Roofline


@dataclass(frozen=True)
class Measurement:
    """One rate, over some repetitions.

    Attributes:
        name: the benchmark.
        what: what was measured; with the name it says which numbers of two runs belong together.
        shape: at which sizes.
        unit: of the rates, e.g. tokens/s.
        median: of the repetitions.
        best: the highest rate.
        worst: the lowest rate.
        quartiles: the rates that three quarters and one quarter of the repetitions reach.
        repeats: how many there were.
        roofline: what the device could do at most; None where no device computes.
        facts: what else was found, by names with units.
    """

    name: str
    what: str
    shape: str
    unit: str
    median: float
    best: float
    worst: float
    quartiles: tuple[float, float]
    repeats: int
    roofline: Roofline | None = None
    facts: Mapping[str, float] = field(default_factory=dict)


def summarise(
    name: str,
    what: str,
    shape: str,
    unit: str,
    work: float,
    seconds: Sequence[float],
    *,
    roofline: Callable[[float, float], Roofline] | None = None,
    facts: Mapping[str, float] | None = None,
) -> Measurement:
    """The rates of calls that each did `work` units.

    Args:
        name: the benchmark.
        what: what was measured.
        shape: at which sizes.
        unit: what a unit of work is, per second.
        work: units that one call did.
        seconds: that each call took.
        roofline: (units of a call, its median seconds) -> what the device could have done.
        facts: what else was found.
    """
    ends = seconds if len(seconds) > 1 else [*seconds, *seconds]
    shortest, middle, longest = statistics.quantiles(ends, n=4, method="inclusive")
    return Measurement(
        name,
        what,
        shape,
        unit,
        median=work / middle,
        best=work / min(seconds),
        worst=work / max(seconds),
        quartiles=(work / longest, work / shortest),
        repeats=len(seconds),
        roofline=roofline(work, middle) if roofline else None,
        facts=facts or {},
    )


def timed(call: Callable[[], Any], *, repeats: int, warm_up: int = 1) -> list[float]:
    """Seconds of each of `repeats` calls of `call`, which returns only when all is done; those to warm up left out."""
    for _ in range(warm_up):
        call()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return seconds
