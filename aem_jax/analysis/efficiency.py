"""How much return a credit rule's update gains, per unit of step size, compared with another rule's. METHOD §7.

    e_b = ⟨E g_b, ∇J⟩ / √(E‖g_b‖²)        ⟨x, y⟩ = Σ_i x_i y_i / (√v̂_i + ε)

g_b is the gradient of a training step with rule b, ∇J the gradient of the expected return, v̂ Adam's second moments.
Steps of equal root-mean-square size are compared, so e_b does not depend on the scale of a rule's advantages.
Everything is computed from inner products of the gradients of single rollout groups. Groups of different training steps
are independent, so the mean of ⟨g_j, u_k⟩ over such pairs is unbiased, where the norm of a mean gradient is not.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from aem_jax.analysis.estimates import RESAMPLES, Estimate

Array = np.ndarray

PROPORTIONAL = 1e-5
"""Largest difference between proportional numbers, in units of the largest: they are computed in float32."""


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
    """Estimates of one rule, with bootstrap intervals over groups.

    Attributes:
        gain: e_b, return per unit of step size.
        entropy: predicted change of mean token entropy per unit of step size, nats.
        ratio: e_b / e_base, paired; NaN where the interval of e_base contains 0.
        difference: e_b − e_base, paired.
        cosine: of E g_b and E g_base; NaN where an estimate of ‖E g‖² is negative, so not resolved.
        above: share of resamples in which e_b > e_base; 1/2 where they are equal, NaN where none is defined.
    """

    gain: Estimate
    entropy: Estimate
    ratio: Estimate
    difference: Estimate
    cosine: Estimate
    above: float


def efficiencies(
    products: Mapping[str, Products], steps: Array, groups_per_step: int, *, base: str = "base", seed: int = 0
) -> dict[str, Efficiency]:
    """Estimates of e_b for every rule.

        ⟨E x, E y⟩   ≈ mean of ⟨x_j, y_k⟩ over groups j, k of different steps
        E‖g_b‖²      ≈ mean_j ‖g_j‖² / m + (1 − 1/m) ⟨E g, E g⟩        m groups in a training step

    A resample draws M groups with replacement and keeps the pairs of groups of different steps.

    Args:
        products: rule → inner products; all rules have the same groups.
        steps: i[M], the training step of each group. Advantages may depend on the other groups of a step.
        groups_per_step: m.
        base: name of the rule to compare with.
        seed: of the resamples.

    Raises:
        ValueError: fewer than two steps.
    """
    if len(np.unique(steps)) < 2:
        raise ValueError(f"expected groups of at least 2 steps, got {len(np.unique(steps))}; play more groups")
    draws = np.random.default_rng(seed).multinomial(len(steps), np.full(len(steps), 1 / len(steps)), RESAMPLES)
    apart = (steps[:, None] != steps[None, :]).astype(np.float64)
    weights = np.concatenate([np.ones((1, len(steps))), draws])  # the first row is the sample itself
    over_pairs = lambda matrix: np.sum((weights @ matrix) * weights, axis=1)  # Σ_jk w_j M_jk w_k
    pairs = over_pairs(apart)

    def across(matrix: Array) -> Array:
        return over_pairs(apart * matrix) / pairs

    def moments(each: Products) -> tuple[Array, ...]:
        squared = across(each.own)
        alone = weights @ np.diagonal(each.own) / weights.sum(axis=1)
        size = np.sqrt(alone / groups_per_step + (1 - 1 / groups_per_step) * squared)
        return across(each.gain) / size, across(each.entropy) / size, across(each.base), squared

    with np.errstate(invalid="ignore", divide="ignore"):
        every = {name: moments(each) for name, each in products.items()}
        base_gain, _, _, base_squared = every[base]
        undefined = Estimate(np.nan, np.nan, np.nan)
        is_resolved = _interval(base_gain).low > 0
        return {
            name: Efficiency(
                gain=_interval(gain),
                entropy=_interval(entropy),
                ratio=_interval(gain / base_gain) if is_resolved or name == base else undefined,
                difference=_interval(gain - base_gain),
                cosine=_interval(with_base / (np.sqrt(squared) * np.sqrt(base_squared))),
                above=_share_above(gain[1:], base_gain[1:]),
            )
            for name, (gain, entropy, with_base, squared) in every.items()
        }


def _share_above(values: Array, others: Array) -> float:
    """Share of pairs in which the first is larger; equal ones count half, and NaN where no pair is defined."""
    known = np.isfinite(values) & np.isfinite(others)
    above = np.where(values == others, 0.5, values > others)
    return float(np.mean(above[known])) if known.any() else float("nan")


def _interval(values: Array) -> Estimate:
    """The first value, and the 95 % percentile interval of the others; NaN where a value is not defined."""
    low, high = np.nanquantile(values[1:], (0.025, 0.975)) if np.isfinite(values[1:]).any() else (np.nan, np.nan)
    return Estimate(float(values[0]), float(low), float(high))


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
