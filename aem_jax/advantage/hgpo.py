"""HGPO: steps compared with those of the same recent history, for several lengths of history. arXiv 2602.22817."""

import jax
import jax.numpy as jnp

from aem_jax.advantage._checks import id_array, static_count, take
from aem_jax.advantage._segments import centred, value_range
from aem_jax.advantage.estimators import Estimator, grpo
from aem_jax.advantage.experience import Experience, adjacent_rows
from aem_jax.advantage.gigpo import visits

_AT_MEAN = 1e-5
"""Largest distance of a return from its group's mean that is rounding, relative to the group's range."""


def hgpo(
    experience: Experience,
    num_groups: int,
    *,
    estimator: Estimator = grpo,
    gamma: float = 0.95,
    history: int = 2,
    exponent: float = 1.0,
) -> jax.Array:
    """HGPO: advantages of a step among steps that share the last k observations, averaged over k.

        a_k = estimator(G) among responses of one rollout group whose last k observations are equal, k = 1 … K + 1
        A = Σ_k w_k a_k,    w_k = k^α / Σ k^α over the depths with a_k ≠ 0
        G_r = Σ_j γ^j r_{turn + j}

    Deeper groups compare steps with the same history, so they are less biased, and have fewer members. The current
    observation is the first of the k. A response in its k-th turn or later is in groups up to depth k, and a
    singleton has a_k = 0. With K = 0, A is the step part of `gigpo`. The advantage of the episode is not added, as in
    the published implementation by default. There, w_k is proportional to (k + 1)^α: depth 1 is left for the episode.
    Rounding does not decide whether a_k is 0: it is where G is the group's mean up to 10⁻⁵ of the group's range.

    Args:
        experience: one step's; `response_anchor` is equal for responses to the same observation.
        num_groups: number of rollout groups, static.
        estimator: `grpo` divides by the standard deviation (of ddof 0 as published), `dr_grpo` only centres.
        gamma: γ, in [0, 1].
        history: K, static, >= 0: the most observations before the current one.
        exponent: α: 0 weighs all depths alike.

    Returns:
        float[R], no unit; 0 for responses that take no part.

    Raises:
        ValueError: on wrong shapes or dtypes, ids known to lie outside their tables, γ outside [0, 1], or history < 0.
    """
    history = static_count("history", history)
    groups, _, step_returns = visits(experience, num_groups, gamma)
    total, weights = jnp.zeros_like(step_returns), jnp.zeros_like(step_returns)
    for depth, contexts in enumerate(context_ids(experience, history + 1), start=1):
        ids = jnp.where(groups >= 0, contexts, -1)
        advantages = estimator(step_returns, ids, groups.shape[0])
        deviations = centred(step_returns, jnp.ones_like(step_returns), ids, groups.shape[0])
        counts = jnp.abs(deviations) > _AT_MEAN * value_range(step_returns, ids, groups.shape[0])
        weight = jnp.where(counts, float(depth) ** exponent, 0.0)
        total, weights = total + weight * advantages, weights + weight
    return total / jnp.where(weights > 0, weights, 1.0)


def context_ids(experience: Experience, depth: int) -> list[jax.Array]:
    """Ids of the last 1 … `depth` observations of each response, exact: equal ids are equal observations.

        c_1 = anchor        c_k(turn) = rank of the pair (anchor(turn), c_{k−1}(turn − 1)) among all such pairs

    Responses that are empty or masked are part of the history of later ones.

    Args:
        experience: one step's.
        depth: static, >= 1.

    Returns:
        `depth` arrays int[R], in [0, R); -1 where an observation is missing.

    Raises:
        ValueError: on anchors known to lie outside [-1, R).
    """
    anchors = id_array("response_anchor", experience.response_anchor, jnp.shape(experience.response_anchor)[0])
    trajectory, turn = (jnp.asarray(x) for x in (experience.response_trajectory, experience.response_turn))
    previous = adjacent_rows(trajectory, turn, (trajectory >= 0) & (anchors >= 0), -1)
    contexts = [anchors]
    for _ in range(depth - 1):
        contexts.append(_pair_ranks(anchors, take(contexts[-1], previous, -1)))
    return contexts


def _pair_ranks(first: jax.Array, second: jax.Array) -> jax.Array:
    """int[R], dense ranks of the pairs; -1 where an element is -1."""
    known = (first >= 0) & (second >= 0)
    order = jnp.lexsort((second, first, ~known))
    ones, twos = first[order], second[order]
    differs = (ones != jnp.roll(ones, 1)) | (twos != jnp.roll(twos, 1))
    ranks = jnp.cumsum(differs.at[:1].set(False))
    return jnp.where(known, jnp.zeros_like(first).at[order].set(ranks.astype(first.dtype)), -1)
