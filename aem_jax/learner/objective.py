"""What a microbatch's tokens are worth: the policy's loss, the supervised loss, and what is measured beside them.

Losses are sums with weights that were fixed for the whole minibatch, so microbatches add up exactly: however the tokens
are packed and cut, the gradient is that of one big batch.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from aem_jax.batch import Batch
from aem_jax.learner.config import LearnerConfig


class Tokens(NamedTuple):
    """One microbatch as a loss sees it, [b, T] each.

    Attributes:
        mask: bool, sampled tokens.
        weights: f32, share of each token in the minibatch's loss; 0 outside mask.
        logprobs: f32, as sampled, nats.
        advantages: f32; None for supervised learning.
        reference: f32, log-probability under the reference policy, nats; None without one.
    """

    mask: jax.Array
    weights: jax.Array
    logprobs: jax.Array
    advantages: jax.Array | None
    reference: jax.Array | None


class Measures(NamedTuple):
    """What adds up over microbatches, and what takes its maximum."""

    sums: dict[str, jax.Array]
    maxima: dict[str, jax.Array]


Objective = Callable[[jax.Array, jax.Array, Tokens], tuple[jax.Array, Measures]]
"""(logprobs f32[b, T], entropies f32[b, T], tokens) -> (this microbatch's part of the loss, measures)."""


def token_weights(batch: Batch, minibatch: jax.Array, config: LearnerConfig) -> jax.Array:
    """Share of one token of each response in a minibatch's loss, f32[R]; 0 for responses outside it."""
    inside = batch.response_valid & (batch.trajectory_minibatch[batch.response_trajectory] == minibatch)
    tokens = jnp.where(inside, batch.response_tokens, 0).astype(jnp.float32)
    num_trajectories = batch.valid.shape[0]
    per_trajectory = jax.ops.segment_sum(tokens, batch.response_trajectory, num_trajectories)
    present = jnp.sum(per_trajectory > 0).astype(jnp.float32)
    total = {
        "token-mean": lambda: jnp.sum(tokens),
        "response-mean": lambda: jnp.sum(inside) * tokens,
        "trajectory-mean": lambda: present * per_trajectory[batch.response_trajectory],
        "constant": lambda: present * config.constant_length,
    }[config.aggregation]()
    return jnp.where(inside, 1.0 / jnp.maximum(total, 1.0), 0.0)


class TokenLoss(NamedTuple):
    loss: jax.Array
    ratio: jax.Array
    clipped: jax.Array


def clipped_policy_loss(logprobs, old, advantages, *, clip_low, clip_high):
    ratio = jnp.exp(logprobs - old)
    bounded = jnp.clip(ratio, 1 - clip_low, 1 + clip_high)
    loss = -jnp.minimum(ratio * advantages, bounded * advantages)
    return TokenLoss(loss, ratio, (bounded * advantages < ratio * advantages).astype(jnp.float32))


def k3(logprobs, reference):
    d = reference - logprobs
    return jnp.exp(d) - 1 - d


def supervised_objective() -> Objective:
    """Cross-entropy: L = −Σ_t w_t · logp_t."""

    def objective(logprobs: jax.Array, entropies: jax.Array, tokens: Tokens) -> tuple[jax.Array, Measures]:
        sums = {"entropy": jnp.sum(entropies, where=tokens.mask)}
        return -jnp.sum(tokens.weights * logprobs), Measures(sums, {})

    return objective


def policy_objective(config: LearnerConfig) -> Objective:
    """Clipped token ratio, and the KL to the reference if there is one.

    ρ_t = exp(logp_t − logp_t as sampled)
    L = Σ_t w_t · [ −min(ρ_t A_t, clip(ρ_t, 1 − low, 1 + high) A_t) + β · k3_t ]
    """

    def objective(logprobs: jax.Array, entropies: jax.Array, tokens: Tokens) -> tuple[jax.Array, Measures]:
        mask = tokens.mask
        total = lambda x: jnp.sum(x, where=mask)  # noqa: E731
        top = lambda x: jnp.max(x, where=mask, initial=0.0)  # noqa: E731
        token = clipped_policy_loss(
            logprobs, tokens.logprobs, tokens.advantages, clip_low=config.clip_low, clip_high=config.clip_high
        )
        loss = token.loss
        sums = {"clip_share": total(token.clipped), "ratio_mean": total(token.ratio)}
        if tokens.reference is not None:
            kl = k3(logprobs, tokens.reference)
            loss = loss + config.kl_coefficient * kl
            sums["kl_reference"] = total(kl)
        gap = jnp.abs(logprobs - tokens.logprobs)
        sums |= {
            "kl_sampler": total(k3(logprobs, tokens.logprobs)),
            "entropy": total(entropies),
            "parity_mean": total(gap),
        }
        return jnp.sum(tokens.weights * loss), Measures(sums, {"ratio_max": top(token.ratio), "parity_max": top(gap)})

    return objective
