"""Numbers of runs, their means over seeds with intervals, and how they are written in tables."""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from experiments.results import Result, of_variant, successes

RESAMPLES = 10_000


class Interval(NamedTuple):
    """A mean over seeds and its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float
    count: int


@dataclass(frozen=True)
class Measure:
    """One number of a run.

    Attributes:
        title: its name in tables.
        of: run -> number.
        percent: whether it is a fraction, shown in per cent, with differences in percentage points.
    """

    title: str
    of: Callable[[Result], float]
    percent: bool = True


def part(metric: str, first: float, last: float) -> Callable[[Result], float]:
    """Returns run -> mean of a curve between two fractions of the training; NaN if the run has no such numbers."""

    def mean(result: Result) -> float:
        values = result["curves"].get(metric, [])
        cut = values[round(first * len(values)) : max(round(last * len(values)), 1)]
        known = [value for value in cut if value is not None]
        return math.fsum(known) / len(known) if known else math.nan

    return mean


MEASURES: Mapping[str, Measure] = {
    "final": Measure("success after training, fixed games", successes),
    "late": Measure("success while training, last fifth", part("rollout/success", 0.8, 1)),
    "mean": Measure("success while training, all steps", part("rollout/success", 0, 1)),
    "early entropy": Measure("response entropy, first fifth (nats)", part("entropy/response", 0, 0.2), percent=False),
    "late entropy": Measure("response entropy, last fifth (nats)", part("entropy/response", 0.8, 1), percent=False),
}
"""Compared numbers of the tables, by their names in the template."""


def interval(values: Sequence[float]) -> Interval:
    """Mean and 95 % percentile-bootstrap interval, independent of the order of the values; NaN are omitted."""
    known = sorted(value for value in values if math.isfinite(value))
    if not known:
        return Interval(math.nan, math.nan, math.nan, 0)
    mean = math.fsum(known) / len(known)
    if len(known) == 1:
        return Interval(mean, math.nan, math.nan, 1)
    from scipy.stats import bootstrap

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # raised if all values are equal
        bounds = bootstrap(
            (known,), np.mean, n_resamples=RESAMPLES, method="percentile", rng=np.random.default_rng(0)
        ).confidence_interval
    return Interval(mean, float(bounds.low), float(bounds.high), len(known))


def differences(results: Sequence[Result], variant: str, against: str, measure: Measure, cell: str = "") -> list[float]:
    """variant − against for each shared seed: the same seed has the same warm start and the same tasks."""
    ours, theirs = of_variant(results, variant, cell), of_variant(results, against, cell)
    return [measure.of(ours[seed]) - measure.of(theirs[seed]) for seed in sorted(ours.keys() & theirs.keys())]


def shown(value: Interval, percent: bool, signed: bool = False) -> str:
    """Formats an interval, as `12.3 % (10.1 to 14.9)`; differences of fractions are in percentage points."""
    if not value.count:
        return "–"
    unit = " points" if percent and signed else " %" if percent else ""
    mean, low, high = (number(bound, percent, signed) for bound in value[:3])
    return f"{mean}{unit} ({low} to {high})" if value.count > 1 else f"{mean}{unit}"


def number(value: float, percent: bool, signed: bool = False) -> str:
    digits = f"{100 * value:.1f}" if percent else f"{value:.3f}"
    if float(digits) == 0:
        digits = digits.removeprefix("-")
    return f"+{digits}" if signed and float(digits) > 0 else digits.replace("-", "−")
