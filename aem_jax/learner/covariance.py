"""The tokens that lower entropy most: log-probability and advantage covary. Clip-Cov and KL-Cov, arXiv 2505.22617.

    C_t = (A_t − mean A) · (logp_t − mean logp)        means over all sampled tokens of the batch

An update on a likely token with a high advantage (large C_t) lowers entropy. Entropy is kept up by leaving a few such
tokens out of the loss, or by penalising a change of their probability. `policy_objective` does either.

Tokens are selected once for a batch, by log-probabilities as sampled. So a token's loss still depends on its own
numbers alone, and not on the packing. The published implementation selects in each microbatch, by the log-probabilities
of the current policy, and for Clip-Cov among tokens that the ratio's clip does not stop.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from aem_jax.batch import Batch
from aem_jax.learner.config import LearnerConfig

Array = jax.Array


def covariances(logprobs: Array, advantages: Array, mask: Array) -> Array:
    """Each token's part of the covariance of log-probability and advantage.

        C_t = (A_t − mean A) · (logp_t − mean logp)

    Args:
        logprobs: f32[...], nats.
        advantages: f32[...].
        mask: bool[...], the tokens that count.

    Returns:
        f32[...], in units of the advantage times nats; 0 outside the mask.
    """
    centred = lambda x: x - jnp.mean(x, where=mask)
    return jnp.where(mask, centred(advantages) * centred(logprobs), 0.0)


def clip_cov(covariance: Array, mask: Array, draws: Array, share: float, low: float, high: float) -> Array:
    """Clip-Cov: some tokens drawn from those with low < C < high, all with the same probability.

        max(1, ⌊share · tokens⌋) tokens, or all with low < C < high if these are fewer

    Args:
        covariance: f32[...].
        mask: bool[...], the tokens that count.
        draws: f32[...], random numbers; the tokens with the lowest are drawn.
        share: in (0, 1].
        low: exclusive.
        high: exclusive.

    Returns:
        bool[...], the selected tokens.
    """
    return _first(mask & (covariance > low) & (covariance < high), (draws,), _count(mask, share))


def kl_cov(covariance: Array, mask: Array, draws: Array, share: float) -> Array:
    """KL-Cov: the tokens with the largest C.

        max(1, ⌊share · tokens⌋) tokens

    Args:
        covariance: f32[...].
        mask: bool[...], the tokens that count.
        draws: f32[...], random numbers that decide between equal C. Equal C are frequent: tokens without an alternative
            have log-probability 0.
        share: in (0, 1].

    Returns:
        bool[...], the selected tokens.
    """
    return _first(mask, (draws, -covariance), _count(mask, share))


SELECTIONS: Mapping[str, Callable[[Array, Array, Array, LearnerConfig], Array]] = {
    "clip": lambda covariance, mask, draws, config: clip_cov(
        covariance, mask, draws, config.covariance_share, *config.covariance_range
    ),
    "kl": lambda covariance, mask, draws, config: kl_cov(covariance, mask, draws, config.covariance_share),
}
"""`LearnerConfig.covariance` → the selection; "off" has none."""


def selected_tokens(config: LearnerConfig, batch: Batch, advantages: Array | None, step: Any) -> Array | None:
    """bool[M, b, T], the tokens that the control acts on in this step; None without one, or without advantages.

    Random numbers belong to a response and a position, so they do not depend on the packing.
    """
    if config.covariance == "off" or advantages is None:
        return None
    mask = batch.response_ids >= 0
    key = jax.random.fold_in(jax.random.key(_SELECTION), step)
    draw = lambda response, position: jax.random.uniform(
        jax.random.fold_in(jax.random.fold_in(key, response), position)
    )
    draws = jax.vmap(draw)(batch.response_ids.reshape(-1), batch.positions.reshape(-1)).reshape(mask.shape)
    return SELECTIONS[config.covariance](covariances(batch.logprobs, advantages, mask), mask, draws, config)


def _count(mask: Array, share: float) -> Array:
    return jnp.maximum(jnp.floor(share * jnp.sum(mask)).astype(jnp.int32), 1)


def _first(mask: Array, keys: tuple[Array, ...], count: Array) -> Array:
    """bool[...], the first `count` elements of the mask, by the last of `keys`, then by the one before."""
    order = jnp.lexsort((*(key.reshape(-1) for key in keys), ~mask.reshape(-1)))
    ranks = jnp.zeros_like(order).at[order].set(jnp.arange(order.size))
    return mask & (ranks.reshape(mask.shape) < count)


_SELECTION = 0xC0BA12
"""Seed of the draws: of each step's number alone, not of the run's seed."""
