"""What slots remember, and the ways to change it that need no model: fork, merge, rewind. All in place."""

from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp

Array = jax.Array


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["keys", "values", "lengths", "hidden", "prng", "sampled"],
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
    """

    keys: Array
    values: Array
    lengths: Array
    hidden: Array
    prng: Array
    sampled: Array


KEY_AXES = ("layers", "slots", "kv_heads", "head_dim", "length")
VALUE_AXES = ("layers", "slots", "kv_heads", "length", "head_dim")
STATE_AXES = SamplerState(
    keys=KEY_AXES,  # pyright: ignore[reportArgumentType]
    values=VALUE_AXES,  # pyright: ignore[reportArgumentType]
    lengths=("slots",),  # pyright: ignore[reportArgumentType]
    hidden=("slots", None),  # pyright: ignore[reportArgumentType]
    prng=("slots", None),  # pyright: ignore[reportArgumentType]
    sampled=("slots",),  # pyright: ignore[reportArgumentType]
)
"""Logical axes of every part of a state."""


def merge(
    keys: Array, values: Array, hidden: Array, lengths: Array, new_keys: Array, new_values: Array, new_hidden: Array
) -> tuple[Array, Array, Array]:
    """Writes each slot's chunk of G tokens behind its cached ones; what lies past its new length is never read.

    A loop over slots, because that is done in place; a scatter copies the cache. The hidden states ride along so that
    the loop waits for the last layer: were it free to start before that layer has read its cache, XLA would copy it.
    """

    def put(slot: Array, cache: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        # The barrier hides from libtpu 0.0.42 (that of jax 0.10) that the loop copies slot by slot: it takes the chunk
        # for the whole cache then, and fails.
        row = lambda x, axis: jax.lax.optimization_barrier(jax.lax.dynamic_index_in_dim(x, slot, axis))  # noqa: E731
        write, at = jax.lax.dynamic_update_slice, lengths[slot]
        return (
            write(cache[0], row(new_keys, 1), (0, slot, 0, 0, at)),
            write(cache[1], row(new_values, 1), (0, slot, 0, at, 0)),
            write(cache[2], row(new_hidden, 0), (slot, 0)),
        )

    return jax.lax.fori_loop(0, lengths.shape[0], put, (keys, values, hidden))


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
