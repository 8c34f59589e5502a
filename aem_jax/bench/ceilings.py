"""What this device can do at most, measured where and when the rest is: bytes by a copy, FLOPs by a matrix product.

The best of several runs counts, because a ceiling is what nothing exceeds. The copy is far larger than any cache, so a
program whose data stay in a CPU's cache may read more bytes a second than this "main memory" gives.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from aem_jax.models.config import dtype_name

RUNS = 7


@dataclass(frozen=True)
class Ceilings:
    """Of one device.

    Attributes:
        bandwidth: bytes/s, read and written, by a copy.
        peak: FLOP/s of a matrix product in `dtype`.
        dtype: of the product's factors.
    """

    bandwidth: float
    peak: float
    dtype: str


@dataclass(frozen=True)
class Sizes:
    """What the ceilings are measured on."""

    copied: int
    """Bytes of the array that is copied."""
    side: int
    """Rows and columns of the matrices."""


SIZES = {"cpu": Sizes(2**28, 2048)}
ACCELERATOR = Sizes(2**31, 8192)


@cache
def ceilings(dtype: DTypeLike, sizes: Sizes | None = None) -> Ceilings:
    """Measures the first device, once a process for each dtype.

    Args:
        dtype: of the matrix product, that in which the model computes.
        sizes: by default large enough for the kind of device.
    """
    dtype = dtype_name(dtype, ("bfloat16", "float32", "float16"))
    sizes = sizes or SIZES.get(jax.devices()[0].platform, ACCELERATOR)
    # Onto itself and changed on the way: no memory is asked for, and no compiler can leave it out.
    copied = _fastest(jax.jit(lambda x: x + 1, donate_argnums=0), jnp.zeros(sizes.copied // 4, jnp.float32))
    right = jax.random.normal(jax.random.key(0), (sizes.side, sizes.side)).astype(dtype)
    multiply = jax.jit(jnp.matmul)
    multiplied = _fastest(lambda left: multiply(left, right), right)
    return Ceilings(2 * sizes.copied / copied, 2.0 * sizes.side**3 / multiplied, dtype)


def _fastest(call: Callable[[jax.Array], jax.Array], array: jax.Array) -> float:
    """Seconds of the fastest of some calls, each on what the one before returned."""
    seconds = []
    for _ in range(RUNS + 1):
        start = time.perf_counter()
        array = call(array).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])
