"""Row attention on TPUs: the splash kernel that ships with jax, forward and backward.

Scores stay in the chip's fast memory, block by block. Blocks of keys after the queries are not visited, and segments
are masked inside a block. The backward pass has two kernels, one for the gradient of queries and one for those of keys
and values; each recomputes the scores. The fused kernel would save a fifth of the products, but keeps a copy of the
queries' gradient for every block of keys, rounded to the inputs' dtype.
"""

from contextlib import nullcontext
from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array

BLOCKS = (512, 256, 128)
"""Queries and keys per block: the largest of these that divides the row."""

SPLASH_MODULE = "jax.experimental.pallas.ops.tpu.splash_attention"

WINDOW = "sliding_window_"
"""In a compiled program, the name of a kernel with a sliding window contains this and its size."""

PASSES = {"fwd": 2, "dq": 3, "dkv": 4}
"""Kernel -> its matrix products of the size of the scores."""


def block_size(length: int) -> int:
    """Tokens of a block in rows of `length`; 0 if none divides it."""
    return next((size for size in BLOCKS if length % size == 0), 0)


def splash_attention(
    q: Array, k: Array, v: Array, segment_ids: Array, sliding_window: int = 0, *, interpret: bool = False
) -> Array:
    """Causal attention inside segments, on one device; see `row_attention` for shapes.

    Args:
        q: [B,T,H,Dh]; T is a multiple of 128.
        k: [B,T,KV,Dh].
        v: [B,T,KV,Dh].
        segment_ids: i32[B,T].
        sliding_window: as in `row_attention`; blocks of keys before the window are not visited.
        interpret: emulates the kernel without a TPU, slowly.
    """
    # Imported here: no run without a TPU needs this experimental module.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    length, heads, head_dim = q.shape[1:]
    size = block_size(length)
    sizes = kernel.BlockSizes(
        block_q=size,
        block_kv=size,
        block_q_dkv=size,
        block_kv_dkv=size,
        block_q_dq=size,
        block_kv_dq=size,
    )
    causal = masks.CausalMask((length, length))
    local = masks.LocalMask((length, length), (sliding_window - 1, 0), 0) if sliding_window else causal
    mask = masks.MultiHeadMask([local] * heads)
    attend = kernel.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret)
    q = (q.astype(jnp.float32) * head_dim**-0.5).astype(q.dtype)
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))

    def one_row(q: Array, k: Array, v: Array, ids: Array) -> Any:
        return attend(q, k, v, kernel.SegmentIds(ids, ids))

    with jax.named_scope(f"{WINDOW}{sliding_window}") if sliding_window else nullcontext():
        return jnp.swapaxes(jax.vmap(one_row)(q, k, v, segment_ids), 1, 2)


def splash_flops(phase: str, length: int, heads: float, head_dim: int, sliding_window: int = 0) -> float:
    """FLOPs of one of its kernels for one row: 2·H·Dh for each pair of a query and a key in the visited blocks.

    Args:
        phase: of `PASSES`.
        length: T.
        heads: query heads.
        head_dim: Dh.
        sliding_window: as in `splash_attention`.
    """
    size, reach = block_size(length), sliding_window or length
    firsts = (max(0, (start - reach + 1) // size) for start in range(0, length, size))
    visited = sum(block - first + 1 for block, first in enumerate(firsts))
    return 2.0 * PASSES[phase] * heads * head_dim * size * size * visited
