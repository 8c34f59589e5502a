"""Policy losses as pure functions of one token's numbers, and their aggregation over tokens. Imports jax alone.

A loss is `Σ_t w_t · ℓ_t` over the tokens of a minibatch. The weights are fixed before any gradient is taken, from a
small table of responses, so the sum does not depend on how tokens are packed into rows and rows into microbatches: no
mean is taken over the tokens of one array. An aggregation is a function from that table to weights.

The ratio of a sequence (GSPO) depends on all its tokens. Log-ratios are summed for each response, in a table again,
before any loss is computed.

A value head's loss is a sum over states instead of tokens, with weights that are also fixed in advance.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

__all__ = [
    "MAX_LOG_RATIO",
    "Aggregation",
    "SequenceRatio",
    "TokenLoss",
    "ValueLoss",
    "clipped_policy_loss",
    "clipped_value_loss",
    "constant_length",
    "k1",
    "k3",
    "response_log_ratios",
    "response_mean",
    "sequence_policy_loss",
    "token_mean",
    "trajectory_log_ratios",
    "trajectory_mean",
    "truncated_importance",
]

MAX_LOG_RATIO = 20.0
"""Bound on log-ratios, in nats. A ratio beyond e^20 has no meaning; e^89 is infinite in float32, and 0 · inf is NaN."""


class TokenLoss(NamedTuple):
    """A policy loss, token by token; all shaped as the log-probabilities."""

    loss: jax.Array
    """float, ℓ_t, to be minimised."""
    ratio: jax.Array
    """float, ρ_t = π(a_t) / π_old(a_t)."""
    clipped: jax.Array
    """bool, whether the clip is active, so that no gradient flows."""


def clipped_policy_loss(
    logprobs: ArrayLike,
    old_logprobs: ArrayLike,
    advantages: ArrayLike,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float = 0.0,
) -> TokenLoss:
    """PPO's clipped surrogate on token ratios (arXiv 1707.06347), with separate bounds as in DAPO (arXiv 2503.14476).

        ρ_t = exp(logp_t − logp_t^old)
        ℓ_t = −min( ρ_t A_t,  clip(ρ_t, 1 − clip_low, 1 + clip_high) A_t )

    With a dual clip c (arXiv 1912.09729), ℓ_t = min(ℓ_t above, −c A_t) where A_t < 0: without it, the loss of a token
    that became much likelier is unbounded there. Gradients flow through `logprobs` alone.

    Args:
        logprobs: float[...], of the sampled tokens under the policy being trained, nats.
        old_logprobs: float[...], same shape, as sampled.
        advantages: float[...], same shape.
        clip_low: the ratio is clipped below at 1 − clip_low, in [0, 1].
        clip_high: the ratio is clipped above at 1 + clip_high, >= 0.
        dual_clip: c, > 1; 0 for none.

    Returns:
        TokenLoss, float32 or wider.

    Raises:
        ValueError: on shapes that differ, dtypes that are not floating, or bounds out of range.
    """
    logprobs, old_logprobs, advantages = _floats(logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages)
    log_ratio = _log_ratio(logprobs, jax.lax.stop_gradient(old_logprobs))
    return _clipped(log_ratio, advantages, clip_low, clip_high, dual_clip)


def sequence_policy_loss(
    logprobs: ArrayLike,
    sequence_log_ratio: ArrayLike,
    advantages: ArrayLike,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float = 0.0,
) -> TokenLoss:
    """GSPO: the clipped surrogate on the ratio of the sequence that a token belongs to (arXiv 2507.18071).

        s = exp( 1/n Σ_t (logp_t − logp_t^old) )                over the n tokens of the sequence
        ρ_t = s · exp(logp_t − sg[logp_t])                      sg: no gradient
        ℓ_t = −min( ρ_t A_t,  clip(ρ_t, 1 − clip_low, 1 + clip_high) A_t )

    ρ_t is s in value, so tokens of a sequence are clipped together if their advantages have one sign. The sum of ℓ_t
    has the gradient of GSPO's own loss, in which s itself is differentiated. With one weight w and one advantage A for
    the sequence that loss is L = Σ_t w ℓ = −n w s A (where the clip is not active), and

        ∂L/∂logp_u = −n w A · ∂s/∂logp_u = −n w A · s / n = −w s A = ∂(Σ_t w ℓ_t)/∂logp_u

    GSPO's mean over sequences is w = 1 / (number of sequences · n): `response_mean`, or `trajectory_mean` for
    sequences of all a trajectory's responses. Where advantages or weights differ inside a sequence (the responses of a
    trajectory, after AEM), each token is credited with its own, not with the mean of its sequence: GSPO-token (§4.3 of
    the paper). The loss of a token needs only its own numbers and s, so it can be computed where its logits are.

    Args:
        logprobs: float[...], of the sampled tokens under the policy being trained, nats.
        sequence_log_ratio: float[...], same shape, log s of each token's sequence under the same policy, nats
            (`response_log_ratios`, `trajectory_log_ratios`); no gradient flows through it.
        advantages: float[...], same shape.
        clip_low: s is clipped below at 1 − clip_low, in [0, 1].
        clip_high: s is clipped above at 1 + clip_high, >= 0.
        dual_clip: c of `clipped_policy_loss`, > 1; 0 for none.

    Returns:
        TokenLoss, float32 or wider.

    Raises:
        ValueError: on shapes that differ, dtypes that are not floating, or bounds out of range.
    """
    logprobs, sequence, advantages = _floats(
        logprobs=logprobs, sequence_log_ratio=sequence_log_ratio, advantages=advantages
    )
    sequence = jnp.clip(jax.lax.stop_gradient(sequence), -MAX_LOG_RATIO, MAX_LOG_RATIO)
    return _clipped(sequence + (logprobs - jax.lax.stop_gradient(logprobs)), advantages, clip_low, clip_high, dual_clip)


def _clipped(
    log_ratio: jax.Array, advantages: jax.Array, clip_low: float, clip_high: float, dual_clip: float
) -> TokenLoss:
    if not 0 <= clip_low <= 1 or not clip_high >= 0:
        raise ValueError(f"expected clip_low in [0, 1] and clip_high >= 0, got {clip_low} and {clip_high}")
    if dual_clip and not dual_clip > 1:
        raise ValueError(f"expected dual_clip of 0 (off) or above 1, got {dual_clip}")
    advantages = jax.lax.stop_gradient(advantages)
    ratio = jnp.exp(log_ratio)
    free = ratio * advantages
    bounded = jnp.clip(ratio, 1 - clip_low, 1 + clip_high) * advantages
    loss, clipped = -jnp.minimum(free, bounded), bounded < free
    if dual_clip:
        most = jnp.where(advantages < 0, -dual_clip * advantages, jnp.inf)
        loss, clipped = jnp.minimum(loss, most), clipped | (most < loss)
    return TokenLoss(loss, ratio, clipped)


SequenceRatio = Callable[[ArrayLike, ArrayLike, ArrayLike, int], jax.Array]
"""(sums f32[R], response_tokens i32[R], response_trajectory i32[R], num_trajectories) -> f32[R], log s of the sequence
that each response belongs to, nats. `sums` are Σ_t (logp_t − logp_t^old) over the tokens of each response; a response
without tokens is outside the minibatch, and gets 0."""


def response_log_ratios(
    sums: ArrayLike, response_tokens: ArrayLike, response_trajectory: ArrayLike, num_trajectories: int
) -> jax.Array:
    """The sequence is the response.

        log s_r = Σ_{t of r} (logp_t − logp_t^old) / n_r

    Args:
        sums: float[R], of each response's log-ratios, nats.
        response_tokens: int[R], n_r: tokens of each response; 0 for responses outside the minibatch.
        response_trajectory: int[R], trajectory of each response.
        num_trajectories: static size of the trajectory table.

    Returns:
        float32[R], nats; 0 where n_r = 0.

    Raises:
        ValueError: on shapes or dtypes that do not fit.
    """
    tokens, _, _ = _table(response_tokens, response_trajectory, num_trajectories)
    return jnp.where(tokens > 0, _floats(sums=sums)[0] / jnp.maximum(tokens, 1.0), 0.0)


def trajectory_log_ratios(
    sums: ArrayLike, response_tokens: ArrayLike, response_trajectory: ArrayLike, num_trajectories: int
) -> jax.Array:
    """The sequence is all responses of a trajectory.

        log s_r = Σ_{t of all responses of r's trajectory} (logp_t − logp_t^old) / Σ_{r' of it} n_r'

    Args, Returns and Raises as `response_log_ratios`.
    """
    tokens, lengths, trajectory = _table(response_tokens, response_trajectory, num_trajectories)
    used = jnp.where(tokens > 0, _floats(sums=sums)[0], 0.0)
    total = jax.ops.segment_sum(used, trajectory, num_trajectories)
    return jnp.where(tokens > 0, (total / jnp.maximum(lengths, 1.0))[trajectory], 0.0)


def truncated_importance(logprobs: ArrayLike, sampled_logprobs: ArrayLike, cap: float) -> jax.Array:
    """Truncated importance weight of tokens that another policy sampled, without gradient.

        w_t = min( exp(logp_t − logp_t^sampled), cap )

    The mean of w ∇ℓ over tokens of the sampler μ is that over tokens of the learner π, except where π(a) > cap · μ(a):
    there the weight is capped, which bounds the variance. Truncated importance sampling (Ionides 2008), token by token,
    for a sampler whose numbers differ from the learner's: Yao et al. 2025, "Your efficient RL framework secretly brings
    you off-policy RL training".

    Args:
        logprobs: float[...], of the sampled tokens under the learner's policy *before* the update, nats.
        sampled_logprobs: float[...], same shape, as sampled.
        cap: >= 1.

    Returns:
        float[...], in [0, cap].

    Raises:
        ValueError: on shapes that differ, dtypes that are not floating, or a cap below 1.
    """
    if not cap >= 1:
        raise ValueError(f"expected cap >= 1, got {cap}; below 1 even tokens that both policies agree on would be cut")
    logprobs, sampled_logprobs = _floats(logprobs=logprobs, sampled_logprobs=sampled_logprobs)
    return jax.lax.stop_gradient(jnp.minimum(jnp.exp(_log_ratio(logprobs, sampled_logprobs)), cap))


class ValueLoss(NamedTuple):
    """A value loss, state by state; all shaped as the values."""

    loss: jax.Array
    """float, ℓ, to be minimised, in units of reward squared."""
    clipped: jax.Array
    """bool, whether the clip is active, so that no gradient flows."""


def clipped_value_loss(values: ArrayLike, old_values: ArrayLike, returns: ArrayLike, *, clip: float) -> ValueLoss:
    """PPO's value loss: no gradient once a value has moved by `clip` towards its return (arXiv 1707.06347).

        ℓ = ½ max( (V − R)²,  (V_old + clip(V − V_old, −ε, ε) − R)² )

    As in published implementations; the paper has the square alone. Gradients flow through `values` alone.

    Args:
        values: float[...], V, in units of reward.
        old_values: float[...], same shape, V_old: before the first optimizer step on this batch.
        returns: float[...], same shape, R.
        clip: ε, >= 0, in units of reward; 0 for none.

    Returns:
        ValueLoss, float32 or wider.

    Raises:
        ValueError: on shapes that differ, dtypes that are not floating, or clip < 0.
    """
    if not clip >= 0:
        raise ValueError(f"expected clip of 0 (off) or above, got {clip}")
    values, old, returns = _floats(values=values, old_values=old_values, returns=returns)
    old, returns = jax.lax.stop_gradient(old), jax.lax.stop_gradient(returns)
    free = (values - returns) ** 2
    if not clip:
        return ValueLoss(0.5 * free, jnp.zeros(free.shape, jnp.bool_))
    bounded = (old + jnp.clip(values - old, -clip, clip) - returns) ** 2
    # Inside the bounds both are equal up to rounding, which must not count as a clip.
    beyond = jnp.abs(values - old) > clip
    return ValueLoss(0.5 * jnp.maximum(free, bounded), beyond & (bounded > free))


def k1(logprobs: ArrayLike, reference_logprobs: ArrayLike) -> jax.Array:
    """KL(π ‖ π_ref) by one sample: unbiased, of either sign. A statistic only: its gradient is not that of the KL.

        k1_t = logp_t − logp_t^ref

    Args:
        logprobs: float[...], of tokens sampled from π, nats.
        reference_logprobs: float[...], same shape.

    Returns:
        float[...], nats.

    Raises:
        ValueError: on shapes that differ, or dtypes that are not floating.
    """
    logprobs, reference_logprobs = _floats(logprobs=logprobs, reference_logprobs=reference_logprobs)
    return logprobs - jax.lax.stop_gradient(reference_logprobs)


def k3(logprobs: ArrayLike, reference_logprobs: ArrayLike) -> jax.Array:
    """KL(π ‖ π_ref) by one sample: unbiased, never negative, of low variance. As in GRPO (arXiv 2402.03300).

        d_t = logp_t^ref − logp_t        k3_t = e^{d_t} − 1 − d_t

    Args:
        logprobs: float[...], of tokens sampled from π, nats.
        reference_logprobs: float[...], same shape.

    Returns:
        float[...], nats, >= 0.

    Raises:
        ValueError: on shapes that differ, or dtypes that are not floating.
    """
    logprobs, reference_logprobs = _floats(logprobs=logprobs, reference_logprobs=reference_logprobs)
    difference = _log_ratio(jax.lax.stop_gradient(reference_logprobs), logprobs)
    return jnp.expm1(difference) - difference


Aggregation = Callable[[ArrayLike, ArrayLike, int], jax.Array]
"""(response_tokens i32[R], response_trajectory i32[R], num_trajectories) -> f32[R], the weight of *each token* of each
response. A response without tokens is outside the minibatch: it has weight 0 and is not counted, nor is a trajectory of
such responses."""


def token_mean(response_tokens: ArrayLike, response_trajectory: ArrayLike, num_trajectories: int) -> jax.Array:
    """Every token counts the same (DAPO).

        w = 1 / Σ_r n_r

    Args:
        response_tokens: int[R], n_r: tokens of each response; 0 for responses outside the minibatch.
        response_trajectory: int[R], trajectory of each response.
        num_trajectories: static size of the trajectory table.

    Returns:
        float32[R], weight of each token of each response; 0 where n_r = 0.

    Raises:
        ValueError: on shapes or dtypes that do not fit.
    """
    tokens, _, _ = _table(response_tokens, response_trajectory, num_trajectories)
    return _inverse(jnp.broadcast_to(jnp.sum(tokens), tokens.shape), tokens)


def response_mean(response_tokens: ArrayLike, response_trajectory: ArrayLike, num_trajectories: int) -> jax.Array:
    """Every response counts the same, its tokens share.

        w_r = 1 / (number of responses · n_r)

    Args, Returns and Raises as `token_mean`.
    """
    tokens, _, _ = _table(response_tokens, response_trajectory, num_trajectories)
    return _inverse(jnp.sum(tokens > 0, dtype=tokens.dtype) * tokens, tokens)


def trajectory_mean(response_tokens: ArrayLike, response_trajectory: ArrayLike, num_trajectories: int) -> jax.Array:
    """Every trajectory has the same total weight, divided equally among its tokens (GRPO).

        w_r = 1 / (number of trajectories · Σ_{r' of the same trajectory} n_r')

    Args, Returns and Raises as `token_mean`.
    """
    tokens, lengths, trajectory = _table(response_tokens, response_trajectory, num_trajectories)
    return _inverse(jnp.sum(lengths > 0, dtype=lengths.dtype) * lengths[trajectory], tokens)


def constant_length(length: int) -> Aggregation:
    """Tokens are summed and divided by a constant, so that no length is favoured (Dr.GRPO, arXiv 2503.20783).

        w = 1 / (number of trajectories · length)

    Args:
        length: > 0, tokens; usually the token budget of a trajectory.

    Returns:
        An aggregation; args, returns and raises as `token_mean`.

    Raises:
        ValueError: if length <= 0.
    """
    if not length > 0:
        raise ValueError(f"expected length > 0, got {length}")
    return functools.partial(_over_constant, length)


def _over_constant(
    length: int, response_tokens: ArrayLike, response_trajectory: ArrayLike, num_trajectories: int
) -> jax.Array:
    tokens, lengths, _ = _table(response_tokens, response_trajectory, num_trajectories)
    return _inverse(jnp.broadcast_to(jnp.sum(lengths > 0, dtype=lengths.dtype) * float(length), tokens.shape), tokens)


def _table(
    response_tokens: ArrayLike, response_trajectory: ArrayLike, num_trajectories: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(tokens of each response f32[R], of each trajectory f32[N], trajectory of each response i32[R])."""
    tokens, trajectory = jnp.asarray(response_tokens), jnp.asarray(response_trajectory)
    if tokens.ndim != 1 or tokens.shape != trajectory.shape:
        raise ValueError(f"expected two tables of shape [R], got shapes {tokens.shape} and {trajectory.shape}")
    for name, array in (("response_tokens", tokens), ("response_trajectory", trajectory)):
        if not jnp.issubdtype(array.dtype, jnp.integer):
            raise ValueError(f"expected {name} of an integer dtype, got {array.dtype}")
    tokens = tokens.astype(jnp.float32)
    return tokens, jax.ops.segment_sum(tokens, trajectory, num_trajectories), trajectory


def _inverse(total: jax.Array, tokens: jax.Array) -> jax.Array:
    """1 / total where a response has tokens, else 0."""
    return jnp.where(tokens > 0, 1.0 / jnp.maximum(total, 1.0), 0.0)


def _log_ratio(above: jax.Array, below: jax.Array) -> jax.Array:
    return jnp.clip(above - below, -MAX_LOG_RATIO, MAX_LOG_RATIO)


def _floats(**arrays: ArrayLike) -> list[jax.Array]:
    """The arrays in float32 or wider, all of one shape."""
    checked = {name: jnp.asarray(array) for name, array in arrays.items()}
    for name, array in checked.items():
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"expected {name} of a floating dtype, got {array.dtype}")
    if len({array.shape for array in checked.values()}) > 1:
        shapes = ", ".join(f"{name} {array.shape}" for name, array in checked.items())
        raise ValueError(f"expected equal shapes, got {shapes}; nothing is broadcast here")
    return [x if jnp.finfo(x.dtype).bits >= 32 else x.astype(jnp.float32) for x in checked.values()]
