"""What slots remember, and the ways to change it that need no model: fork, merge, rewind. All in place."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from aem_jax.models.cache import LENGTH, Cached, Coded, encode, first_places

Array = jax.Array

_HEAD_DIM = (3, 4)
"""Which dimension of stacked keys and of stacked values is that of a head's numbers."""


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["keys", "values", "lengths", "hidden", "prng", "sampled", "remaining"],
    meta_fields=[],
)
@dataclass(frozen=True)
class SamplerState:
    """What S slots remember.

    Attributes:
        keys: [L,S,KV,Dh,T], rotated keys, in the model's dtype or in 8 bits.
        values: [L,S,KV,T,Dh], likewise.
        lengths: i32[S], tokens in the cache.
        hidden: [S,D], final hidden state at the last token.
        prng: u32[S,2], the episode's key data.
        sampled: i32[S], tokens sampled by the episode so far.
        remaining: i32[S], tokens that the response under way may still have; 0 once it has ended.
    """

    keys: Cached
    values: Cached
    lengths: Array
    hidden: Array
    prng: Array
    sampled: Array
    remaining: Array

    @property
    def places(self) -> int:
        """T, positions of a slot's cache."""
        return jax.tree.leaves(self.keys)[0].shape[-1]

    @property
    def cache_bytes(self) -> int:
        """Of keys and values of all slots, over all devices."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((self.keys, self.values)))


KEY_AXES = ("layers", "slots", "kv_heads", "head_dim", "length")
VALUE_AXES = ("layers", "slots", "kv_heads", "length", "head_dim")
_SCALE_AXES = ("layers", "slots", "kv_heads", "length")


def cache_axes(*, int8: bool) -> tuple[Any, Any]:
    """Logical axes of keys and values."""
    chunk = (KEY_AXES, VALUE_AXES)
    return (Coded(KEY_AXES, _SCALE_AXES), Coded(VALUE_AXES, _SCALE_AXES)) if int8 else chunk  # pyright: ignore


def state_axes(*, int8: bool) -> SamplerState:
    """Logical axes of every part of a state."""
    of_slots: Any = ("slots",)
    rows: Any = ("slots", None)
    return SamplerState(*cache_axes(int8=int8), of_slots, rows, rows, of_slots, of_slots)


def take(state: SamplerState, slots: Array, window: int) -> SamplerState:
    """Some slots, `slots` i32[n], with the first `window` positions of their caches: [L,n,KV,Dh,W] and [L,n,KV,W,Dh].

    A loop over slots of plain copies; a gather goes number by number on some backends.
    """
    cache = (state.keys, state.values)

    def empty(x: Array, axis: int) -> Array:
        shape = [x.shape[0], slots.shape[0], *x.shape[2:]]
        shape[axis] = window
        return jnp.zeros_like(x, shape=shape)

    def put(i: Array, taken: tuple[Cached, Cached]) -> tuple[Cached, Cached]:
        # Of the cache itself only: a slice taken before the loop would be a copy of it.
        def copy(to: Array, x: Array) -> Array:
            row = jax.lax.dynamic_slice(x, _start(x, slots[i]), (to.shape[0], 1, *to.shape[2:]))
            return jax.lax.dynamic_update_slice(to, row, _start(to, i))

        return jax.tree.map(copy, taken, cache)

    keys, values = jax.lax.fori_loop(0, slots.shape[0], put, _over_length(empty, cache))
    rest = (state.lengths, state.hidden, state.prng, state.sampled, state.remaining)
    return SamplerState(keys, values, *(leaf[slots] for leaf in rest))


def merge(
    state: SamplerState,
    chunk: tuple[Array, Array],
    hidden: Array,
    counts: Array,
    sampled: Array,
    remaining: Array,
    slots: Array | None = None,
) -> SamplerState:
    """Writes chunks of G tokens behind what is cached; what lies past a slot's new length is never read.

    A cache in 8 bits gets them in 8 bits: here tokens are quantised, once, and never again.

    A loop over slots, because that is done in place; a scatter copies the cache. The hidden states ride along so that
    the loop waits for the last layer: were it free to start before that layer has read its cache, XLA would copy it.

    Args:
        state: S slots.
        chunk: keys [L,n,KV,Dh,G] and values [L,n,KV,G,Dh].
        hidden: [n,D], their last hidden states.
        counts: i32[n], tokens of the chunk that are kept.
        sampled: i32[n], how many of these were sampled.
        remaining: i32[n], as in the state.
        slots: i32[n], all different: the slots that these are of; None means all, in order.
    """

    write = jax.lax.dynamic_update_slice
    codes = isinstance(state.keys, Coded)

    def put(i: Array, cache: tuple[Cached, Cached, Array]) -> tuple[Cached, Cached, Array]:
        # The barrier hides from libtpu 0.0.42 (that of jax 0.10) that the loop copies slot by slot: it takes the chunk
        # for the whole cache then, and fails.
        row = lambda x, axis: jax.lax.optimization_barrier(jax.lax.dynamic_index_in_dim(x, i, axis))
        slot = i if slots is None else slots[i]
        at = state.lengths[slot]

        def behind(x: Array, new: Array, axis: int) -> Array:
            return write(x, new, _start(x, slot, axis, at))

        # Slot by slot in 8 bits, too: a chunk of what is heard may be large, and is not there twice.
        new = [encode(row(x, 1), axis) if codes else row(x, 1) for x, axis in zip(chunk, _HEAD_DIM, strict=True)]
        keys, values = _over_length(behind, cache[:2], (new[0], new[1]))
        return keys, values, write(cache[2], row(hidden, 0), (slot, 0))

    if slots is None:
        # The values themselves: jax 0.11.2 crashes on `x.at[:].set(y)` inside shard_map over several devices.
        lengths, total = state.lengths + counts, state.sampled + sampled
    else:
        lengths, total = state.lengths.at[slots].add(counts), state.sampled.at[slots].add(sampled)
        remaining = state.remaining.at[slots].set(remaining)
    keys, values, hidden = jax.lax.fori_loop(0, counts.shape[0], put, (state.keys, state.values, state.hidden))
    return SamplerState(
        keys=keys,
        values=values,
        lengths=lengths,
        hidden=hidden,
        prng=state.prng,
        sampled=total,
        remaining=remaining,
    )


def copy_rows(
    keys: Cached, values: Cached, from_keys: Cached, from_values: Cached, source: Array, window: int
) -> tuple[Cached, Cached]:
    """Makes the first `window` positions of slot s a copy of row `source[s]`; -1 leaves the slot as it is. In place."""
    begun = jnp.argsort(source < 0, stable=True)  # the slots that begin, first

    def put(i: Array, cache: tuple[Cached, Cached]) -> tuple[Cached, Cached]:
        slot = begun[i]
        row = source[slot]

        def copy(to: Array, x: Array, axis: int) -> Array:
            first: Any = first_places(x, window, axis)
            return jax.lax.dynamic_update_slice(to, jax.lax.dynamic_index_in_dim(first, row, axis=1), _start(to, slot))

        return _over_length(copy, cache, (from_keys, from_values))

    return jax.lax.fori_loop(0, jnp.sum(source >= 0), put, (keys, values))


def _over_length(function: Callable[..., Array], *caches: tuple[Cached, Cached]) -> tuple[Cached, Cached]:
    """`function(array, ..., axis)` of all that keys and values are made of; `axis` is that of positions."""
    of = lambda part, axis: jax.tree.map(partial(function, axis=axis), *(cache[part] for cache in caches))
    return of(0, LENGTH[0]), of(1, LENGTH[1])


def _start(x: Array, slot: Array, axis: int = 0, at: Array | int = 0) -> list[Array | int]:
    """Where a slot's part of x begins; at which place of dimension `axis`."""
    start: list[Array | int] = [0] * x.ndim
    start[axis], start[1] = at, slot
    return start


def rewind(state: SamplerState, keep: Array) -> SamplerState:
    """Forgets all but the first `keep[s]` i32[S] tokens of each slot."""
    return replace(state, lengths=jnp.minimum(state.lengths, keep))
