"""The KV cache of the sampler. Only this module, `attention.chunk_attention` and `decode_attention` know its layout.

Each slot is a row of contiguous positions, allocated once. The functions here read and write rows in place. Another
layout, such as pages, changes these modules; `plan` counts the bytes of its arrays.

Layers with a sliding window can have a ring instead (`RingCache`): of R positions, position p mod R holds token p, so
that new tokens replace those that no query attends to anymore. R is the window and twice the largest chunk (`slack`),
because a call writes a whole chunk, also where it keeps few or none of its tokens, and because a slot may be truncated
by up to a chunk. Slots that only grow, apart from such truncations, therefore have every token of the window.

In int8 a token has one scale for each layer and KV head. Each token is quantised once, when it is appended. Both
products of attention read the codes q: the scores are (query · q) s, and the output is Σ (w s) · q for weights w.
bfloat16 holds the codes exactly.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from aem_jax.models.config import ModelConfig
from aem_jax.models.int8 import QuantizedArray, quantize

Array = jax.Array

KVArray = Array | QuantizedArray
"""Keys or values: in the model's dtype, or int8 codes with their scales."""

KEY_AXES = ("slots", "kv_heads", "head_dim", "length")
VALUE_AXES = ("slots", "kv_heads", "length", "head_dim")
_SCALE_AXES = ("slots", "kv_heads", "length")

RING_MULTIPLE = 16
"""The length of a ring is a multiple of this number."""


class LayerCache(NamedTuple):
    """Keys and values of one layer: S slots with T positions each.

    Attributes:
        keys: [S,KV,Dh,T], rotated. T is last, so that both products of attention read memory in order.
        values: [S,KV,T,Dh].
    """

    keys: KVArray
    values: KVArray


class RingCache(LayerCache):
    """The cache of a layer with a sliding window: its positions are a ring, and T may be less than a slot's tokens."""

    __slots__ = ()


@partial(jax.tree_util.register_dataclass, data_fields=["layers"], meta_fields=[])
@dataclass(frozen=True)
class KVCache:
    """Keys and values of all layers. Each layer has arrays of its own, so that a product reads them where they are:
    a layer's part of one array would be copied first."""

    layers: tuple[LayerCache, ...]

    @property
    def length(self) -> int:
        """T, positions of a slot in the layers that have most."""
        return max(jax.tree.leaves(layer.keys)[0].shape[-1] for layer in self.layers)

    @property
    def num_bytes(self) -> int:
        """Bytes of all slots, over all devices."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    @property
    def token_bytes(self) -> int:
        """Bytes of one position of one slot, all layers; with rings, the mean of all positions."""
        return self.num_bytes // (jax.tree.leaves(self.layers[0].keys)[0].shape[0] * self.length)


class KVChunk(NamedTuple):
    """Keys and values of G new tokens of each slot in one layer, before they are appended to a cache.

    Attributes:
        keys: [S,KV,Dh,G], in the model's dtype.
        values: [S,KV,G,Dh].
    """

    keys: Array
    values: Array

    @property
    def length(self) -> int:
        """G, positions of a slot."""
        return self.keys.shape[-1]


def init_cache(
    config: ModelConfig, slots: int, length: int, *, int8: bool = False, ring_slack: int | None = None
) -> KVCache:
    """Zeros for `slots` slots of `length` positions.

    Args:
        config: of the model.
        slots: number of slots.
        length: positions of a slot.
        int8: whether keys and values are codes.
        ring_slack: the largest chunk of a call, for rings in layers with a sliding window; None for no rings.
    """

    def layer(ring: bool, window: int) -> LayerCache:
        size = min(length, ring_length(window, ring_slack or 0)) if ring else length
        kind, chunk = RingCache if ring else LayerCache, _empty_layer(config, slots, size)
        if not int8:
            return kind(*chunk)
        scales = (slots, config.num_kv_heads, size)
        return kind(*(QuantizedArray(jnp.zeros_like(x, jnp.int8), jnp.zeros(scales)) for x in chunk))

    rings = ring_layers(config, enabled=ring_slack is not None)
    return KVCache(tuple(map(layer, rings, config.windows)))


def ring_length(window: int, slack: int) -> int:
    """R, positions of the ring of a layer with a sliding window, with chunks of up to `slack` tokens."""
    return -(-(window + 2 * slack) // RING_MULTIPLE) * RING_MULTIPLE


def ring_layers(config: ModelConfig, *, enabled: bool) -> tuple[bool, ...]:
    """Whether each layer has a ring; none has if rings are not enabled."""
    return tuple(enabled and window > 0 for window in config.windows)


def init_chunk(config: ModelConfig, slots: int, length: int) -> tuple[KVChunk, ...]:
    """Chunks of all layers, for `length` tokens, in which nothing is written yet."""
    return tuple(_empty_layer(config, slots, length) for _ in range(config.num_layers))


def _empty_layer(config: ModelConfig, slots: int, length: int) -> KVChunk:
    shape = (slots, config.num_kv_heads)
    keys, values = (*shape, config.head_dim, length), (*shape, length, config.head_dim)
    return KVChunk(jnp.zeros(keys, config.dtype), jnp.zeros(values, config.dtype))


def cache_axes(rings: Sequence[bool], *, int8: bool) -> KVCache:
    """Logical axes of a cache's arrays, in its structure; `rings` are those of `ring_layers`."""
    sides: Any = (KEY_AXES, VALUE_AXES)
    layer: Any = tuple(QuantizedArray(axes, _SCALE_AXES) for axes in sides) if int8 else sides  # pyright: ignore
    return KVCache(tuple((RingCache if ring else LayerCache)(*layer) for ring in rings))


