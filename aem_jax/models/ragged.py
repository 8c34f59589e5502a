"""Attention to a KV cache on TPUs: a kernel that reads each slot's cached tokens, and no position after them.

The grid runs over slots and over blocks of positions. A block after a slot's last token has the index of its last
block, which is in fast memory already, so nothing is read for it. The softmax runs over the blocks: with scores
s = q·k/√Dh, a step keeps the largest score m, l = Σ exp(s − m) and Σ exp(s − m) v, and rescales them when m grows.

No run without a TPU needs these experimental modules of jax, so `decode_attention.choose` imports this module, and
before any program is traced: in jax 0.12 their import adds to the context that programs are cached by, and every
program of before would compile again.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from aem_jax.models import kv_cache
from aem_jax.models.attention import join_chunk
from aem_jax.models.kv_cache import KVChunk, LayerCache

Array = jax.Array

BLOCK_BYTES = 2**20
"""Keys and values of a block, at least: below this, the fixed time of a step of the grid exceeds that of its reads."""

_LANES = 128
_LOWEST = -1e30  # finite, so that a slot without cached tokens gives numbers, not NaN


def block_length(length: int, token_bytes: int) -> int:
    """Positions of a block: a multiple of 128 that holds `BLOCK_BYTES`, or all of a slot's positions.

    Args:
        length: T, positions of a slot.
        token_bytes: of the keys and values of one position, all heads.
    """
    blocks = -(-BLOCK_BYTES // (token_bytes * _LANES))
    return min(blocks * _LANES, length)


def attend_ragged(
    q: Array,
    k: Array,
    v: Array,
    cache: LayerCache,
    lengths: Array,
    chunk: KVChunk,
    index: Array,
    *,
    interpret: bool = False,
) -> tuple[Array, KVChunk]:
    """`decode_attention.Attend` by the kernel, joined with the chunk."""
    chunk = kv_cache.write_tokens(chunk, k, v, index)
    arrays: Any = cache
    return join_chunk(q, partial(ragged_attention, *arrays, lengths, interpret=interpret), chunk, index), chunk


def ragged_attention(
    keys: Array, values: Array, lengths: Array, q: Array, *, interpret: bool = False
) -> tuple[Array, Array, Array]:
    """Attention of R queries to the first `lengths[s]` positions of each slot, before normalisation.

        top = max_t s_t,  total = Σ_t exp(s_t − top),  out = Σ_t exp(s_t − top) v_t,  s_t = q · k_t / √Dh

    Args:
        keys: [S,KV,Dh,T].
        values: [S,KV,T,Dh]; T lies innermost in memory, as in the keys, so that heads of 64 fill the lanes.
        lengths: i32[S].
        q: [S,KV,R,Dh].
        interpret: emulates the kernel without a TPU, slowly.

    Returns:
        out f32[S,KV,R,Dh], top f32[S,KV,R,1] and total f32[S,KV,R,1]; of a slot without tokens 0, -1e30 and 0.
    """
    slots, kv_heads, rows, head_dim = q.shape
    values = jnp.swapaxes(values, 2, 3)
    length = values.shape[3]
    block = block_length(length, 2 * kv_heads * head_dim * values.dtype.itemsize)
    blocks = -(-length // block)

    def visited(s: Array, i: Array, lengths: Any) -> Array:
        return jnp.minimum(i, jnp.maximum((lengths[s] + block - 1) // block - 1, 0))

    cached = pl.BlockSpec((1, kv_heads, head_dim, block), lambda s, i, lengths: (s, 0, 0, visited(s, i, lengths)))
    of_slot = lambda *shape: pl.BlockSpec((1, kv_heads, *shape), lambda s, i, lengths: (s, 0, 0, 0))
    out, stats = pl.pallas_call(
        partial(_kernel, block=block),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(slots, blocks),
            in_specs=[of_slot(rows, head_dim), cached, cached],
            out_specs=[of_slot(rows, head_dim), of_slot(rows, _LANES)],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((slots, kv_heads, rows, head_dim), jnp.float32),
            jax.ShapeDtypeStruct((slots, kv_heads, rows, _LANES), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
        name="ragged_attention",
    )(lengths, q, keys, values)
    return out, stats[..., :1], stats[..., 1:2]


def _kernel(lengths: Any, q: Any, keys: Any, values: Any, out: Any, stats: Any, *, block: int) -> None:
    """One block of one slot. Lanes 0 and 1 of `stats` are m and l. Both outputs stay in fast memory between blocks."""
    index = pl.program_id(1)
    length = lengths[pl.program_id(0)]
    lane = jax.lax.broadcasted_iota(jnp.int32, stats.shape[2:], 1)

    @pl.when(index == 0)
    def _() -> None:
        out[...] = jnp.zeros_like(out)
        for head in range(q.shape[1]):
            stats[0, head] = jnp.where(lane == 0, _LOWEST, 0.0)

    @pl.when(index * block < length)
    def _() -> None:
        first = index * block
        seen = first + jax.lax.broadcasted_iota(jnp.int32, (1, block), 1) < length
        for head in range(q.shape[1]):
            queries, k = q[0, head], keys[0, head]
            # Positions past the end of the arrays hold anything, and 0 times infinity would be NaN.
            v = jnp.where(seen, values[0, head], jnp.zeros((), values.dtype))
            scores = jnp.dot(queries, k, preferred_element_type=jnp.float32) * queries.shape[-1] ** -0.5
            scores = jnp.where(seen, scores, _LOWEST)
            old = stats[0, head]
            old_top, old_total = old[:, :1], old[:, 1:2]
            top = jnp.maximum(old_top, jnp.max(scores, axis=-1, keepdims=True))
            weights, rescale = jnp.exp(scores - top), jnp.exp(old_top - top)
            total = old_total * rescale + jnp.sum(weights, axis=-1, keepdims=True)
            added = jax.lax.dot_general(
                weights.astype(v.dtype), v, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
            )
            out[0, head] = out[0, head] * rescale + added
            stats[0, head] = jnp.where(lane == 0, top, total)
