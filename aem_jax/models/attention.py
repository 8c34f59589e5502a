"""The two attentions of a decoder: over packed rows, and of a chunk of new tokens with a KV cache. Softmax in float32.

Row attention has its own backward pass. It recomputes the weights from the scores and from log Σ exp, one number per
query. Its products are in the dtype of queries and keys; autodiff would compute them in float32.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from aem_jax.models.int8 import QuantizedArray
from aem_jax.models.kv_cache import KVChunk, LayerCache, factors

Array = jax.Array

RowAttention = Callable[..., Array]
"""(q [B,T,H,Dh], k [B,T,KV,Dh], v [B,T,KV,Dh], segment_ids i32[B,T]) -> [B,T,H,Dh]. Layers with a sliding window pass
it as `sliding_window`, a static number of tokens."""

_MASKED = -1e30  # finite, so that a row without keys to attend to (padding) gives numbers, not NaN
CPU_BLOCK, BLOCK = 64, 512
"""Queries per block. On two x86 cores 64 and 128 are equally fast and 256 is slower. Accelerators need large products,
and the scores of a block must fit into memory."""
PARTS = (3, 1)
"""Queries look back over a third of a row or all of it, the smaller that holds the longest segment. Both are
compiled."""


def row_attention(q: Array, k: Array, v: Array, segment_ids: Array, sliding_window: int = 0) -> Array:
    """Causal attention inside segments.

    Its cost depends on the segments, not on the row: if all segments are short, queries look back over a part of the
    row (`PARTS`). `collate` packs the longest segments first, so only the first microbatches look further.

    Args:
        q: [B,T,H,Dh].
        k: [B,T,KV,Dh].
        v: [B,T,KV,Dh].
        segment_ids: i32[B,T]; the tokens of a segment are contiguous.
        sliding_window: tokens that a query attends to, its own included; 0 for all.

    Returns:
        [B,T,H,Dh]; any finite numbers in padding (id 0).
    """
    cpu, other = (partial(blocked_attention, sliding_window=sliding_window, block=size) for size in (CPU_BLOCK, BLOCK))
    return jax.lax.platform_dependent(q, k, v, segment_ids, cpu=cpu, default=other)


def blocked_attention(
    q: Array, k: Array, v: Array, segment_ids: Array, sliding_window: int = 0, *, block: int
) -> Array:
    """Row attention in blocks of queries, each over the keys up to its end; the backward pass recomputes the weights.

    The [T,T] weights never exist at once, and blocks halve their number. Query heads that share a key head are folded
    into its rows, so that each block is one matrix product.
    """
    batch, length, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    q = q.reshape(batch, length, kv_heads, heads // kv_heads, head_dim)
    q, k, v = jnp.moveaxis(q, 1, 2), jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
    out: Any = _attend((block, sliding_window), q, k, v, segment_ids, longest_segment(segment_ids))
    return jnp.moveaxis(out, 2, 1).reshape(batch, length, heads, head_dim)


def longest_segment(segment_ids: Array) -> Array:
    """i32[]: tokens of the longest segment of i32[B,T], without padding (id 0)."""
    positions = jnp.broadcast_to(jnp.arange(segment_ids.shape[1]), segment_ids.shape)
    begins = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    starts = jax.lax.cummax(jnp.where(begins, positions, 0), axis=1)
    return jnp.max(jnp.where(segment_ids > 0, positions - starts + 1, 1))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(sizes: tuple[int, int], q: Array, k: Array, v: Array, segment_ids: Array, longest: Array) -> Array:
    """[B,KV,T,H/KV,Dh] of q [B,KV,T,H/KV,Dh], k and v [B,KV,T,Dh]; no query attends further back than `longest`.

    `sizes` are those of a block and of the sliding window.
    """
    return _attend_forward(sizes, q, k, v, segment_ids, longest)[0]


def _attend_forward(
    sizes: tuple[int, int], q: Array, k: Array, v: Array, segment_ids: Array, longest: Array
) -> tuple[Array, Any]:
    block, sliding_window = sizes

    def looking_back(reach: int, q, k, v, segment_ids) -> tuple[Array, Array]:
        outs, sums = [], []
        for first, start, end in _spans(q.shape[2], block, reach):
            scores = _scores(q, k, segment_ids, sliding_window, first, start, end)
            top = jnp.max(scores, axis=-1, keepdims=True)
            weights = jnp.exp(scores - top)
            total = jnp.sum(weights, axis=-1, keepdims=True)
            out = _product("bkqs,bksd->bkqd", weights.astype(v.dtype), v[:, :, first:end])
            outs.append(_unfold((out / total).astype(q.dtype), q))
            sums.append(_unfold(top + jnp.log(total), q))
        return jnp.concatenate(outs, axis=2), jnp.concatenate(sums, axis=2)

    out, log_sum = _switch(looking_back, sizes, longest, q, k, v, segment_ids)
    return out, (q, k, v, segment_ids, longest, out, log_sum)


def _attend_backward(sizes: tuple[int, int], residuals: Any, d_out: Array) -> tuple[Array, Array, Array, None, None]:
    block, sliding_window = sizes
    q, k, v, segment_ids, longest, out, log_sum = residuals
    inner = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1, keepdims=True)

    def looking_back(reach: int, q, k, v, segment_ids, d_out, log_sum, inner) -> tuple[Array, Array, Array]:
        d_queries = []
        d_k, d_v = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
        for first, start, end in _spans(q.shape[2], block, reach):
            keys, values = k[:, :, first:end], v[:, :, first:end]
            queries, d_block, sums, inners = (_fold(x[:, :, start:end]) for x in (q, d_out, log_sum, inner))
            weights = jnp.exp(_scores(q, k, segment_ids, sliding_window, first, start, end) - sums)
            d_weights = _product("bkqd,bksd->bkqs", d_block, values)
            d_scores = (weights * (d_weights - inners) * q.shape[-1] ** -0.5).astype(q.dtype)
            d_queries.append(_unfold(_product("bkqs,bksd->bkqd", d_scores, keys).astype(q.dtype), q))
            d_k = d_k.at[:, :, first:end].add(_product("bkqs,bkqd->bksd", d_scores, queries))
            d_v = d_v.at[:, :, first:end].add(_product("bkqs,bkqd->bksd", weights.astype(q.dtype), d_block))
        return jnp.concatenate(d_queries, axis=2), d_k.astype(k.dtype), d_v.astype(v.dtype)

    d_q, d_k, d_v = _switch(looking_back, sizes, longest, q, k, v, segment_ids, d_out, log_sum, inner)
    return d_q, d_k, d_v, None, None


_attend.defvjp(_attend_forward, _attend_backward)


def _switch(looking_back: Any, sizes: tuple[int, int], longest: Array, q: Array, *arrays: Array) -> Any:
    """`looking_back(reach, q, *arrays)` with the smallest reach of at least `longest`, or of the sliding window."""
    length, (block, sliding_window) = q.shape[2], sizes
    most = min(sliding_window or length, length)
    reaches = sorted({min(-(-length // (part * block)) * block, most) for part in PARTS})
    which = sum(jnp.asarray(longest > reach, jnp.int32) for reach in reaches[:-1])
    return jax.lax.switch(which, [partial(looking_back, reach) for reach in reaches], q, *arrays)


def _spans(length: int, block: int, reach: int) -> list[tuple[int, int, int]]:
    """(first key, first query, end of both) for each block."""
    return [(max(0, start - reach), start, min(start + block, length)) for start in range(0, length, block)]


def _scores(q: Array, k: Array, segment_ids: Array, sliding_window: int, first: int, start: int, end: int) -> Array:
    """f32[B,KV,Q·H/KV,S]: scores of a block's queries with the keys that it attends to."""
    queries, keys = jnp.arange(start, end)[:, None], jnp.arange(first, end)[None, :]
    visible = queries >= keys
    if sliding_window:
        visible &= queries - keys < sliding_window
    mask = visible[None] & (segment_ids[:, start:end, None] == segment_ids[:, None, first:end])
    scores = _product("bkqd,bksd->bkqs", _fold(q[:, :, start:end]), k[:, :, first:end]) * q.shape[-1] ** -0.5
    return jnp.where(jnp.repeat(mask, q.shape[3], axis=1)[:, None], scores, _MASKED)


