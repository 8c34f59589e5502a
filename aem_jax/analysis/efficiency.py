"""How much return a credit rule's update gains, per unit of step size, compared with another rule's. METHOD §7.

    e_b = ⟨E g_b, ∇J⟩ / √(E‖g_b‖²)        ⟨x, y⟩ = Σ_i x_i y_i / (√v̂_i + ε)

g_b is the gradient of a training step with rule b, ∇J the gradient of the expected return, v̂ Adam's second moments.
Steps of equal root-mean-square size are compared, so e_b does not depend on the scale of a rule's advantages.
Everything is computed from inner products of the gradients of single rollout groups. Groups of different training steps
are independent, so the mean of ⟨g_j, u_k⟩ over such pairs is unbiased, where the norm of a mean gradient is not.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from aem_jax.analysis.estimates import Estimate

Array = np.ndarray

PROPORTIONAL = 1e-5
"""Largest difference between proportional numbers, in units of the largest: they are computed in float32."""

Z = NormalDist().inv_cdf(0.975)


class Products(NamedTuple):
    """Inner products of one rule's gradients, f64[M, M] each; row j is of g_b in group j, column k of group k.

    Attributes:
        own: with g_b.
        base: with the base rule's g.
        gain: with u, the unbiased estimate of ∇J.
        entropy: with ∇H̄, the gradient of the mean token entropy at the group's own tokens, nats.
    """

    own: Array
    base: Array
    gain: Array
    entropy: Array


@dataclass(frozen=True)
class Efficiency:
    """Estimates of one rule, with 95 % intervals.

    Attributes:
        gain: e_b, return per unit of step size.
        entropy: predicted change of mean token entropy per unit of step size, nats.
        ratio: e_b / e_base with Fieller's interval; NaN where the interval of e_base contains 0.
        difference: e_b − e_base.
        cosine: of E g_b and E g_base; NaN where an estimate of ‖E g‖² is negative, so not resolved.
        above: Φ(difference / its standard error), which is near 0 or 1 where a difference is resolved; 1/2 where both
            are equal, NaN where one is not defined.
    """

    gain: Estimate
    entropy: Estimate
    ratio: Estimate
    difference: Estimate
    cosine: Estimate
    above: float


class _Statistic(NamedTuple):
    """A smooth function of means over pairs of groups and of means over groups.

    Its error is, to first order, the error of the mean of `pairs` over pairs of groups of different steps, plus the
    error of the mean of `alone` over groups.

    Attributes:
        value: of the function.
        pairs: f64[M, M], without meaning where two groups have one step.
        alone: f64[M].
    """

    value: np.floating
    pairs: Array
    alone: Array


def efficiencies(
    products: Mapping[str, Products], steps: Array, groups_per_step: int, *, base: str = "base"
) -> dict[str, Efficiency]:
    """Estimates of e_b for every rule.

        ⟨E x, E y⟩   ≈ mean of ⟨x_j, y_k⟩ over groups j, k of different steps
        E‖g_b‖²      ≈ mean_j ‖g_j‖² / m + (1 − 1/m) ⟨E g, E g⟩        m groups in a training step

    Args:
        products: rule → inner products; all rules have the same groups.
        steps: i[M], the training step of each group. Advantages may depend on the other groups of a step.
        groups_per_step: m.
        base: name of the rule to compare with.

    Raises:
        ValueError: fewer than two steps.
    """
    if len(np.unique(steps)) < 2:
        raise ValueError(f"expected groups of at least 2 steps, got {len(np.unique(steps))}; play more groups")
    apart = steps[:, None] != steps[None, :]

    def of_pairs(matrix: Array) -> _Statistic:
        return _Statistic(np.mean(matrix[apart]), matrix, np.zeros(len(matrix)))

    def of_rule(each: Products) -> tuple[_Statistic, ...]:
        """e, the change of entropy, ⟨E g, E g_base⟩ and ⟨E g, E g⟩."""
        square, own, share = of_pairs(each.own), np.diagonal(each.own), 1 / groups_per_step
        alone = _Statistic(np.mean(own), np.zeros_like(each.own), own)
        size = _sum(share * alone.value + (1 - share) * square.value, (share, alone), (1 - share, square))
        root = np.sqrt(size.value)
        gain, entropy = (
            _sum(x.value / root, (1 / root, x), (-x.value / (2 * root**3), size))
            for x in (of_pairs(each.gain), of_pairs(each.entropy))
        )
        return gain, entropy, of_pairs(each.base), square

    with np.errstate(invalid="ignore", divide="ignore"):
        every = {name: of_rule(each) for name, each in products.items()}
        base_gain, _, _, base_square = every[base]
        found = {}
        for name, (gain, entropy, with_base, square) in every.items():
            excess = _sum(gain.value - base_gain.value, (1, gain), (-1, base_gain))
            found[name] = Efficiency(
                gain=_interval(gain, apart),
                entropy=_interval(entropy, apart),
                ratio=Estimate(1.0, 1.0, 1.0) if name == base else _ratio(gain, base_gain, excess, apart),
                difference=_interval(excess, apart),
                cosine=_interval(_cosine(with_base, square, base_square), apart),
                above=_above(excess, apart),
            )
    return found


def _sum(value: np.floating, *terms: tuple[float | np.floating, _Statistic]) -> _Statistic:
    """A function of statistics: its value, and its derivative in each of them with that statistic."""
    return _Statistic(
        value,
        sum((factor * term.pairs for factor, term in terms), np.zeros(())),
        sum((factor * term.alone for factor, term in terms), np.zeros(())),
    )


def _cosine(product: _Statistic, square: _Statistic, other: _Statistic) -> _Statistic:
    norms = np.sqrt(square.value) * np.sqrt(other.value)
    value = product.value / norms
    terms = (1 / norms, product), (-value / (2 * square.value), square), (-value / (2 * other.value), other)
    return _sum(value, *terms)


def _variance(statistic: _Statistic, apart: Array) -> float:
    """Variance of a statistic, that of a U-statistic of pairs (Hoeffding 1948); NaN with too few groups.

        Var ≈ Var_j(h_j) / M + 2 σ² / (M n)

    M groups, each with n groups of other steps; h_j is what group j changes alone, and σ² the variance of what a pair
    changes beyond its two groups. Gradients are noisy: where a gain is hardly resolved, the second term is the larger
    one. A bootstrap over groups counts it three times.
    """
    count, others = len(apart), float(np.mean(apart.sum(axis=1)))
    if others <= 2:
        return math.nan
    pairs = np.where(apart, (statistic.pairs + statistic.pairs.T) / 2, 0.0)
    rows = pairs.sum(axis=1) / apart.sum(axis=1)
    rest = np.where(apart, pairs - rows[:, None] - rows[None, :] + rows.mean(), 0.0)
    noise = float(np.sum(rest**2)) / (count * (others - 2))
    # The rows' means contain noise of their own, 4 σ² / n.
    alone = float(np.var(2 * rows + statistic.alone, ddof=1)) / count - 4 * noise / (count * others)
    return max(alone, 0.0) + 2 * noise / (count * others)


def _interval(statistic: _Statistic, apart: Array) -> Estimate:
    """The 95 % interval of a normal statistic; NaN where the value is not defined."""
    value = float(statistic.value)
    half = Z * math.sqrt(_variance(statistic, apart)) if math.isfinite(value) else math.nan
    return Estimate(value, value - half, value + half)


def _ratio(gain: _Statistic, base: _Statistic, excess: _Statistic, apart: Array) -> Estimate:
    """gain / base with Fieller's interval: all ρ for which 0 lies in the interval of gain − ρ · base.

    NaN where the interval of `base` contains 0.
    """
    of_gain, of_base, of_excess = (Z**2 * _variance(statistic, apart) for statistic in (gain, base, excess))
    x, y = float(gain.value), float(base.value)
    square, mixed, rest = y**2 - of_base, x * y - (of_gain + of_base - of_excess) / 2, x**2 - of_gain
    if not (y > 0 and square > 0 and math.isfinite(mixed)):
        return Estimate(math.nan, math.nan, math.nan)
    root = math.sqrt(max(mixed**2 - square * rest, 0.0))
    return Estimate(x / y, (mixed - root) / square, (mixed + root) / square)


def _above(excess: _Statistic, apart: Array) -> float:
    value, variance = float(excess.value), _variance(excess, apart)
    if not (math.isfinite(value) and math.isfinite(variance)):
        return math.nan
    return NormalDist().cdf(value / math.sqrt(variance)) if variance else (1 + float(np.sign(value))) / 2


def distinct(table: Array) -> tuple[Array, list[tuple[int, float]]]:
    """Leaves out the rows of a table that are multiples of an earlier row.

        table[c] = factor_c · kept[index_c], up to `PROPORTIONAL`

    Args:
        table: f64[C, R].

    Returns:
        (kept f64[k, R], (index, factor) of each row). A row of zeros has factor 0, and is not kept.
    """
    kept, multiples = np.empty((0, table.shape[1])), list[tuple[int, float]]()
    for row in table:
        factors = kept @ row / np.sum(kept**2, axis=1)
        gaps = np.max(np.abs(row - factors[:, None] * kept), axis=1, initial=0)
        known = np.flatnonzero(gaps <= PROPORTIONAL * np.max(np.abs(row), initial=0))
        if not row.any():
            multiples.append((0, 0.0))
        elif len(known):
            multiples.append((int(known[0]), float(factors[known[0]])))
        else:
            multiples.append((len(kept), 1.0))
            kept = np.vstack([kept, row])
    return kept, multiples


def share_within(entropies: Array, states: Array) -> tuple[float, int]:
    """Share of the variance of H̄ that lies within states, among responses to states that were visited repeatedly.

        Σ_s Σ_i (H̄_i − H̄_s)² / (n_s − 1) · n_s / Σ_s n_s,   over the variance of the same responses

    Args:
        entropies: f[R], H̄, nats.
        states: i[R], equal for responses to the same context.

    Returns:
        (share, number of responses that count); (NaN, 0) where no state was visited twice.
    """
    _, numbers, counts = np.unique(states, return_inverse=True, return_counts=True)
    repeated = counts[numbers] > 1
    values, numbers = entropies[repeated], numbers[repeated]
    if not len(values):
        return float("nan"), 0
    means = np.bincount(numbers, values, len(counts)) / np.maximum(counts, 1)
    within = np.mean((values - means[numbers]) ** 2 * (counts / np.maximum(counts - 1, 1))[numbers])
    between = np.bincount(numbers, minlength=len(counts)) @ (means - values.mean()) ** 2 / len(values)
    # Means of n_s responses vary by within / n_s even where states do not differ.
    noise = np.mean((values - means[numbers]) ** 2 / np.maximum(counts - 1, 1)[numbers])
    total = within + max(between - noise, 0.0)
    return (float(within / total) if total > 0 else float("nan")), len(values)


def decisive_at_low_entropy(advantages: Array, relative: Array, quantile: float = 0.75) -> float:
    """Share of responses with H̃ < 1/2 among those whose |A| is at least its quantile (A ≠ 0); NaN without one.

    Args:
        advantages: f[R], of turns, so that they differ within an episode.
        relative: f[R], H̃, the entropy min-max scaled over its group.
        quantile: of |A| over responses with an advantage.
    """
    size = np.abs(advantages)
    if not (size > 0).any():
        return float("nan")
    decisive = (size > 0) & (size >= np.quantile(size[size > 0], quantile))
    return float(np.mean(relative[decisive] < 0.5))
