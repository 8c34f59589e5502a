"""Credit assignment: a batch's returns and entropies → an advantage for each token, base estimator times AEM's α."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from aem_jax.advantage import (
    Experience,
    ResponseAdvantages,
    ValueTargets,
    aem_coefficients,
    coefficient_statistics,
    explained_variance,
    response_entropy,
    token_advantages,
)
from aem_jax.batch import Batch, packed_sharding
from aem_jax.sharding import replicated

Array = jax.Array


@dataclass(frozen=True)
class AemConfig:
    """AEM's coefficient: alpha = exp(-strength * H) / its mean over the group, H the entropy normalised to 0..1."""

    strength: float = 1.0
    """Strength of the down-weighting of uncertain responses (the paper's lambda); 0 gives the base algorithm."""
    min_range: float = 0.1
    """Least range of a group's response entropies, nats; below it, alpha is 1."""
    scope: Literal["group", "trajectory", "batch"] = "group"
    """Scope of alpha's normalisation: a rollout group, or (the paper's ablations) a trajectory or the batch."""
    variant: Literal["aem", "reversed", "shuffled", "sign"] = "aem"
    """aem; the paper's ablations reversed (-strength: uncertain responses weigh more) and shuffled (the alphas of a
    scope are permuted); or the control sign (means of alpha over responses with one sign of the advantage)."""

    def __post_init__(self) -> None:
        if self.strength < 0 or self.min_range < 0:
            raise ValueError(f"expected aem.strength and aem.min_range >= 0, got {self.strength} and {self.min_range}")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Credit:
    """Advantages of a batch.

    Attributes:
        tokens: f32[M,b,T], scaled advantage of each sampled token, 0 elsewhere.
        base: f32[R], base advantage of each response.
        coefficients: f32[R], alpha.
        entropies: f32[R], mean token entropy of each response, nats.
        values: targets of the value head, not scaled by alpha; None without one.
    """

    tokens: Array
    base: Array
    coefficients: Array
    entropies: Array
    values: ValueTargets | None = None


def experience(batch: Batch, values: Array | None = None, entropies: Array | None = None) -> Experience:
    """The estimators' view of a batch: its tables, whatever the packing, and responses' values and entropies f32[R]."""
    computed = {"response_values": values, "response_entropies": entropies}
    return Experience(**{name: getattr(batch, name) for name in Experience._fields if name not in computed}, **computed)


def make_credit(
    estimate: ResponseAdvantages,
    aem: AemConfig,
    num_groups: int,
    mesh: Mesh,
    returns: ResponseAdvantages | None = None,
) -> Callable[..., tuple[Credit, dict[str, Any]]]:
    """Builds `credit(batch, key=None, values=None) -> (Credit, statistics)`, jitted.

    The variant "shuffled" needs the PRNG key. `values` f32[R] are needed with a value head, and only then.

    Args:
        estimate: base advantages of responses, e.g. `of_returns(over_trajectories, grpo)`.
        aem: the coefficient's settings.
        num_groups: rollout groups of a step, static.
        mesh: the mesh of the batch.
        returns: the value head's regression targets, e.g. `value_returns`; None without one.
    """
    everywhere = replicated(mesh)
    shardings: Any = Credit(packed_sharding(mesh), *(everywhere,) * 4)  # pyright: ignore[reportArgumentType]

    @partial(jax.jit, out_shardings=(shardings, everywhere))
    def credit(batch: Batch, key: Array | None = None, values: Array | None = None) -> tuple[Credit, dict[str, Any]]:
        ids = jnp.asarray(batch.response_ids)
        flat = ids.reshape(-1, ids.shape[-1])
        num_responses = batch.response_valid.shape[0]
        entropies = response_entropy(jnp.asarray(batch.entropies).reshape(flat.shape), flat, num_responses)
        table = experience(batch, values, entropies)
        base = estimate(table, num_groups)
        scope, count = SCOPES[aem.scope](batch, num_groups)
        # Responses that are not in the loss have no packed tokens, so their entropy is NaN.
        kwargs = {"min_range": aem.min_range, "valid": batch.response_valid & ~jnp.isnan(entropies)}
        strength, control = VARIANTS[aem.variant]
        alpha = aem_coefficients(entropies, scope, count, strength=strength * aem.strength, **kwargs)
        if control is not None:
            alpha = control(alpha, base, jnp.where(kwargs["valid"], scope, count), count + 1, key)
        tokens = token_advantages(alpha * base, flat).reshape(ids.shape)
        alphas = coefficient_statistics(alpha, base, entropies, scope, count, **kwargs)
        statistics = {
            "entropy/response": jnp.mean(entropies, where=kwargs["valid"]),
            "entropy/token": jnp.sum(jnp.asarray(batch.entropies)) / jnp.sum(ids >= 0),  # NaN without tokens
            "aem/alpha_positive": alphas.mean_positive,
            "aem/alpha_negative": alphas.mean_negative,
            "aem/alpha_min": alphas.minimum,
            "aem/alpha_max": alphas.maximum,
            "aem/flat_groups": alphas.unmodulated_groups,
            "advantage/positive_share": jnp.mean((base > 0).astype(jnp.float32), where=kwargs["valid"]),
            "advantage/nonzero_share": jnp.mean((base != 0).astype(jnp.float32), where=kwargs["valid"]),
        }
        if values is None or returns is None:
            return Credit(tokens, base, alpha, entropies), statistics
        targets = ValueTargets(values, returns(table, num_groups))
        packed = ~jnp.isnan(values)
        statistics |= {
            "value/mean": jnp.mean(values, where=packed),
            "value/return": jnp.mean(targets.returns, where=packed),
            "value/explained_variance": explained_variance(*targets, valid=packed),
        }
        return Credit(tokens, base, alpha, entropies, targets), statistics

    return credit


