"""AdamW's moments in fewer bytes: bfloat16, or the second one in 8 bits.

    m ← β1 m + (1 − β1) g,  v ← β2 v + (1 − β2) g²,  update = (m / (1 − β1^t)) / (√(v / (1 − β2^t)) + ε)

computed in float32; rounded is only what is kept until the next step. An update depends on v by its ratio alone, so 8
bits hold a logarithm: v ≈ row's maximum · 2^((code − 255) / 8), codes 1 to 255, that is 31.75 octaves below the maximum
of the row (the last dimension), 9 % apart; less than the smallest becomes the smallest, never 0, by which an update
would be divided; code 0 is exactly 0. (Linear codes, as of Dettmers et al. 2022, arXiv:2110.02861, for m, lose what is
small: Li et al. 2023, arXiv:2309.01507.)

v is rounded up or down at random, in proportion, so that it is right in the mean: near β2 = 1 a step changes it by
less than half a code, and rounding to the nearest would leave it where it is for ever. The random bits come from the
number of the step, so a resumed run gets the same.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

Array = jax.Array

_CODES_PER_OCTAVE = 8
_TOP = 255


class Codes(NamedTuple):
    """Second moments in 8 bits.

    Attributes:
        codes: uint8, as the parameters.
        scales: f32, as the parameters but 1 along the last dimension: the maximum of each row.
    """

    codes: Any
    scales: Any


class Kept(NamedTuple):
    """How second moments are kept between steps.

    Attributes:
        init: parameters -> zeros, as kept.
        load: as kept -> f32 tree.
        save: (f32 tree, tree of PRNG keys) -> as kept.
    """

    init: Callable[[Any], Any]
    load: Callable[[Any], Any]
    save: Callable[[Any, Any], Any]


def encode(values: Array, key: Array) -> tuple[Array, Array]:
    """Codes uint8[..., n] and scales f32[..., 1] of f32[..., n] ≥ 0, right in the mean (but for the smallest)."""
    scales = jnp.max(values, axis=-1, keepdims=True)
    octaves = jnp.log2(values / jnp.where(scales > 0, scales, 1.0))  # -inf for 0
    exact = jnp.clip(_TOP + _CODES_PER_OCTAVE * octaves, 1, _TOP)
    low = jnp.minimum(jnp.floor(exact), _TOP - 1)
    # between two codes the value, not its logarithm, is hit in the mean
    ratio = 2.0 ** (1 / _CODES_PER_OCTAVE)
    upward = (ratio ** (exact - low) - 1) / (ratio - 1)
    codes = low + (jax.random.uniform(key, values.shape) < upward)
    return jnp.where(values > 0, codes, 0).astype(jnp.uint8), scales


def decode(codes: Array, scales: Array) -> Array:
    """f32[..., n] of codes and scales."""
    octaves = (codes.astype(jnp.float32) - _TOP) / _CODES_PER_OCTAVE
    return jnp.where(codes > 0, scales * jnp.exp2(octaves), 0.0)


def to_bfloat16(values: Array, key: Array) -> Array:
    """f32 in bfloat16, right in the mean: 16 random bits are added below its last, and then those are cut."""
    bits = jax.lax.bitcast_convert_type(values, jnp.uint32)
    bits = bits + jax.random.bits(key, values.shape, jnp.uint16).astype(jnp.uint32)
    return jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)


def _codes_of_zeros(params: Any) -> Codes:
    return Codes(
        jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.uint8), params),
        jax.tree.map(lambda x: jnp.zeros((*x.shape[:-1], 1), jnp.float32), params),
    )


def _encode_all(values: Any, keys: Any) -> Codes:
    pairs = jax.tree.map(encode, values, keys)
    return Codes(*jax.tree.transpose(jax.tree.structure(values), jax.tree.structure((0, 0)), pairs))


KEPT: Mapping[str, Kept] = {
    "bfloat16": Kept(
        init=lambda params: jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.bfloat16), params),
        load=lambda kept: jax.tree.map(lambda v: v.astype(jnp.float32), kept),
        save=lambda values, keys: jax.tree.map(to_bfloat16, values, keys),
    ),
    "int8": Kept(
        init=_codes_of_zeros,
        load=lambda kept: jax.tree.map(decode, kept.codes, kept.scales),
        save=_encode_all,
    ),
}
"""Name → how second moments are kept; the first ones are bfloat16 with either."""


def scale_by_small_adam(beta1: float, beta2: float, eps: float, kept: Kept) -> optax.GradientTransformation:
    """`optax.scale_by_adam` with moments kept small: m in bfloat16 (to the nearest), v as `kept` says.

    The state is optax's; where v is in 8 bits, `nu` is a `Codes` of two trees, each in the parameters' structure.
    """

    def init(params: Any) -> optax.ScaleByAdamState:
        mu = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.bfloat16), params)
        return optax.ScaleByAdamState(jnp.zeros((), jnp.int32), mu, kept.init(params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, optax.ScaleByAdamState]:
        count = optax.safe_increment(state.count)
        m = jax.tree.map(lambda g, m: beta1 * m.astype(jnp.float32) + (1 - beta1) * g, updates, state.mu)
        v = jax.tree.map(lambda g, v: beta2 * v + (1 - beta2) * jnp.square(g), updates, kept.load(state.nu))
        scaled = jax.tree.map(lambda m, v: (m / (1 - beta1**count)) / (jnp.sqrt(v / (1 - beta2**count)) + eps), m, v)
        structure = jax.tree.structure(v)
        keys = jax.random.split(jax.random.fold_in(jax.random.key(0), count), structure.num_leaves)
        nu = kept.save(v, structure.unflatten(list(keys)))
        return scaled, optax.ScaleByAdamState(count, jax.tree.map(lambda m: m.astype(jnp.bfloat16), m), nu)

    return optax.GradientTransformation(init, update)
