"""Checksums of arrays, which compare what was read with what was written, to the last bit.

    checksum(x) = Σ_i mix(word_i ⊕ mix(i)) mod 2³²

word_i is the bits of element i (elements of 8 bytes are two words), and mix a bijection of 32 bits. One changed word
always changes the sum; several changed words leave it equal with probability 2⁻³². Integer addition is exact in any
order, so the sum is the same on every mesh, and no array is gathered. It does not protect against forgery.
"""

import json
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array

SEAL = "seal"
"""Key of a JSON record's checksum in the record."""


def checksums(tree: Any) -> dict[str, str]:
    """The checksum of every leaf, by its path in the tree, as 8 hexadecimal digits.

    Args:
        tree: pytree of arrays, on any mesh. Collective.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    sums = jax.device_get(_sums([leaf for _, leaf in leaves]))
    return {jax.tree_util.keystr(path): f"{int(value):08x}" for (path, _), value in zip(leaves, sums, strict=True)}


def first_difference(expected: Mapping[str, str], actual: Mapping[str, str]) -> str | None:
    """A description of the first leaf that differs; None if all are equal."""
    for name in {**expected, **actual}:
        if expected.get(name) != actual.get(name):
            return f"{name}: expected the checksum {expected.get(name)}, got {actual.get(name)}"
    return None


def sealed(record: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON record with a checksum of itself."""
    return {**record, SEAL: _seal(record)}


def unsealed(content: Mapping[str, Any]) -> dict[str, Any] | None:
    """The record that `sealed` returned, without its checksum; None if the content has changed since."""
    record = {name: value for name, value in content.items() if name != SEAL}
    return record if content.get(SEAL) == _seal(record) else None


def _seal(record: Mapping[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(record, sort_keys=True).encode()):08x}"


@jax.jit
def _sums(leaves: list[Array]) -> list[Array]:
    return [_sum(leaf) for leaf in leaves]


def _sum(x: Array) -> Array:
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    words = _words(x)
    # The index by dimension, not of a flattened array: flattening would gather what lies on several devices.
    index = jnp.zeros(words.shape, jnp.uint32)
    stride = 1
    for axis in reversed(range(words.ndim)):
        index += jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) * np.uint32(stride % 2**32)
        stride *= words.shape[axis]
    return jnp.sum(_mix(words ^ _mix(index)), dtype=jnp.uint32)


def _words(x: Array) -> Array:
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        return jnp.stack([_words(x.real), _words(x.imag)])
    width = {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32)
    return jax.lax.bitcast_convert_type(x, width).astype(jnp.uint32)


def _mix(x: Array) -> Array:
    """A bijection of 32 bits (https://nullprogram.com/blog/2018/07/31/)."""
    x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
    return x ^ (x >> 16)
