"""The two attentions of a decoder: over packed rows, and of a chunk beside a cache. Softmax in float32."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

Array = jax.Array

RowAttention = Callable[[Array, Array, Array, Array], Array]
"""(q [B,T,H,Dh], k [B,T,KV,Dh], v [B,T,KV,Dh], segment_ids i32[B,T]) -> [B,T,H,Dh]."""

_MASKED = -1e30  # finite, so that a row with nothing to attend to (padding) gives numbers, not NaN
CPU_BLOCK, BLOCK = 64, 512
"""Queries that look at their keys together. On two x86 cores 64 and 128 are alike and 256 slower; accelerators want
large products, and a block's scores have to fit beside everything else."""


def row_attention(q: Array, k: Array, v: Array, segment_ids: Array) -> Array:
    """Causal attention inside segments.

    Args:
        q: [B,T,H,Dh].
        k: [B,T,KV,Dh].
        v: [B,T,KV,Dh].
        segment_ids: i32[B,T].

    Returns:
        [B,T,H,Dh].
    """
    cpu, other = (partial(blocked_attention, block=size) for size in (CPU_BLOCK, BLOCK))
    return jax.lax.platform_dependent(q, k, v, segment_ids, cpu=cpu, default=other)


def blocked_attention(q: Array, k: Array, v: Array, segment_ids: Array, *, block: int) -> Array:
    """The same in blocks of queries, none of which looks at keys behind it; going backward, weights are computed anew.

    The [T,T] weights never exist together, which is what a long row costs; blocks halve their number, too. Query heads
    that share a key head are folded into its rows, so that each block is one matrix product.
    """
    batch, length, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    shared = heads // kv_heads
    q = (q * jnp.asarray(head_dim**-0.5, q.dtype)).reshape(batch, length, kv_heads, shared, head_dim)
    q, k, v = jnp.moveaxis(q, 1, 2), jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)

    @partial(jax.checkpoint, static_argnums=0)
    def attend(start: int, q: Array, k: Array, v: Array) -> Array:
        count, end = q.shape[2], k.shape[2]
        rows = q.reshape(batch, kv_heads, count * shared, head_dim)
        causal = jnp.arange(start, end)[:, None] >= jnp.arange(end)[None, :]
        mask = causal[None] & (segment_ids[:, start:end, None] == segment_ids[:, None, :end])
        scores = jnp.einsum("bkqd,bksd->bkqs", rows, k, preferred_element_type=jnp.float32)
        scores = jnp.where(jnp.repeat(mask, shared, axis=1)[:, None], scores, _MASKED)
        top = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))  # it cancels, and so does its gradient
        weights = jnp.exp(scores - top)
        out = jnp.einsum("bkqs,bksd->bkqd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
        out = (out / jnp.sum(weights, axis=-1, keepdims=True)).astype(v.dtype)
        return out.reshape(batch, kv_heads, count, shared, head_dim)

    starts = range(0, length, block)
    ends = [min(start + block, length) for start in starts]
    blocks = [attend(s, q[:, :, s:e], k[:, :, :e], v[:, :, :e]) for s, e in zip(starts, ends, strict=True)]
    return jnp.moveaxis(jnp.concatenate(blocks, axis=2), 1, 2).reshape(batch, length, heads, head_dim)


def chunk_attention(
    q: Array, cache_k: Array, cache_v: Array, cached: Array, chunk_k: Array, chunk_v: Array, index: Array
) -> Array:
    """Attention of C new tokens to what is cached and to their chunk, one softmax over both.

    Keys lie with their positions last, so that both products read the cache in the order in which it lies.

    Args:
        q: [S,C,H,Dh]; token c stands at place `index + c` of the chunk.
        cache_k: [S,KV,Dh,W].
        cache_v: [S,KV,W,Dh].
        cached: i32[S], filled positions of the cache.
        chunk_k: [S,KV,Dh,G].
        chunk_v: [S,KV,G,Dh].
        index: i32 scalar.

    Returns:
        [S,C,H,Dh].
    """
    slots, count, heads, head_dim = q.shape
    kv_heads, window, places = cache_v.shape[1], cache_v.shape[2], chunk_v.shape[2]
    shared = heads // kv_heads
    q = q.reshape(slots, count, kv_heads, shared, head_dim)
    q = jnp.swapaxes(q, 1, 2).reshape(slots, kv_heads, count * shared, head_dim)  # one product a key head
    product = partial(jnp.matmul, preferred_element_type=jnp.float32)
    place = index + jnp.repeat(jnp.arange(count), shared)
    is_cached = (jnp.arange(window)[None] < cached[:, None])[:, None, None]
    is_earlier = (jnp.arange(places)[None] <= place[:, None])[None, None]
    old = jnp.where(is_cached, product(q, cache_k), _MASKED)
    new = jnp.where(is_earlier, product(q, chunk_k), _MASKED)
    top = jnp.maximum(jnp.max(old, -1, keepdims=True), jnp.max(new, -1, keepdims=True))
    scale = head_dim**-0.5
    old, new = jnp.exp((old - top) * scale), jnp.exp((new - top) * scale)
    total = jnp.sum(old, -1, keepdims=True) + jnp.sum(new, -1, keepdims=True)
    out = product(old.astype(q.dtype), cache_v) + product(new.astype(q.dtype), chunk_v)
    out = (out / total).astype(q.dtype).reshape(slots, kv_heads, count, shared, head_dim)
    return jnp.swapaxes(out, 1, 2).reshape(slots, count, heads, head_dim)