def _fold(x: Array) -> Array:
    """[B,KV,Q,H/KV,…] to [B,KV,Q·H/KV,…]."""
    return x.reshape(*x.shape[:2], x.shape[2] * x.shape[3], *x.shape[4:])


def _unfold(x: Array, q: Array) -> Array:
    """The inverse of `_fold`, for the heads of q."""
    return x.reshape(*x.shape[:2], -1, q.shape[3], *x.shape[3:])


_product = partial(jnp.einsum, preferred_element_type=jnp.float32)


def chunk_attention(
    q: Array, cache: LayerCache, lengths: Array, chunk: KVChunk, index: Array, sliding_window: int = 0
) -> Array:
    """Attention of C new tokens to cached ones and to their chunk, one softmax over both.

    Args:
        q: [S,C,H,Dh]; token c is at position `index + c` of the chunk.
        cache: of one layer, [S,KV,Dh,W] and [S,KV,W,Dh], or in int8.
        lengths: i32[S], cached tokens of each slot.
        chunk: of one layer, [S,KV,Dh,G] and [S,KV,G,Dh]; filled up to `index + C`.
        index: i32 scalar.
        sliding_window: as in `row_attention`.

    Returns:
        [S,C,H,Dh].
    """
    if isinstance(cache.keys, QuantizedArray):
        # Else the codes of all layers, which no step changes, would be widened before the loop over tokens.
        cache, index = jax.lax.optimization_barrier((cache, index))
    (old_k, scale_k), (old_v, scale_v) = factors(cache.keys, q.dtype), factors(cache.values, q.dtype)
    count, window = q.shape[1], old_v.shape[2]
    queries, position, is_earlier = _chunk_queries(q, chunk, index)
    is_cached = (jnp.arange(window)[None] < lengths[:, None])[:, None, None]
    if sliding_window:
        # Distance of a query to the keys: [S,C·H/KV,W] to cached ones, [C·H/KV,G] to those of its chunk. A position of
        # the cache holds the last token whose index is congruent to it: layers with a window may have a ring of them.
        last = lengths[:, None] - 1
        held = last - (last - jnp.arange(window)[None]) % window
        to_cached = lengths[:, None, None] + position[None, :, None] - held[:, None]
        to_chunk = position[:, None] - jnp.arange(chunk.length)[None]
        is_cached = ((held >= 0)[:, None] & (to_cached < sliding_window))[:, None]
        is_earlier &= (to_chunk < sliding_window)[None, None]
    old = _matmul(queries, old_k) if scale_k is None else _matmul(queries, old_k) * scale_k
    old = jnp.where(is_cached, old, _MASKED)
    new = jnp.where(is_earlier, _matmul(queries, chunk.keys), _MASKED)
    top = jnp.maximum(jnp.max(old, -1, keepdims=True), jnp.max(new, -1, keepdims=True))
    scale = q.shape[-1] ** -0.5
    old, new = jnp.exp((old - top) * scale), jnp.exp((new - top) * scale)
    total = jnp.sum(old, -1, keepdims=True) + jnp.sum(new, -1, keepdims=True)
    old = old if scale_v is None else old * scale_v
    out = _matmul(old.astype(q.dtype), old_v) + _matmul(new.astype(q.dtype), chunk.values)
    return _from_queries((out / total).astype(q.dtype), count)


