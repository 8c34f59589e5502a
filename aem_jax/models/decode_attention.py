"""Attention of a decode step, chosen by the device. A step attends to the slot's cached tokens and to its own.

| | new keys and values | reads | where |
|---|---|---|---|
| `CHUNKED` | a chunk beside the cache, appended after the call | the call's window of every slot | XLA, everywhere |
| `attend_ragged` | a chunk beside the cache, appended after the call | each slot's own tokens | TPUs: `models.ragged` |
| `attend_in_place` | written into the cache at every step | each slot's own tokens | NVIDIA GPUs: cuDNN |

cuDNN returns the logarithm of the softmax's sum only in the inputs' 16 bits. That is too coarse to join two softmaxes,
so there the new token goes into the cache first. A TPU cannot write single positions fast, since they lie in the lanes
of its tiles.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from aem_jax.models import kv_cache
from aem_jax.models.attention import chunk_attention
from aem_jax.models.config import ModelConfig
from aem_jax.models.kernels import Device, device_of
from aem_jax.models.kv_cache import KEY_AXES, VALUE_AXES, KVChunk, LayerCache
from aem_jax.sharding import DECODE, partition

Array = jax.Array

Attend = Callable[..., tuple[Array, Any]]
"""(q [S,1,H,Dh], k [S,1,KV,Dh], v [S,1,KV,Dh], cache, lengths i32[S], chunk, index) -> the attended values [S,1,H,Dh]
and the chunk with the new token. The arguments are those of `chunk_attention`; layers with a sliding window pass it as
`sliding_window`. If the cost follows
the lengths, a slot of length 0 does not decode, and its result is not used."""


class DecodeAttention(NamedTuple):
    """An implementation.

    Attributes:
        attend: see `Attend`.
        follows_lengths: whether its cost follows each slot's length. Then every call is made on all slots and all
            positions, and one program suffices.
        in_place: whether the loop's chunk is the cache itself.
        order: logical dimensions of the cache's arrays, outermost first in memory; empty for the arrays' own order.
    """

    attend: Attend
    follows_lengths: bool = False
    in_place: bool = False
    order: tuple[str, ...] = ()


def attend_chunked(
    q: Array,
    k: Array,
    v: Array,
    cache: LayerCache,
    lengths: Array,
    chunk: KVChunk,
    index: Array,
    sliding_window: int = 0,
) -> tuple[Array, KVChunk]:
    """`Attend` by XLA. Also for several new tokens a slot, q [S,C,H,Dh]."""
    chunk = kv_cache.write_tokens(chunk, k, v, index)
    return chunk_attention(q, cache, lengths, chunk, index, sliding_window), chunk


CHUNKED = DecodeAttention(attend_chunked)


def attend_in_place(
    q: Array,
    k: Array,
    v: Array,
    cache: LayerCache,
    lengths: Array,
    chunk: LayerCache,
    index: Array,
    *,
    implementation: Any = "cudnn",
) -> tuple[Array, LayerCache]:
    """`Attend` by jax.nn.dot_product_attention; `chunk` is the cache, and `cache` is not read."""
    del cache
    arrays: Any = chunk
    slots, positions = jnp.arange(q.shape[0]), lengths + index
    keys, values = jnp.transpose(arrays.keys, (0, 3, 1, 2)), jnp.transpose(arrays.values, (0, 2, 1, 3))
    # A slot that does not decode writes past the end, that is, nothing.
    written = jnp.where(lengths > 0, positions, keys.shape[1])
    put = lambda rows, new: rows.at[slots, written].set(new[:, 0], mode="drop", unique_indices=True)
    keys, values = put(keys, k), put(values, v)
    attended = jax.nn.dot_product_attention(
        q,
        keys,
        values,
        query_seq_lengths=jnp.ones_like(lengths),
        key_value_seq_lengths=jnp.where(lengths > 0, positions + 1, 1),
        implementation=implementation,
    )
    return attended, LayerCache(jnp.transpose(keys, (0, 2, 3, 1)), jnp.transpose(values, (0, 2, 1, 3)))


def choose(config: ModelConfig, device: Device, *, int8: bool) -> DecodeAttention:
    """The implementation for one device, not yet split over a mesh.

    Args:
        config: sizes.
        device: properties of the device.
        int8: whether the cache is in int8, which only XLA's version reads.
    """
    if int8 or config.sliding_windows:
        return CHUNKED
    if device.platform == "tpu" and config.head_dim % 64 == 0:
        from aem_jax.models.ragged import attend_ragged  # see there why not above

        return DecodeAttention(attend_ragged, follows_lengths=True, order=("slots", "kv_heads", "head_dim", "length"))
    half = config.dtype in ("bfloat16", "float16")
    if device.is_cuda and device.capability >= 8 and half and config.head_dim % 8 == 0 and config.head_dim <= 128:
        order = ("slots", "length", "kv_heads", "head_dim")
        return DecodeAttention(attend_in_place, follows_lengths=True, in_place=True, order=order)
    return CHUNKED


def make_decode_attention(
    config: ModelConfig, mesh: Mesh | None, *, int8: bool, device: Device | None = None
) -> DecodeAttention:
    """The implementation for a mesh; each device attends with its own slots and heads.

    Args:
        config: sizes.
        mesh: the mesh; None for one device without a mesh, which attends by XLA.
        int8: of the cache.
        device: properties of the mesh's devices; by default those of its first device.
    """
    if mesh is None:
        return CHUNKED
    chosen = choose(config, device or device_of(mesh), int8=int8)
    return on_mesh(chosen, mesh) if chosen.follows_lengths else chosen


def on_mesh(attention: DecodeAttention, mesh: Mesh) -> DecodeAttention:
    """A kernel runs on one device: it is put inside `shard_map`."""
    queries, new = (partition(("slots", "length", heads, "head_dim"), DECODE) for heads in ("heads", "kv_heads"))
    arrays: Any = tuple(partition(names, DECODE) for names in (KEY_AXES, VALUE_AXES))
    cache, slots = LayerCache(*arrays), partition(("slots",), DECODE)
    chunk = cache if attention.in_place else KVChunk(*arrays)
    attend = jax.shard_map(
        partial(attention.attend),
        mesh=mesh,
        in_specs=(queries, new, new, cache, slots, chunk, partition((), DECODE)),
        out_specs=(queries, chunk),
        check_vma=False,  # the outputs of a kernel do not declare the mesh axes over which they vary
    )
    return attention._replace(attend=attend)
