"""Numbers of runs, their means over seeds with intervals, and how they are written in tables."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from experiments.results import Result, of_variant, successes


class Interval(NamedTuple):
    """A number over seeds, its 95 % interval, and the number of seeds or points."""

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
    """Mean and 95 % interval of normal numbers with unknown variance; NaN are omitted.

    mean ± t s / √n,   s with ddof 1, t the 97.5 % quantile of Student's t with n − 1 degrees of freedom
    """
    known = [value for value in values if math.isfinite(value)]
    if not known:
        return Interval(math.nan, math.nan, math.nan, 0)
    mean = math.fsum(known) / len(known)
    if len(known) == 1:
        return Interval(mean, math.nan, math.nan, 1)
    half = student_t(len(known)) * float(np.std(sorted(known), ddof=1)) / math.sqrt(len(known))
    return Interval(mean, mean - half, mean + half, len(known))


def student_t(count: int) -> float:
    """The 97.5 % quantile of Student's t for the mean of `count` numbers, at least two."""
    return _quantile(count - 1)


def _quantile(freedom: float) -> float:
    from scipy.stats import t

    return float(t.ppf(0.975, freedom))


def combined(samples: Sequence[Sequence[float]], weights: Sequence[float]) -> Interval:
    """Σ_c w_c mean_c of independent samples with variances of their own, and its 95 % interval.

    Σ w m ± t √V,   V = Σ v_c,   v_c = w_c² s_c² / n_c,   t with V² / Σ (v_c² / (n_c − 1)) degrees of freedom

    The degrees of freedom are Welch's and Satterthwaite's. The interval's count is that of the smallest sample.
    """
    value = math.fsum(w * math.fsum(sample) / len(sample) for sample, w in zip(samples, weights, strict=True))
    count = min(map(len, samples))
    if count < 2:
        return Interval(value, math.nan, math.nan, count)
    parts = [w**2 * float(np.var(sorted(s), ddof=1)) / len(s) for s, w in zip(samples, weights, strict=True)]
    total, spread = math.fsum(parts), math.fsum(v**2 / (len(s) - 1) for s, v in zip(samples, parts, strict=True))
    half = _quantile(total**2 / spread) * math.sqrt(total) if spread else 0.0
    return Interval(value, value - half, value + half, count)


def differences(
    results: Sequence[Result], variant: str, against: str, measure: Measure, cell: str = ""
) -> dict[int, float]:
    """variant − against by seed, for shared seeds: the same seed has the same warm start and the same tasks."""
    ours, theirs = of_variant(results, variant, cell), of_variant(results, against, cell)
    return {seed: measure.of(ours[seed]) - measure.of(theirs[seed]) for seed in sorted(ours.keys() & theirs.keys())}


def shown(value: Interval, percent: bool, signed: bool = False) -> str:
    """Formats an interval, as `12.3 % (10.1 to 14.9)`; differences of fractions are in percentage points."""
    if not value.count:
        return "–"
    if percent and not signed:  # no fraction is outside
        value = value._replace(low=max(value.low, 0.0), high=min(value.high, 1.0))
    unit = " points" if percent and signed else " %" if percent else ""
    mean, low, high = (number(bound, percent, signed) for bound in value[:3])
    return f"{mean}{unit} ({low} to {high})" if value.count > 1 else f"{mean}{unit}"


def number(value: float, percent: bool, signed: bool = False) -> str:
    digits = f"{100 * value:.1f}" if percent else f"{value:.3f}"
    if float(digits) == 0:
        digits = digits.removeprefix("-")
    return f"+{digits}" if signed and float(digits) > 0 else digits.replace("-", "−")