def replicated_axes(axes: KVCache) -> KVCache:
    """The axes of a cache with all slots on every device, as `copy_rows` needs its source."""
    return jax.tree.map(lambda name: None if name == "slots" else name, axes)


def chunk_axes(num_layers: int) -> tuple[KVChunk, ...]:
    """Logical axes of the chunks of all layers, in their structure."""
    sides: Any = (KEY_AXES, VALUE_AXES)
    return (KVChunk(*sides),) * num_layers


def window(cache: KVCache, length: int) -> KVCache:
    """What a call reads: the first `length` positions of every slot, or all if there are fewer."""
    return _over_length(lambda x, axis: jax.lax.slice_in_dim(x, 0, min(length, x.shape[axis]), axis=axis), cache)


def gather(cache: KVCache, slots: Array, length: int) -> KVCache:
    """The first `length` positions of some slots, `slots` i32[n].

    A loop of plain copies, one for each slot: a gather moves single numbers on some backends.
    """

    def empty(x: Array, axis: int) -> Array:
        shape = [slots.shape[0], *x.shape[1:]]
        shape[axis] = min(length, x.shape[axis])
        return jnp.zeros_like(x, shape=shape)

    def copy_slot(i: Array, gathered: KVCache) -> KVCache:
        # From the cache itself: a slice taken before the loop would be a copy of it.
        def copy(to: Array, x: Array) -> Array:
            row = jax.lax.dynamic_slice(x, _start(x, slots[i]), (1, *to.shape[1:]))
            return jax.lax.dynamic_update_slice(to, row, _start(to, i))

        return jax.tree.map(copy, gathered, cache)

    return jax.lax.fori_loop(0, slots.shape[0], copy_slot, _over_length(empty, cache))


def append(
    cache: KVCache, chunks: Sequence[KVChunk], lengths: Array, hidden: Array, last: Array, slots: Array | None = None
) -> tuple[KVCache, Array]:
    """Writes chunks of G tokens behind the cached tokens, in place; an int8 cache quantises them.

    In a ring the chunk may go on at its start.

    A loop over slots runs in place, where a scatter copies the cache. Last hidden states are written in the same loop,
    so that it waits for the last layer. Were it free to start before that layer has read its cache, XLA would copy it.

    Args:
        cache: of S slots.
        chunks: of n slots, G positions, for each layer.
        lengths: i32[S], cached tokens of each slot.
        hidden: [S,D].
        last: [n,D], replaces the rows of `hidden`.
        slots: i32[n], all different: the slots of the chunk; None means all, in order.

    Returns:
        The cache, and `hidden`.
    """
    is_int8 = isinstance(cache.layers[0].keys, QuantizedArray)

    def new(layer: LayerCache, chunk: KVChunk, row: Callable[[Array], Array]) -> LayerCache:
        # Quantised slot by slot: a chunk may be large, and exists only once.
        if not is_int8:
            return type(layer)(row(chunk.keys), row(chunk.values))
        keys = quantize(row(chunk.keys), KEY_AXES.index("head_dim"))
        return type(layer)(keys, quantize(row(chunk.values), VALUE_AXES.index("head_dim")))

    def append_slot(i: Array, carry: tuple[KVCache, Array]) -> tuple[KVCache, Array]:
        # The barrier hides from libtpu 0.0.42 (that of jax 0.10) that the loop copies slot by slot: it takes the chunk
        # for all of the cache then, and fails.
        row = lambda x: jax.lax.optimization_barrier(jax.lax.dynamic_index_in_dim(x, i, 0))
        slot = i if slots is None else slots[i]
        position = lengths[slot]

        def write(x: Array, rows: Array, axis: int) -> Array:
            return jax.lax.dynamic_update_slice(x, rows, _start(x, slot, axis, position))

        def write_ring(x: Array, rows: Array, axis: int) -> Array:
            return _write_ring(x, rows, axis, slot, position)

        cache, hidden = carry
        hidden = jax.lax.dynamic_update_slice(hidden, row(last), (slot, 0))
        added = KVCache(tuple(new(layer, chunk, row) for layer, chunk in zip(cache.layers, chunks, strict=True)))
        return _over_length(write, cache, added, of_rings=write_ring), hidden

    return jax.lax.fori_loop(0, last.shape[0], append_slot, (cache, hidden))