def shuffled(values: Array, ids: Array, key: Array) -> Array:
    """Permutes the values of responses with the same id at random.

    Args:
        values: f32[R].
        ids: i32[R], in any order.
        key: PRNG key.

    Returns:
        f32[R]; each id has the same values as before.
    """
    targets = jnp.argsort(ids, stable=True)
    sources = jnp.lexsort((jax.random.uniform(key, ids.shape), ids))
    return values.at[targets].set(values[sources])


def sign_means(coefficients: Array, advantages: Array, ids: Array, num_ids: int) -> Array:
    """Replaces each coefficient by the mean over the responses with the same id and the same sign of the advantage.

        α'_r = mean of α over the responses of r's scope with sgn A = sgn A_r        α'_r = α_r where A_r = 0

    What is left of the modulation is the weight that it moves between responses with A > 0 and A < 0. Where A has two
    values in a scope, as with two outcomes, the sum of α' A over the responses with one sign is that of α A.

    Args:
        coefficients: f32[R].
        advantages: f32[R].
        ids: i32[R], in [0, num_ids), in any order.
        num_ids: static.

    Returns:
        f32[R].
    """
    sides = 2 * ids + (advantages > 0)
    signed = (advantages != 0).astype(coefficients.dtype)
    total, count = (jax.ops.segment_sum(x, sides, 2 * num_ids) for x in (coefficients * signed, signed))
    return jnp.where(signed > 0, (total / jnp.maximum(count, 1.0))[sides], coefficients)


Control = Callable[[Array, Array, Array, int, Array | None], Array]
"""(coefficients f32[R], base advantages f32[R], scope ids i32[R], number of ids, the step's PRNG key or None) -> other
coefficients f32[R]. Responses that take no part have an id of their own."""


def _shuffle(coefficients: Array, advantages: Array, ids: Array, num_ids: int, key: Array | None) -> Array:
    if key is None:
        raise ValueError("expected a PRNG key for aem.variant shuffled, got none; call credit(batch, key)")
    return shuffled(coefficients, ids, jax.random.fold_in(key, _SHUFFLE))


def _sign(coefficients: Array, advantages: Array, ids: Array, num_ids: int, key: Array | None) -> Array:
    return sign_means(coefficients, advantages, ids, num_ids)


Scope = Callable[[Batch, int], tuple[Array, int]]
"""(batch, num_groups) -> the id of each response's scope, i32[R], and the number of scopes."""


def _group(batch: Batch, num_groups: int) -> tuple[Array, int]:
    return jnp.asarray(batch.group_ids)[batch.response_trajectory], num_groups


def _trajectory(batch: Batch, num_groups: int) -> tuple[Array, int]:
    return jnp.asarray(batch.response_trajectory), batch.valid.shape[0]


def _batch(batch: Batch, num_groups: int) -> tuple[Array, int]:
    return jnp.zeros_like(jnp.asarray(batch.response_trajectory)), 1


SCOPES: Mapping[str, Scope] = {"group": _group, "trajectory": _trajectory, "batch": _batch}
VARIANTS: Mapping[str, tuple[float, Control | None]] = {
    "aem": (1.0, None),
    "reversed": (-1.0, None),
    "shuffled": (1.0, _shuffle),
    "sign": (1.0, _sign),
}
"""Name → (factor of strength, what replaces the coefficients)."""
_SHUFFLE = 0x5AFF1E
"""Folded into the key of a step. No episode has this number, so the shuffle has its own random numbers."""
