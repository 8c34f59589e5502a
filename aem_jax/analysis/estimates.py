"""Estimators of the analyses: relative surprisal, drift, correlation, bootstrap intervals. METHOD §2, §3."""

import math
import warnings
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

RESAMPLES = 5_000


class Estimate(NamedTuple):
    """A number with its 95 % interval."""

    value: float
    low: float
    high: float


def relative_surprisal(surprisal: np.ndarray, drawn: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Surprisal of each response relative to the policy's mean response.

        S(a|s) − H_resp(s),   H_resp(s) ≈ mean over D draws of S(a_d|s)

    Args:
        surprisal: f[N], S(a|s) of the rollout's response in each state, nats.
        drawn: f[N, D], S of responses sampled in the same states, nats; D > 1.

    Returns:
        (f[N] relative surprisal, f[N] its standard error), nats.
    """
    return surprisal - drawn.mean(axis=1), standard_error(drawn)


def standard_error(drawn: np.ndarray) -> np.ndarray:
    """Standard error of the mean over the last axis: s / √D with the sample's deviation; D > 1."""
    return drawn.std(axis=-1, ddof=1) / math.sqrt(drawn.shape[-1])


def predicted_drift(advantages: np.ndarray, relative: np.ndarray) -> np.ndarray:
    """The drift of response entropy along a natural-gradient step on one response, to first order. METHOD §2.

        dH_resp/dη = A(a,s) · (S(a|s) − H_resp(s))

    Args:
        advantages: f[N], A of the responses in the update.
        relative: f[N], S − H_resp, nats.

    Returns:
        f[N], nats for a step of size one; 0 where A is 0.
    """
    return advantages * relative


def pearson(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Pearson's r over the last axis; NaN where x or y is constant."""
    x, y = centred(x), centred(y)
    spread = np.sqrt((x * x).sum(axis=-1) * (y * y).sum(axis=-1))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(spread > 0, (x * y).sum(axis=-1) / spread, np.nan)


def centred(x: np.ndarray) -> np.ndarray:
    """x minus its mean over the last axis; exactly 0 where x is constant, whose mean is rounded."""
    above = x - x[..., :1]
    return above - above.mean(axis=-1, keepdims=True)


def opposed(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Share of pairs with opposite signs, without pairs that contain a 0."""
    sign = np.sign(x) * np.sign(y)
    decided = (sign != 0).sum(axis=-1)
    return np.where(decided > 0, (sign < 0).sum(axis=-1) / np.maximum(decided, 1), np.nan)


def share_between(means: np.ndarray, variances: np.ndarray) -> np.ndarray:
    """Share of a quantity's variance that is between states: Var(means) / (Var(means) + mean of variances inside).

    Args:
        means: f[..., N], mean in each state.
        variances: f[..., N], variance in each state.

    Returns:
        f[...], in [0, 1]; NaN where the quantity is constant.
    """
    between, inside = means.var(axis=-1), variances.mean(axis=-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return between / (between + inside)


def pooled_correlation(covariances: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Correlation inside states, pooled: Σ cov / √(Σ var₁ · Σ var₂), over the last axis; NaN for a constant quantity.

    Args:
        covariances: f[..., N], of two quantities in each state.
        first: f[..., N], variance of the first in each state.
        second: f[..., N], variance of the second.
    """
    spread = np.sqrt(first.sum(axis=-1) * second.sum(axis=-1))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(spread > 0, covariances.sum(axis=-1) / spread, np.nan)


def with_interval(statistic: Callable[..., np.ndarray], *samples: np.ndarray, seed: int = 0) -> Estimate:
    """A statistic of paired samples with its 95 % percentile-bootstrap interval over the pairs.

    Args:
        statistic: (f[..., N], …) -> f[...], over the last axis.
        samples: f[N] each; the interval needs N ≥ 2.
        seed: of the resamples.
    """
    value = float(statistic(*samples))
    if len(samples[0]) < 2 or not math.isfinite(value):
        return Estimate(value, math.nan, math.nan)
    from scipy.stats import bootstrap  # takes half a second, so it is imported only where it is used

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about constant samples
        interval = bootstrap(
            samples,
            lambda *parts, axis=-1: statistic(*parts),
            paired=True,
            vectorized=True,
            n_resamples=RESAMPLES,
            method="percentile",
            rng=np.random.default_rng(seed),
        ).confidence_interval
    return Estimate(value, float(interval.low), float(interval.high))


def mean(x: np.ndarray) -> np.ndarray:
    """Mean over the last axis."""
    return np.mean(x, axis=-1)