def _write_ring(x: Array, rows: Array, axis: int, slot: Array, position: Array) -> Array:
    """x with the rows of G tokens of a slot at `position`, modulo the ring's length.

    The tokens are written to the G positions from there on, or to the last G of the ring; those that do not fit, to its
    first G. Both times the positions between keep what they hold.
    """
    length, count = x.shape[axis], rows.shape[axis]
    start = position % length
    first = jnp.minimum(start, length - count)
    turned = jnp.roll(rows, start - first, axis)
    fits = jax.lax.broadcasted_iota(jnp.int32, rows.shape, axis) >= start - first
    for begin, chosen in ((first, fits), (0, ~fits)):
        where = _start(x, slot, axis, begin)
        # The barrier keeps the read out of the write's fusion, which would then need a copy of the cache.
        held = jax.lax.optimization_barrier(jax.lax.dynamic_slice(x, where, rows.shape))
        x = jax.lax.dynamic_update_slice(x, jnp.where(chosen, turned, held), where)
    return x


def copy_rows(cache: KVCache, source: KVCache, rows: Array, length: int) -> KVCache:
    """Copies the first `length` positions of row `rows[s]` of `source` to slot s, in place; -1 leaves the slot."""
    begun = jnp.argsort(rows < 0, stable=True)  # the slots that are copied to, first

    def copy_row(i: Array, cache: KVCache) -> KVCache:
        slot = begun[i]
        row = rows[slot]

        def copy(to: Array, x: Array, axis: int) -> Array:
            first = jax.lax.slice_in_dim(x, 0, min(length, x.shape[axis]), axis=axis)
            return jax.lax.dynamic_update_slice(to, jax.lax.dynamic_index_in_dim(first, row, axis=0), _start(to, slot))

        return _over_length(copy, cache, source)

    return jax.lax.fori_loop(0, jnp.sum(rows >= 0), copy_row, cache)


def copy_within(cache: KVCache, rows: Array, length: int) -> KVCache:
    """Copies the first `length` positions of slot `rows[s]` to slot s, in place; -1 leaves the slot.

    Slots are copied in order, so a slot that is copied from must have a row of -1.
    """
    chosen = jnp.argsort(rows < 0, stable=True)  # the slots that are copied to, first

    def copy_row(i: Array, cache: KVCache) -> KVCache:
        slot = chosen[i]

        def copy(x: Array, axis: int) -> Array:
            shape = [1, *x.shape[1:]]
            shape[axis] = min(length, x.shape[axis])
            # The barrier keeps the read out of the write's fusion, which would then need a copy of the cache.
            row = jax.lax.optimization_barrier(jax.lax.dynamic_slice(x, _start(x, rows[slot]), shape))
            return jax.lax.dynamic_update_slice(x, row, _start(x, slot))

        return _over_length(copy, cache)

    return jax.lax.fori_loop(0, jnp.sum(rows >= 0), copy_row, cache)


def write_tokens(chunk: KVChunk, k: Array, v: Array, index: Array) -> KVChunk:
    """One layer's chunk with C tokens written at position `index`.

    Args:
        chunk: of one layer, [S,KV,Dh,G] and [S,KV,G,Dh].
        k: [S,C,KV,Dh], rotated.
        v: [S,C,KV,Dh].
        index: i32 scalar.
    """
    keys = jax.lax.dynamic_update_slice(chunk.keys, jnp.transpose(k, (0, 2, 3, 1)), (0, 0, 0, index))
    values = jax.lax.dynamic_update_slice(chunk.values, jnp.swapaxes(v, 1, 2), (0, 0, index, 0))
    return KVChunk(keys, values)


def factors(array: KVArray, dtype: DTypeLike) -> tuple[Array, Array | None]:
    """The operand of a product in `dtype`, and the scale [..., 1, T] of each of its positions, if it has scales."""
    if isinstance(array, QuantizedArray):
        return array.codes.astype(dtype), array.scales[..., None, :]
    return array, None


def _over_length(
    function: Callable[..., Array], *caches: KVCache, of_rings: Callable[..., Array] | None = None
) -> KVCache:
    """`function(array, ..., axis)` of all arrays of caches; `axis` is that of positions. `of_rings` is of rings."""

    def of_layer(*layers: LayerCache) -> LayerCache:
        is_ring = isinstance(layers[0], RingCache)
        chosen = of_rings if of_rings and is_ring else function
        axes = cache_axes((is_ring,), int8=isinstance(layers[0].keys, QuantizedArray)).layers[0]
        return jax.tree.map(
            lambda names, *arrays: chosen(*arrays, axis=names.index("length")), axes, *layers, is_leaf=_is_names
        )

    return KVCache(tuple(map(of_layer, *(cache.layers for cache in caches))))


def _is_names(node: Any) -> bool:
    return isinstance(node, tuple) and all(isinstance(name, str) for name in node)


def _start(x: Array, slot: Array, axis: int = 0, position: Array | int = 0) -> list[Array | int]:
    """Where a slot's part of x begins, at a position of dimension `axis`."""
    start: list[Array | int] = [0] * x.ndim
    start[axis], start[0] = position, slot
    return start
