"""What slots remember, and the ways to change it that need no model: fork, merge, rewind. All in place."""

from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp

Array = jax.Array


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["keys", "values", "lengths", "hidden", "prng", "sampled", "remaining"],
    meta_fields=[],
)
@dataclass(frozen=True)
class SamplerState:
    """What S slots remember.

    Attributes:
        keys: [L,S,KV,Dh,T], rotated keys.
        values: [L,S,KV,T,Dh].
        lengths: i32[S], tokens in the cache.
        hidden: [S,D], final hidden state at the last token.
        prng: u32[S,2], the episode's key data.
        sampled: i32[S], tokens sampled by the episode so far.
        remaining: i32[S], tokens that the response under way may still have; 0 once it has ended.
    """

    keys: Array
    values: Array
    lengths: Array
    hidden: Array
    prng: Array
    sampled: Array
    remaining: Array


KEY_AXES = ("layers", "slots", "kv_heads", "head_dim", "length")
VALUE_AXES = ("layers", "slots", "kv_heads", "length", "head_dim")
STATE_AXES = SamplerState(
    keys=KEY_AXES,  # pyright: ignore[reportArgumentType]
    values=VALUE_AXES,  # pyright: ignore[reportArgumentType]
    lengths=("slots",),  # pyright: ignore[reportArgumentType]
    hidden=("slots", None),  # pyright: ignore[reportArgumentType]
    prng=("slots", None),  # pyright: ignore[reportArgumentType]
    sampled=("slots",),  # pyright: ignore[reportArgumentType]
    remaining=("slots",),  # pyright: ignore[reportArgumentType]
)
"""Logical axes of every part of a state."""


def take(state: SamplerState, slots: Array, window: int) -> SamplerState:
    """Some slots, `slots` i32[n], with the first `window` positions of their caches: [L,n,KV,Dh,W] and [L,n,KV,W,Dh].

    A loop over slots of plain copies; a gather goes number by number on some backends.
    """
    counts = (state.keys.shape[0], slots.shape[0])
    keys = jnp.zeros_like(state.keys, shape=(*counts, *state.keys.shape[2:4], window))
    values = jnp.zeros_like(state.values, shape=(*counts, state.values.shape[2], window, state.values.shape[4]))

    def put(i: Array, taken: tuple[Array, Array]) -> tuple[Array, Array]:
        # Of the cache itself only: a slice taken before the loop would be a copy of it.
        def row(cache: Array, like: Array) -> Array:
            return jax.lax.dynamic_slice(cache, (0, slots[i], 0, 0, 0), (like.shape[0], 1, *like.shape[2:]))

        write = partial(jax.lax.dynamic_update_slice, start_indices=(0, i, 0, 0, 0))
        return write(taken[0], row(state.keys, taken[0])), write(taken[1], row(state.values, taken[1]))

    keys, values = jax.lax.fori_loop(0, slots.shape[0], put, (keys, values))
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

    def put(i: Array, cache: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        # The barrier hides from libtpu 0.0.42 (that of jax 0.10) that the loop copies slot by slot: it takes the chunk
        # for the whole cache then, and fails.
        row = lambda x, axis: jax.lax.optimization_barrier(jax.lax.dynamic_index_in_dim(x, i, axis))  # noqa: E731
        slot = i if slots is None else slots[i]
        write, at = jax.lax.dynamic_update_slice, state.lengths[slot]
        return (
            write(cache[0], row(chunk[0], 1), (0, slot, 0, 0, at)),
            write(cache[1], row(chunk[1], 1), (0, slot, 0, at, 0)),
            write(cache[2], row(hidden, 0), (slot, 0)),
        )

    every = slice(None) if slots is None else slots
    cache = jax.lax.fori_loop(0, counts.shape[0], put, (state.keys, state.values, state.hidden))
    return SamplerState(
        keys=cache[0],
        values=cache[1],
        lengths=state.lengths.at[every].add(counts),
        hidden=cache[2],
        prng=state.prng,
        sampled=state.sampled.at[every].add(sampled),
        remaining=state.remaining.at[every].set(remaining),
    )


def copy_rows(
    keys: Array, values: Array, from_keys: Array, from_values: Array, source: Array, window: int
) -> tuple[Array, Array]:
    """Makes the first `window` positions of slot s a copy of row `source[s]`; -1 leaves the slot as it is. In place."""
    begun = jnp.argsort(source < 0, stable=True)  # the slots that begin, first

    def put(i: Array, cache: tuple[Array, Array]) -> tuple[Array, Array]:
        slot = begun[i]
        row = source[slot]
        new_keys = jax.lax.dynamic_index_in_dim(from_keys[..., :window], row, axis=1)
        new_values = jax.lax.dynamic_index_in_dim(from_values[..., :window, :], row, axis=1)
        return (
            jax.lax.dynamic_update_slice(cache[0], new_keys, (0, slot, 0, 0, 0)),
            jax.lax.dynamic_update_slice(cache[1], new_values, (0, slot, 0, 0, 0)),
        )

    return jax.lax.fori_loop(0, jnp.sum(source >= 0), put, (keys, values))


def rewind(state: SamplerState, keep: Array) -> SamplerState:
    """Forgets all but the first `keep[s]` i32[S] tokens of each slot."""
    return replace(state, lengths=jnp.minimum(state.lengths, keep))
