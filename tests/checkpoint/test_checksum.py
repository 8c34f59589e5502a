"""Checksums of arrays are equal on every mesh and change with every bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from aem_jax.checkpoint.checksum import checksums, first_difference
from aem_jax.sharding import MeshConfig, make_mesh

DTYPES = ("float32", "bfloat16", "int8", "uint8", "int32", "bool")


def values(dtype: str) -> np.ndarray:
    bits = np.random.default_rng(0).integers(0, 256, 24 * 4, np.uint8)
    return (bits[:24] % 2).astype(bool) if dtype == "bool" else bits[: 24 * jnp.dtype(dtype).itemsize].view(dtype)


def by_hand(words: np.ndarray) -> str:
    """The formula of the module's docstring, one element at a time."""

    def mix(x: int) -> int:
        x = ((x ^ (x >> 16)) * 0x7FEB352D) % 2**32
        x = ((x ^ (x >> 15)) * 0x846CA68B) % 2**32
        return x ^ (x >> 16)

    return f"{sum(mix(int(word) ^ mix(i)) for i, word in enumerate(words)) % 2**32:08x}"


def test_the_checksum_equals_its_formula():
    x = np.random.default_rng(1).normal(size=(3, 5, 2)).astype(np.float32)
    assert checksums({"a": {"b": x}}) == {"['a']['b']": by_hand(x.view(np.uint32).reshape(-1))}
    assert checksums(jnp.float32(2.5)) == {"": by_hand(np.array([2.5], np.float32).view(np.uint32))}


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_checksum_depends_on_every_bit_and_its_position(dtype: str):
    x = values(dtype)
    seen = {checksums(x)[""]}
    if dtype == "bool":
        changed = [np.where(np.arange(24) == i, ~x, x) for i in range(24)]
    else:
        flips = [(i, bit) for i in range(x.nbytes) for bit in (0, 7)]
        changed = [np.frombuffer(_flipped(x, *flip), x.dtype) for flip in flips]
    changed += [np.roll(x, 1), np.zeros_like(x)]
    for array in changed:
        checksum = checksums(array)[""]
        assert checksum not in seen, "two arrays have one checksum"
        seen.add(checksum)


def _flipped(x: np.ndarray, index: int, bit: int) -> bytes:
    data = bytearray(x.tobytes())
    data[index] ^= 1 << bit
    return bytes(data)


def test_the_checksum_is_the_same_on_every_mesh():
    mesh = make_mesh(MeshConfig(2, 2, 2), jax.devices()[:8])
    x = np.random.default_rng(2).normal(size=(8, 4)).astype(np.float32)
    specs = [PartitionSpec("data", "tensor"), PartitionSpec(None, ("fsdp", "tensor")), PartitionSpec()]
    assert {checksums(jax.device_put(x, NamedSharding(mesh, spec)))[""] for spec in specs} == {checksums(x)[""]}


def test_the_first_difference_is_named():
    assert first_difference({"a": "1", "b": "2"}, {"a": "1", "b": "2"}) is None
    assert first_difference({"a": "1", "b": "2"}, {"a": "1", "b": "3"}) == "b: expected the checksum 2, got 3"
    assert first_difference({"a": "1"}, {}) == "a: expected the checksum 1, got None"
