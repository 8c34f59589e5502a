"""Adaptive Entropy Modulation: the coefficient that scales a response's advantage. arXiv 2605.00425; METHOD §4."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from aem_jax.advantage._checks import (
    float_array,
    id_array,
    mask_array,
    members,
    not_negative,
    one_axis,
    real_array,
    same_shape,
    static_count,
    take,
)
from aem_jax.advantage.surprisal import response_entropy


def aem_coefficients(
    response_entropy: ArrayLike,
    group_ids: ArrayLike,
    num_groups: int,
    *,
    strength: ArrayLike = 1.0,
    min_range: ArrayLike = 0.1,
    valid: ArrayLike | None = None,
) -> jax.Array:
    """AEM coefficient α of each response, over all responses of its rollout group.

        H̃ = (H̄ − min H̄) / (max H̄ − min H̄)
        α = exp(−λ H̃) / mean exp(−λ H̃)
        α = 1 for the whole group when max H̄ − min H̄ < min_range

    min, max and mean run over the group's valid responses. The mean of α over them is 1, and
    e^(−|λ|) <= α <= e^|λ|. Entropies are constants: no gradient flows through α.

    Args:
        response_entropy: float[R], mean token entropy of each response, nats. A value that is not finite counts as
            not valid; `response_entropy` gives NaN for a response without tokens.
        group_ids: int[R], rollout group of each response, in any order; -1 for none.
        num_groups: number of groups, static. Groups may be empty.
        strength: λ, no unit. 0 disables the modulation, < 0 reverses it (the paper's ablation).
        min_range: nats; groups with a smaller range of H̄ keep α = 1.
        valid: bool[R], which responses take part; all by default.

    Returns:
        float32[R] (float64 for float64), > 0; 1 for responses that take no part.

    Raises:
        ValueError: on wrong shapes or dtypes, ids known to lie outside [-1, num_groups), or min_range < 0.
    """
    not_negative("min_range", min_range)
    entropy, group_ids, num_groups, valid = _check_groups(response_entropy, group_ids, num_groups, valid)
    relative, spread = _relative(entropy, group_ids, num_groups, valid)
    weight = jnp.where(valid, jnp.exp(-jnp.asarray(strength, entropy.dtype) * relative), 0.0)
    total = jax.ops.segment_sum(weight, group_ids, num_groups)
    count = jax.ops.segment_sum(valid.astype(entropy.dtype), group_ids, num_groups)
    mean = jnp.where(count > 0, total / jnp.maximum(count, 1.0), 1.0)
    modulated = valid & take(spread >= min_range, group_ids, False)
    return jax.lax.stop_gradient(jnp.where(modulated, weight / take(mean, group_ids, 1.0), 1.0))


def relative_entropy(
    response_entropy: ArrayLike, group_ids: ArrayLike, num_groups: int, *, valid: ArrayLike | None = None
) -> jax.Array:
    """Entropy of each response relative to those of its group: H̃ of `aem_coefficients`.

        H̃ = (H̄ − min H̄) / (max H̄ − min H̄),    0 where max H̄ = min H̄

    Args, and Raises: as `aem_coefficients`.

    Returns:
        float32[R] (float64 for float64), in [0, 1]; 0 for responses that take no part.
    """
    return _relative(*_check_groups(response_entropy, group_ids, num_groups, valid))[0]


def token_advantages(response_advantages: ArrayLike, response_ids: ArrayLike) -> jax.Array:
    """Gives every token the advantage of its response.

        A_t = A_{id_t},   0 where id_t = -1

    Args:
        response_advantages: float[R], no unit.
        response_ids: int[B, T] (any shape), response of each token; -1 for tokens of no response.

    Returns:
        float[B, T], shaped as `response_ids`.

    Raises:
        ValueError: on wrong shapes or dtypes, or ids known to lie outside [-1, R).
    """
    response_advantages = real_array("response_advantages", response_advantages)
    one_axis("response_advantages", response_advantages)
    return take(response_advantages, id_array("response_ids", response_ids, response_advantages.shape[0]), 0.0)


def aem_scale(
    advantages: ArrayLike,
    token_entropy: ArrayLike,
    mask: ArrayLike,
    group_ids: ArrayLike,
    num_groups: int,
    *,
    strength: ArrayLike = 1.0,
    min_range: ArrayLike = 0.1,
) -> jax.Array:
    """Scales advantages by AEM where each row holds one response: the one line to add to another trainer.

        A_AEM = α · A,   α from the mean of `token_entropy` over each row's `mask`

    Gradients flow through `advantages`, never through α. A row without a token keeps its advantage.

    Args:
        advantages: float[B], base advantage of each row's response.
        token_entropy: float[B, T], nats, under the sampling policy; anything (even NaN) outside `mask`.
        mask: bool[B, T], the response's tokens.
        group_ids: int[B], rollout group of each row, in any order; -1 for none.
        num_groups: number of groups, static.
        strength: λ of `aem_coefficients`.
        min_range: nats, as in `aem_coefficients`.

    Returns:
        float[B], the scaled advantages.

    Raises:
        ValueError: as `aem_coefficients`, and on shapes that do not fit together.
    """
    advantages = real_array("advantages", advantages)
    one_axis("advantages", advantages)
    mask = mask_array("mask", mask)
    if mask.ndim != 2 or mask.shape[0] != advantages.shape[0]:
        raise ValueError(f"expected mask of shape [{advantages.shape[0]}, T], got {mask.shape}; one row a response")
    rows = jnp.broadcast_to(jnp.arange(mask.shape[0], dtype=jnp.int32)[:, None], mask.shape)
    entropy = response_entropy(token_entropy, jnp.where(mask, rows, -1), mask.shape[0])
    alpha = aem_coefficients(entropy, group_ids, num_groups, strength=strength, min_range=min_range)
    return alpha.astype(advantages.dtype) * advantages


class CoefficientStatistics(NamedTuple):
    """Statistics of α in one step; scalars, NaN where no response qualifies."""

    mean_positive: jax.Array
    """Mean α of responses with advantage > 0."""
    mean_negative: jax.Array
    """Mean α of responses with advantage < 0."""
    minimum: jax.Array
    """Smallest α."""
    maximum: jax.Array
    """Largest α."""
    unmodulated_groups: jax.Array
    """Share of groups, of those with a valid response, whose entropies span less than `min_range` (α = 1)."""


def coefficient_statistics(
    coefficients: ArrayLike,
    advantages: ArrayLike,
    response_entropy: ArrayLike,
    group_ids: ArrayLike,
    num_groups: int,
    *,
    min_range: ArrayLike = 0.1,
    valid: ArrayLike | None = None,
) -> CoefficientStatistics:
    """Summary of one step's coefficients, for metrics.

    Args:
        coefficients: float[R], α from `aem_coefficients` with the same entropies, groups, min_range and valid.
        advantages: float[R], base advantages (α > 0, so scaled ones serve as well).
        response_entropy: float[R], nats.
        group_ids: int[R].
        num_groups: static.
        min_range: nats.
        valid: bool[R].

    Returns:
        CoefficientStatistics over the responses that take part.

    Raises:
        ValueError: as `aem_coefficients`.
    """
    not_negative("min_range", min_range)
    entropy, group_ids, num_groups, valid = _check_groups(response_entropy, group_ids, num_groups, valid)
    coefficients, advantages = float_array("coefficients", coefficients), real_array("advantages", advantages)
    same_shape(coefficients=coefficients, advantages=advantages, response_entropy=entropy)
    _, spread = _group_range(entropy, group_ids, num_groups, valid)
    present = jax.ops.segment_sum(valid.astype(jnp.int32), group_ids, num_groups) > 0
    return CoefficientStatistics(
        mean_positive=jnp.mean(coefficients, where=valid & (advantages > 0)),
        mean_negative=jnp.mean(coefficients, where=valid & (advantages < 0)),
        minimum=_nan_if(~valid.any(), jnp.min(coefficients, where=valid, initial=jnp.inf)),
        maximum=_nan_if(~valid.any(), jnp.max(coefficients, where=valid, initial=-jnp.inf)),
        unmodulated_groups=jnp.mean((spread < min_range).astype(jnp.float32), where=present),
    )


def _nan_if(condition: jax.Array, value: jax.Array) -> jax.Array:
    return jnp.where(condition, jnp.nan, value)


def _check_groups(
    entropy: ArrayLike, group_ids: ArrayLike, num_groups: int, valid: ArrayLike | None
) -> tuple[jax.Array, jax.Array, int, jax.Array]:
    """(entropy, group_ids, num_groups, valid) as checked arrays; valid excludes responses without group or entropy."""
    num_groups = static_count("num_groups", num_groups)
    entropy = float_array("response_entropy", entropy)
    group_ids = id_array("group_ids", group_ids, num_groups)
    one_axis("response_entropy", entropy)
    same_shape(response_entropy=entropy, group_ids=group_ids)
    return entropy, group_ids, num_groups, members(group_ids, num_groups, valid) & jnp.isfinite(entropy)


def _relative(
    entropy: jax.Array, group_ids: jax.Array, num_groups: int, valid: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(H̃ of each response, 0 where not valid; max − min of each group)."""
    low, spread = _group_range(entropy, group_ids, num_groups, valid)
    # A spread of 0 is modulated only if min_range is 0; every H̃ is then 0, which gives α = 1.
    scale = jnp.where(spread > 0, spread, 1.0)
    return jnp.where(valid, (entropy - take(low, group_ids, 0.0)) / take(scale, group_ids, 1.0), 0.0), spread


def _group_range(
    entropy: jax.Array, group_ids: jax.Array, num_groups: int, valid: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(min, max − min) of each group's valid entropies, [G]; (inf, −inf) for a group without any."""
    low = jax.ops.segment_min(jnp.where(valid, entropy, jnp.inf), group_ids, num_groups)
    high = jax.ops.segment_max(jnp.where(valid, entropy, -jnp.inf), group_ids, num_groups)
    return low, high - low
