"""What a microbatch's tokens are worth: the policy's loss, the supervised loss, and what is measured beside them.

Losses are sums with weights that were fixed for the whole minibatch, so microbatches add up exactly: however the tokens
are packed and cut, the gradient is that of one big batch.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from aem_jax.learner.config import LearnerConfig
from aem_jax.losses import (
    Aggregation,
    clipped_policy_loss,
    constant_length,
    k3,
    response_mean,
    sequence_policy_loss,
    token_mean,
    trajectory_mean,
    truncated_importance,
)


class Tokens(NamedTuple):
    """One microbatch as a loss sees it, [b, T] each.

    Attributes:
        mask: bool, sampled tokens that count.
        weights: f32, share of each token in the minibatch's loss; 0 outside mask.
        logprobs: f32, as sampled, nats.
        advantages: f32; None for supervised learning.
        reference: f32, log-probability under the reference policy, nats; None without one.
        before: f32, log-probability under the learner's policy before the update, nats; None where that is the present
            one, or nobody asks.
        sequence: f32, log-ratio of the sequence that the token stands in, nats; None where each has its own.
    """

    mask: jax.Array
    weights: jax.Array
    logprobs: jax.Array
    advantages: Any
    reference: Any
    before: Any = None
    sequence: Any = None


class Measures(NamedTuple):
    """What is measured beside a loss.

    Attributes:
        sums: over tokens; they add up over microbatches.
        maxima: over tokens.
        means: parts of means over responses, with weights that add up to 1 over the minibatch; they add up as well.
    """

    sums: dict[str, jax.Array]
    maxima: dict[str, jax.Array]
    means: Mapping[str, jax.Array] = {}


Objective = Callable[[jax.Array, jax.Array, Tokens], tuple[jax.Array, Measures]]
"""(logprobs f32[b, T], entropies f32[b, T], tokens) -> (this microbatch's part of the loss, measures)."""


AGGREGATIONS: Mapping[str, Callable[[LearnerConfig], Aggregation]] = {
    "token-mean": lambda config: token_mean,
    "response-mean": lambda config: response_mean,
    "trajectory-mean": lambda config: trajectory_mean,
    "constant": lambda config: constant_length(config.constant_length),
}
"""Name → how tokens add up to a loss."""


def supervised_objective() -> Objective:
    """Cross-entropy: L = −Σ_t w_t · logp_t."""

    def objective(logprobs: jax.Array, entropies: jax.Array, tokens: Tokens) -> tuple[jax.Array, Measures]:
        sums = {"entropy": jnp.sum(entropies, where=tokens.mask)}
        return -jnp.sum(tokens.weights * logprobs, where=tokens.mask), Measures(sums, {})

    return objective


def policy_objective(config: LearnerConfig) -> Objective:
    """Clipped ratio, and the KL to the reference if there is one.

    ρ_t = exp(logp_t − logp_t as sampled), or the ratio of the token's sequence (`sequence_policy_loss`)
    L = Σ_t w_t · [ −min(ρ_t A_t, clip(ρ_t, 1 − low, 1 + high) A_t) + β · k3_t ]

    With an importance cap c the two things that the ratio does are told apart: it compares with the learner's own
    policy before the update, which it may not leave by more than the clip, and what the sampler's policy was is made
    good by a weight. (A weight *beside* the ratio above would count the sampler's gap twice.)

    ρ_t = exp(logp_t − logp_t before)
    L = Σ_t w_t · min(exp(logp_t before − logp_t as sampled), c) · [ … ]
    """
    cap = config.importance_cap
    bounds = {"clip_low": config.clip_low, "clip_high": config.clip_high, "dual_clip": config.dual_clip}

    def objective(logprobs: jax.Array, entropies: jax.Array, tokens: Tokens) -> tuple[jax.Array, Measures]:
        mask = tokens.mask
        total = lambda x: jnp.sum(x, where=mask)
        top = lambda x: jnp.max(x, where=mask, initial=0.0)
        before = jax.lax.stop_gradient(logprobs) if tokens.before is None else tokens.before
        old = before if cap else tokens.logprobs
        if tokens.sequence is None:
            token = clipped_policy_loss(logprobs, old, tokens.advantages, **bounds)
        else:
            token = sequence_policy_loss(logprobs, tokens.sequence, tokens.advantages, **bounds)
        loss = token.loss
        sums = {"clip_fraction": total(token.clipped), "ratio_mean": total(token.ratio)}
        if tokens.reference is not None:
            kl = k3(logprobs, tokens.reference)
            loss = loss + config.kl_coefficient * kl
            sums["kl_reference"] = total(kl)
        if cap:
            importance = truncated_importance(before, tokens.logprobs, cap)
            loss = loss * importance
            sums["importance_mean"] = total(importance)
            sums["importance_capped"] = total(importance >= cap)
        gap = jnp.abs(logprobs - tokens.logprobs)
        sums |= {
            "kl_sampler": total(k3(logprobs, tokens.logprobs)),
            "entropy": total(entropies),
            "parity_mean": total(gap),
        }
        loss = jnp.sum(tokens.weights * loss, where=mask)
        return loss, Measures(sums, {"ratio_max": top(token.ratio), "parity_max": top(gap)})

    return objective
