"""A KV cache in 8 bits, if one is asked for: a decode step reads all of it, and it is what bounds the slots.

    x ≈ q · s,  q = round(x / s) in −127 … 127,  s = max |x| over head_dim / 127

There is one scale for each layer, slot, key head and token. So a token is quantised by itself, once, when it is written
behind the cache; and both products read codes, since a scale stands outside of one and goes into the weights of the
other: scores (query · q) s, sums Σ (w s) · q. Codes are whole numbers that bfloat16 holds exactly.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

Array = jax.Array


class QuantizedArray(NamedTuple):
    """Keys or values in 8 bits.

    Attributes:
        codes: int8, as the numbers would lie.
        scales: f32, the same without the dimension of head_dim.
    """

    codes: Array
    scales: Array


KVArray = Array | QuantizedArray
"""Keys or values: in the model's dtype, or in 8 bits."""

LENGTH = (-1, 3)
"""Which dimension of stacked keys [L,S,KV,Dh,T] and of stacked values [L,S,KV,T,Dh] is T; it is their scales', too."""


def first_places(cached: KVArray, count: int, axis: int) -> KVArray:
    """The first `count` places, or all if there are fewer; `axis` of `LENGTH`."""
    return jax.tree.map(lambda x: jax.lax.slice_in_dim(x, 0, min(count, x.shape[axis]), axis=axis), cached)


def encode(x: Array, axis: int) -> QuantizedArray:
    """Codes and scales of x, whose dimension `axis` is head_dim: |x − q s| <= s / 2. Zeros have scale 1."""
    x = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(x), axis=axis)
    # A product: XLA makes one of `largest / 127` in some programs alone, and the last bits of scales would differ.
    scales = jnp.where(largest > 0, largest * (1 / 127), 1.0)
    return QuantizedArray(jnp.round(x / jnp.expand_dims(scales, axis)).astype(jnp.int8), scales)


def factors(cached: KVArray, dtype: DTypeLike) -> tuple[Array, Array | None]:
    """What a product reads, in `dtype`, and the scale [..., 1, T] of each of its T places; None: it needs none."""
    if isinstance(cached, QuantizedArray):
        return cached.codes.astype(dtype), cached.scales[..., None, :]
    return cached, None
