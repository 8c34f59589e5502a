"""The two attentions of a decoder: over packed rows, and of a chunk beside a cache. Softmax in float32."""

import jax
import jax.numpy as jnp

Array = jax.Array

_MASKED = -1e30  # finite, so that a row with nothing to attend to (padding) gives numbers, not NaN


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
    length = q.shape[1]
    causal = jnp.arange(length)[:, None] >= jnp.arange(length)[None, :]
    mask = causal[None] & (segment_ids[:, :, None] == segment_ids[:, None, :])
    return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None])


def chunk_attention(
    q: Array, cache_k: Array, cache_v: Array, cached: Array, chunk_k: Array, chunk_v: Array, index: Array
) -> Array:
    """Attention of C new tokens to what is cached and to their chunk, one softmax over both.

    Args:
        q: [S,C,H,Dh]; token c stands at place `index + c` of the chunk.
        cache_k: [S,KV,W,Dh].
        cache_v: [S,KV,W,Dh].
        cached: i32[S], filled positions of the cache.
        chunk_k: [S,KV,G,Dh].
        chunk_v: [S,KV,G,Dh].
        index: i32 scalar.

    Returns:
        [S,C,H,Dh].
    """
    slots, count, heads, head_dim = q.shape
    kv_heads, window, places = cache_k.shape[1], cache_k.shape[2], chunk_k.shape[2]
    q = q.reshape(slots, count, kv_heads, heads // kv_heads, head_dim) * jnp.asarray(head_dim**-0.5, q.dtype)
    einsum = lambda spec, *xs: jnp.einsum(spec, *xs, preferred_element_type=jnp.float32)  # noqa: E731
    old = einsum("sckgd,skwd->skgcw", q, cache_k)
    new = einsum("sckgd,skpd->skgcp", q, chunk_k)
    old = jnp.where((jnp.arange(window)[None] < cached[:, None])[:, None, None, None], old, _MASKED)
    new = jnp.where((jnp.arange(places)[None] <= index + jnp.arange(count)[:, None])[None, None, None], new, _MASKED)
    top = jnp.maximum(jnp.max(old, -1, keepdims=True), jnp.max(new, -1, keepdims=True))
    old, new = jnp.exp(old - top), jnp.exp(new - top)
    total = jnp.sum(old, -1, keepdims=True) + jnp.sum(new, -1, keepdims=True)
    out = einsum("skgcw,skwd->skgcd", old.astype(q.dtype), cache_v) + einsum(
        "skgcp,skpd->skgcd", new.astype(q.dtype), chunk_v
    )
    out = (out / total).astype(q.dtype)
    return jnp.transpose(out, (0, 3, 1, 2, 4)).reshape(slots, count, heads, head_dim)
