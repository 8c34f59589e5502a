"""Losses of one microbatch's tokens, policy and supervised, with their stats.

A loss is a sum with weights that are fixed for the whole minibatch, so microbatches add up exactly: the gradient does
not depend on how tokens are packed into rows and rows into microbatches.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
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
    """A loss's inputs for one microbatch, [b, T] each.

    Attributes:
        mask: bool, sampled tokens in the loss.
        weights: f32, weight of each token in the minibatch's loss; 0 outside mask.
        logprobs: f32, as sampled, nats.
        advantages: f32; None for supervised learning.
        reference: f32, log-probability under the reference policy, nats; None without one.
        old_logprobs: f32, log-probability under the learner's policy before the update, nats; None if that is the
            current policy, or if the objective does not use it.
        sequence: f32, log-ratio of the token's sequence, nats; None if each token has its own ratio.
        ages: i32, training steps since the parameters that sampled the token; None if all are the current ones.
        selected: bool, tokens of high covariance (`covariance.py`); None without the control.
    """

    mask: jax.Array
    weights: jax.Array
    logprobs: jax.Array
    advantages: Any
    reference: Any
    old_logprobs: Any = None
    sequence: Any = None
    ages: Any = None
    selected: Any = None


class Stats(NamedTuple):
    """Statistics of one microbatch, computed with its loss.

    Attributes:
        sums: over tokens; they add up over microbatches.
        maxima: over tokens.
        means: contributions to means over responses, with weights that sum to 1 over the minibatch; they add up, too.
    """

    sums: dict[str, jax.Array]
    maxima: dict[str, jax.Array]
    means: Mapping[str, jax.Array] = {}


Objective = Callable[[jax.Array, jax.Array, Tokens], tuple[jax.Array, Stats]]
"""(logprobs f32[b, T], entropies f32[b, T], tokens) -> (this microbatch's part of the loss, stats)."""


@dataclass(frozen=True)
class EntropyObjective:
    """An objective whose loss depends on entropies. For others they are constants, and their gradient costs nothing.

    Attributes:
        objective: the objective.
    """

    objective: Objective

    def __call__(self, logprobs: jax.Array, entropies: jax.Array, tokens: Tokens) -> tuple[jax.Array, Stats]:
        """(This microbatch's part of the loss, stats)."""
        return self.objective(logprobs, entropies, tokens)


AGGREGATIONS: Mapping[str, Callable[[LearnerConfig], Aggregation]] = {
    "token-mean": lambda config: token_mean,
    "response-mean": lambda config: response_mean,
    "trajectory-mean": lambda config: trajectory_mean,
    "constant": lambda config: constant_length(config.constant_length),
}
"""`LearnerConfig.aggregation` → weights of tokens in the loss."""


def supervised_objective() -> Objective:
    """Cross-entropy: L = −Σ_t w_t · logp_t."""

    def objective(logprobs: jax.Array, entropies: jax.Array, tokens: Tokens) -> tuple[jax.Array, Stats]:
        sums = {"entropy": jnp.sum(entropies, where=tokens.mask)}
        return -jnp.sum(tokens.weights * logprobs, where=tokens.mask), Stats(sums, {})

    return objective


def policy_objective(config: LearnerConfig, max_age: int = 0) -> Objective:
    """Clipped surrogate, plus the KL to the reference policy if there is one.

    ρ_t = exp(logp_t − logp_t as sampled), or the ratio of the token's sequence (`sequence_policy_loss`)
    L = Σ_t w_t · [ −min(ρ_t A_t, clip(ρ_t, 1 − low, 1 + high) A_t) + β · k3_t ]

    With an importance cap c the two roles of the ratio are separated. The clipped ratio is to the learner's own policy
    before the update; a truncated importance weight corrects for the sampler's policy. (The weight together with the
    first ratio would count the gap between learner and sampler twice.)

    ρ_t = exp(logp_t − logp_t^old)
    L = Σ_t w_t · min(exp(logp_t^old − logp_t as sampled), c) · [ … ]

    The log-probabilities of carried episodes (`Tokens.ages`) are as sampled, from the parameters of their step, so the
    weight corrects for these, too. Parity is measured at tokens of the current parameters; at older tokens the gap is
    the change of the policy, and it is measured for each age in 1 … max_age.

    Three controls of entropy are off by default. The bonus is the entropy of the distribution that tokens are sampled
    from, with its own gradient. No importance weight multiplies it: H_t is computed from the whole distribution, not
    estimated from the sampled token:

    L − c · Σ_t w_t H_t

    Clip-Cov leaves the selected tokens of `covariance.py` out of the clipped surrogate, and KL-Cov penalises a change
    of their probability (arXiv 2505.22617):

    ℓ_t = 0 for selected t        ℓ_t + β |logp_t − logp_t^old| for selected t
    """
    cap = config.importance_cap
    bounds = {"clip_low": config.clip_low, "clip_high": config.clip_high, "dual_clip": config.dual_clip}

    def objective(logprobs: jax.Array, entropies: jax.Array, tokens: Tokens) -> tuple[jax.Array, Stats]:
        mask = tokens.mask
        total = lambda x: jnp.sum(x, where=mask)
        top = lambda x: jnp.max(x, where=mask, initial=0.0)
        old_logprobs = jax.lax.stop_gradient(logprobs) if tokens.old_logprobs is None else tokens.old_logprobs
        if tokens.sequence is None:
            denominator = old_logprobs if cap else tokens.logprobs
            token = clipped_policy_loss(logprobs, denominator, tokens.advantages, **bounds)
        else:
            token = sequence_policy_loss(logprobs, tokens.sequence, tokens.advantages, **bounds)
        loss = token.loss
        sums = {"clip_fraction": total(token.clipped), "ratio_mean": total(token.ratio)}
        if tokens.selected is not None:
            loss = COVARIANCE_LOSSES[config.covariance](loss, logprobs - old_logprobs, tokens.selected, config)
            sums["covariance_fraction"] = total(tokens.selected)
        if tokens.reference is not None:
            kl = k3(logprobs, tokens.reference)
            loss = loss + config.kl_coefficient * kl
            sums["kl_reference"] = total(kl)
        if cap:
            importance = truncated_importance(old_logprobs, tokens.logprobs, cap)
            loss = loss * importance
            sums["importance_mean"] = total(importance)
            sums["importance_capped"] = total(importance >= cap)
        sums |= {"kl_sampler": total(k3(tokens.logprobs, logprobs)), "entropy": total(entropies)}
        parity_sums, parity_maxima = parity(jnp.abs(logprobs - tokens.logprobs), mask, tokens.ages, max_age)
        if config.entropy_coefficient:
            loss = loss - config.entropy_coefficient * entropies
        loss = jnp.sum(tokens.weights * loss, where=mask)
        return loss, Stats(sums | parity_sums, {"ratio_max": top(token.ratio)} | parity_maxima)

    return EntropyObjective(objective) if config.entropy_coefficient else objective


CovarianceLoss = Callable[[jax.Array, jax.Array, jax.Array, LearnerConfig], jax.Array]
"""(losses f32[b, T], logp − logp^old f32[b, T], selected bool[b, T], config) -> losses f32[b, T]."""

COVARIANCE_LOSSES: Mapping[str, CovarianceLoss] = {
    "clip": lambda losses, change, selected, config: jnp.where(selected, 0.0, losses),
    # At 0, where the policy has not moved, |x| would have a slope of 1.
    "kl": lambda losses, change, selected, config: (
        losses + config.covariance_penalty * jnp.where(selected & (change != 0), jnp.abs(change), 0.0)
    ),
}
"""`LearnerConfig.covariance` → the losses of tokens, some of which are selected."""


def parity(
    gap: jax.Array, mask: jax.Array, ages: jax.Array | None, max_age: int
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Sums and maxima of a gap over tokens; with ages, for each age, with the number of its tokens.

    Args:
        gap: f32[b, T], >= 0.
        mask: bool[b, T], the tokens.
        ages: i32[b, T]; None if all are 0.
        max_age: the largest age.
    """
    over = lambda tokens: (jnp.sum(gap, where=tokens), jnp.max(gap, where=tokens, initial=0.0))
    if ages is None:
        total, top = over(mask)
        return {"parity_mean": total}, {"parity_max": top}
    sums, maxima = {}, {}
    for age in range(max_age + 1):
        tokens = mask & (ages == age)
        name = parity_name(age)
        sums[f"{name}_mean"], maxima[f"{name}_max"] = over(tokens)
        sums[f"{name}_tokens"] = jnp.sum(tokens, dtype=jnp.float32)
    return sums, maxima


def parity_name(age: int) -> str:
    """First part of the names of the parity statistics of tokens of an age."""
    return f"parity_age_{age}" if age else "parity"