def join_chunk(
    q: Array, attend_cached: Callable[[Array], tuple[Array, Array, Array]], chunk: KVChunk, index: Array
) -> Array:
    """`chunk_attention` with another function for the cached tokens: two softmaxes, joined.

    Args:
        q: [S,C,H,Dh].
        attend_cached: queries [S,KV,C·H/KV,Dh] -> the sums of `ragged_attention`.
        chunk: as in `chunk_attention`.
        index: as in `chunk_attention`.
    """
    queries, _, is_earlier = _chunk_queries(q, chunk, index)
    old, old_top, old_total = attend_cached(queries)
    scores = jnp.where(is_earlier, _matmul(queries, chunk.keys) * q.shape[-1] ** -0.5, _MASKED)
    top = jnp.maximum(old_top, jnp.max(scores, -1, keepdims=True))
    weights, rescale = jnp.exp(scores - top), jnp.exp(old_top - top)
    total = old_total * rescale + jnp.sum(weights, -1, keepdims=True)
    out = old * rescale + _matmul(weights.astype(q.dtype), chunk.values)
    return _from_queries((out / total).astype(q.dtype), q.shape[1])


_matmul = partial(jnp.matmul, preferred_element_type=jnp.float32)


def _chunk_queries(q: Array, chunk: KVChunk, index: Array) -> tuple[Array, Array, Array]:
    """Queries of [S,C,H,Dh] by key head, [S,KV,C·H/KV,Dh]: one product per key head. With their positions in the chunk,
    i32[C·H/KV], and the mask of the chunk's earlier tokens, bool[1,1,C·H/KV,G]."""
    slots, count, heads, head_dim = q.shape
    kv_heads = chunk.keys.shape[1]
    shared = heads // kv_heads
    queries = jnp.swapaxes(q.reshape(slots, count, kv_heads, shared, head_dim), 1, 2)
    position = index + jnp.repeat(jnp.arange(count), shared)
    is_earlier = (jnp.arange(chunk.length)[None] <= position[:, None])[None, None]
    return queries.reshape(slots, kv_heads, count * shared, head_dim), position, is_earlier


def _from_queries(out: Array, count: int) -> Array:
    """The inverse for outputs: [S,KV,C·H/KV,Dh] to [S,C,H,Dh]."""
    slots, kv_heads, rows, head_dim = out.shape
    out = jnp.swapaxes(out.reshape(slots, kv_heads, count, rows // count, head_dim), 1, 2)
    return out.reshape(slots, count, kv_heads * rows // count, head_dim)
