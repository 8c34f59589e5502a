"""Means, deviations and ranges of segments, exact where all values are equal: 1 / (σ + eps) would amplify a rounding
error in x − μ to an advantage."""

import jax
import jax.numpy as jnp

from aem_jax.advantage._checks import take


def centred(values: jax.Array, weights: jax.Array, ids: jax.Array, num_segments: int) -> jax.Array:
    """x − Σ w x / Σ w over its segment, [N]; 0 where the weight is 0 or the id is out of range."""
    inside = (ids >= 0) & (ids < num_segments) & (weights > 0)
    # Relative to the segment's lowest value, equal values are exact zeros.
    low = jax.ops.segment_min(jnp.where(inside, values, jnp.inf), ids, num_segments)
    above = jnp.where(inside, values - take(low, ids, 0.0), 0.0)
    total = jax.ops.segment_sum(weights * above, ids, num_segments)
    weight = jax.ops.segment_sum(jnp.where(inside, weights, 0.0), ids, num_segments)
    mean = total / jnp.where(weight > 0, weight, 1.0)
    return jnp.where(inside, above - take(mean, ids, 0.0), 0.0)


def value_range(values: jax.Array, ids: jax.Array, num_segments: int) -> jax.Array:
    """Largest minus smallest value of a row's segment, [N]; 0 where the id is out of range."""
    low, high = (of(values, ids, num_segments) for of in (jax.ops.segment_min, jax.ops.segment_max))
    return take(high - low, ids, 0.0)


def over_deviation(deviations: jax.Array, variance: jax.Array, eps: float) -> jax.Array:
    """(x − μ) / (σ + eps), `variance` being σ² of each row or of all."""
    # The root of a variance of 0 has an infinite slope; the inner 1 keeps it out of gradients.
    sigma = jnp.where(variance > 0, jnp.sqrt(jnp.where(variance > 0, variance, 1.0)), 0.0)
    # With eps = 0 equal values would be 0/0; their advantage is 0 for any denominator.
    return deviations / jnp.where(sigma + eps > 0, sigma + eps, 1.0)
