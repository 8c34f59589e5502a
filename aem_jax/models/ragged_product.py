"""Products of rows with the matrix of their group: `jax.lax.ragged_dot` on TPUs, a loop over blocks elsewhere."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array

MAX_BLOCK = 512
"""Most rows of a block of `blocked_product`."""

WEIGHT_GRADIENT_HAS_KERNEL = jax.__version_info__ >= (0, 12)
"""Whether TPUs have a kernel for the weights' gradient of `jax.lax.ragged_dot`: libtpu has one since 0.0.46."""


@jax.custom_vjp
def ragged_product(x: Array, weights: Array, sizes: Array) -> Array:
    """Rows of x times the matrix of their group, in the dtype of x; 0 for rows of no group.

    TPUs have a kernel for `jax.lax.ragged_dot`. Elsewhere XLA computes it as the product of all rows with the matrices
    of all groups, so there `blocked_product` runs. So it is with the gradients, but for that of the weights on TPUs
    before jax 0.12: libtpu had no kernel for it and multiplied all rows for each group, so there a loop runs, too.

    Args:
        x: [M,K], rows of a group next to each other, groups in order.
        weights: [G,K,N], in the dtype of x; or int8, without a gradient.
        sizes: i32[G], rows of each group; rows beyond their sum belong to none.
    """
    return jax.lax.platform_dependent(x, weights, sizes, tpu=_ragged, default=blocked_product)


def _ragged(x: Array, weights: Array, sizes: Array) -> Array:
    return jax.lax.ragged_dot(x, weights.astype(x.dtype), sizes)


def kernel_gradients(x: Array, weights: Array, sizes: Array, cotangent: Array) -> tuple[Array, Array]:
    """The gradients of x and weights by the kernels that TPUs have."""
    d_x, d_weights = jax.vjp(partial(_ragged, sizes=sizes), x, weights)[1](cotangent)
    return d_x, d_weights if WEIGHT_GRADIENT_HAS_KERNEL else _weight_gradient(x, weights, sizes, cotangent)


def blocked_gradients(x: Array, weights: Array, sizes: Array, cotangent: Array) -> tuple[Array, Array]:
    """The gradients of x and weights as loops over blocks."""
    return _blocked(cotangent, weights, sizes, "bn,kn->bk"), _weight_gradient(x, weights, sizes, cotangent)


def _backward(residuals: tuple[Array, Array, Array], cotangent: Array) -> tuple[Array, Array, None]:
    d_x, d_weights = jax.lax.platform_dependent(*residuals, cotangent, tpu=kernel_gradients, default=blocked_gradients)
    return d_x, d_weights, None


ragged_product.defvjp(lambda *inputs: (ragged_product(*inputs), inputs), _backward)


def blocked_product(x: Array, weights: Array, sizes: Array) -> Array:
    """`ragged_product` as a loop over blocks of rows of the same group.

    The number of steps is that of the worst case, rows / block + groups, so that a GPU need not ask how many remain.
    The last block of a group reaches into the rows of the next, which overwrites them.
    """
    return _blocked(x, weights, sizes, "bk,kn->bn")


def _blocked(x: Array, weights: Array, sizes: Array, equation: str) -> Array:
    blocks, width = _Blocks(x.shape[0], sizes), weights.shape[2 if equation == "bk,kn->bn" else 1]
    padded = jnp.pad(x, ((0, blocks.size), (0, 0)))

    def step(index: Array, out: Array) -> Array:
        group, start, _ = blocks.block(index)
        rows = jax.lax.dynamic_slice_in_dim(padded, start, blocks.size)
        matrix = jax.lax.dynamic_index_in_dim(weights, group, keepdims=False).astype(x.dtype)
        product = jnp.einsum(equation, rows, matrix, preferred_element_type=jnp.float32)
        return jax.lax.dynamic_update_slice_in_dim(out, product.astype(x.dtype), start, 0)

    out = jax.lax.fori_loop(0, blocks.count, step, zeros_like_varying((len(padded), width), x.dtype, x))
    return jnp.where(jnp.arange(x.shape[0])[:, None] < jnp.sum(sizes), out[: x.shape[0]], 0)


def _weight_gradient(x: Array, weights: Array, sizes: Array, cotangent: Array) -> Array:
    """[G,K,N], the gradient of the weights: xᵀ·cotangent of each group's rows, by blocks, summed in float32."""
    blocks = _Blocks(x.shape[0], sizes)
    x_rows, d_rows = (jnp.pad(rows, ((0, blocks.size), (0, 0))) for rows in (x, cotangent))

    def step(index: Array, total: Array) -> Array:
        group, start, count = blocks.block(index)
        rows, d_out = (jax.lax.dynamic_slice_in_dim(rows, start, blocks.size) for rows in (x_rows, d_rows))
        d_out = jnp.where(jnp.arange(blocks.size)[:, None] < count, d_out, 0)
        product = jnp.einsum("bk,bn->kn", rows, d_out, preferred_element_type=jnp.float32)
        old = jax.lax.dynamic_index_in_dim(total, group)
        return jax.lax.dynamic_update_slice_in_dim(total, old + product[None], group, 0)

    total = jax.lax.fori_loop(0, blocks.count, step, zeros_like_varying(weights.shape, jnp.float32, x))
    return total.astype(weights.dtype)


class _Blocks:
    """Blocks of rows of the same group. Those that no group needs are empty and begin behind all rows.

    Attributes:
        size: rows of a block; the last of a group may have fewer.
        count: number of blocks that suffices for any sizes.
    """

    def __init__(self, num_rows: int, sizes: Array) -> None:
        half = max(num_rows // (2 * len(sizes)), 1)  # so that about a fifth of the blocks are empty
        self.size: int = int(np.clip(2 ** int(np.log2(half)), 8, MAX_BLOCK))
        self.count: int = num_rows // self.size + len(sizes)
        blocks = -(-sizes // self.size)
        self._ends, self._starts, self._sizes = jnp.cumsum(blocks), jnp.cumsum(sizes) - sizes, sizes
        self._first, self._num_rows = self._ends - blocks, num_rows

    def block(self, index: Array) -> tuple[Array, Array, Array]:
        """(group, first row, number of rows) of a block."""
        is_empty = index >= self._ends[-1]
        group = jnp.minimum(jnp.searchsorted(self._ends, index, side="right"), len(self._sizes) - 1)
        done = (index - self._first[group]) * self.size
        start, count = self._starts[group] + done, jnp.minimum(self.size, self._sizes[group] - done)
        return group, jnp.where(is_empty, self._num_rows, start), jnp.where(is_empty, 0, count)


def zeros_like_varying(shape: tuple[int, ...], dtype: Any, like: Array) -> Array:
    """Zeros that vary over the same mesh axes as `like` inside shard_map."""
    zeros = jnp.zeros(shape, dtype)
    return jnp.where(like.reshape(-1)[0] == 0, zeros, zeros)
