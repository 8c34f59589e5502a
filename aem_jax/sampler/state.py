"""The state of the slots, and the functions over it that need no model: gather, append, copy, rewind, restart."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from aem_jax.models import ModelConfig, kv_cache
from aem_jax.models.kv_cache import KVCache, KVChunk

Array = jax.Array


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["cache", "lengths", "hidden", "prng", "sampled", "remaining", "experts"],
    meta_fields=[],
)
@dataclass(frozen=True)
class SamplerState:
    """The state of S slots.

    Attributes:
        cache: keys and values of each slot's tokens.
        lengths: i32[S], tokens in the cache.
        hidden: [S,D], final hidden state at the last token.
        prng: u32[S,2], the episode's key data.
        sampled: i32[S], tokens sampled by the episode so far.
        remaining: i32[S], tokens left in the budget of the current response; 0 once it has ended.
        experts: integers [S,T,L·k], the experts that each token of the cache was routed to; None if they are not
            recorded. Layers and experts are one axis, because a TPU pads a short last axis.
    """

    cache: KVCache
    lengths: Array
    hidden: Array
    prng: Array
    sampled: Array
    remaining: Array
    experts: Array | None = None


def init_state(
    config: ModelConfig,
    slots: int,
    length: int,
    *,
    int8: bool,
    ring_slack: int | None = None,
    records_experts: bool = False,
) -> SamplerState:
    """Empty slots with `length` positions each; `int8` and `ring_slack` are those of `kv_cache.init_cache`."""
    experts = None
    if records_experts and config.mixture:
        width = config.num_layers * config.mixture.experts_per_token
        experts = jnp.zeros((slots, length, width), config.mixture.record_dtype)
    return SamplerState(
        cache=kv_cache.init_cache(config, slots, length, int8=int8, ring_slack=ring_slack),
        lengths=jnp.zeros(slots, jnp.int32),
        hidden=jnp.zeros((slots, config.hidden_size), config.dtype),
        prng=jnp.zeros((slots, 2), jnp.uint32),
        sampled=jnp.zeros(slots, jnp.int32),
        remaining=jnp.zeros(slots, jnp.int32),
        experts=experts,
    )


EXPERT_AXES: Any = ("slots", "length", None)


def state_axes(rings: Sequence[bool], *, int8: bool, records_experts: bool = False) -> SamplerState:
    """Logical axes of a state's arrays, in its structure; `rings` are those of `kv_cache.ring_layers`."""
    of_slots: Any = ("slots",)
    rows: Any = ("slots", None)
    experts = EXPERT_AXES if records_experts else None
    return SamplerState(kv_cache.cache_axes(rings, int8=int8), of_slots, rows, rows, of_slots, of_slots, experts)


def gather_slots(state: SamplerState, slots: Array, window: int) -> SamplerState:
    """Some slots, `slots` i32[n], with the first `window` positions of their caches, without recorded experts."""
    rest = (state.lengths, state.hidden, state.prng, state.sampled, state.remaining)
    return SamplerState(kv_cache.gather(state.cache, slots, window), *(leaf[slots] for leaf in rest))


def append_chunk(
    state: SamplerState,
    chunk: Sequence[KVChunk],
    hidden: Array,
    counts: Array,
    sampled: Array,
    remaining: Array,
    experts: Array | None = None,
    slots: Array | None = None,
) -> SamplerState:
    """Appends chunks of G tokens to slots; positions past a slot's new length are never read.

    Args:
        state: S slots.
        chunk: of n slots, G positions.
        hidden: [n,D], their last hidden states.
        counts: i32[n], tokens of the chunk that are kept.
        sampled: i32[n], how many of these were sampled.
        remaining: i32[n], as in the state.
        experts: integers [n,G,L·k], of the chunk; None if they are not recorded.
        slots: i32[n], all different: the slots of the chunk; None means all, in order.
    """
    if slots is None:
        # The values themselves: jax 0.11.2 crashes on `x.at[:].set(y)` inside shard_map over several devices.
        lengths, total = state.lengths + counts, state.sampled + sampled
    else:
        lengths, total = state.lengths.at[slots].add(counts), state.sampled.at[slots].add(sampled)
        remaining = state.remaining.at[slots].set(remaining)
    cache, hidden = kv_cache.append(state.cache, chunk, state.lengths, state.hidden, hidden, slots)
    record = append_experts(state.experts, experts, state.lengths, slots)
    return SamplerState(
        cache=cache,
        lengths=lengths,
        hidden=hidden,
        prng=state.prng,
        sampled=total,
        remaining=remaining,
        experts=record,
    )


def append_experts(
    record: Array | None, experts: Array | None, lengths: Array, slots: Array | None = None
) -> Array | None:
    """The record [S,T,L·k] with the experts [n,G,L·k] of chunks behind the tokens of slots; None without a record."""
    if record is None or experts is None:
        return record

    def append_slot(i: Array, record: Array) -> Array:
        slot = i if slots is None else slots[i]
        rows = jax.lax.dynamic_index_in_dim(experts, i)
        return jax.lax.dynamic_update_slice(record, rows, (slot, lengths[slot], 0))

    return jax.lax.fori_loop(0, experts.shape[0], append_slot, record)


def copy_experts(record: Array | None, source: Array | None, rows: Array, length: int) -> Array | None:
    """The record with the first `length` tokens of row `rows[s]` of `source` in slot s; -1 leaves the slot."""
    if record is None or source is None:
        return record
    length = min(length, record.shape[1], source.shape[1])
    copied = source[jnp.maximum(rows, 0), :length]
    kept = jnp.where((rows >= 0)[:, None, None], copied, record[:, :length])
    return jax.lax.dynamic_update_slice(record, kept, (0, 0, 0))


def restart(state: SamplerState, chosen: Array, prng: Array, sampled: Array) -> SamplerState:
    """Empties the slots `chosen` bool[S], for episodes with key data `prng` u32[S,2] and `sampled` i32[S] tokens."""
    return replace(
        state,
        lengths=jnp.where(chosen, 0, state.lengths),
        prng=jnp.where(chosen[:, None], prng, state.prng),
        sampled=jnp.where(chosen, sampled, state.sampled),
        remaining=jnp.where(chosen, 0, state.remaining),
    )


def copy_prefix(state: SamplerState, source: Array, keep: Array, *, length: int) -> SamplerState:
    """Slot s becomes the first `keep[s]` tokens of slot `source[s]`, both i32[S]; -1 is the slot itself.

    The hidden state of a source is copied, too: it predicts the next token if all of the source's tokens are copied.
    Static `length` covers the copied tokens. A slot that is copied from has itself as source.
    """
    copied, row = source >= 0, jnp.maximum(source, 0)
    return replace(
        state,
        cache=kv_cache.copy_within(state.cache, source, length),
        lengths=jnp.where(copied, keep, jnp.minimum(state.lengths, keep)),
        hidden=jnp.where(copied[:, None], state.hidden[row], state.hidden),
        experts=copy_experts(state.experts, state.experts, source, length),
    )


def rewind(state: SamplerState, keep: Array, sampled: Array) -> SamplerState:
    """Truncates each slot to its first `keep[s]` tokens, and sets `sampled` unless it is -1; both i32[S]."""
    return replace(
        state,
        lengths=jnp.minimum(state.lengths, keep),
        sampled=jnp.where(sampled >= 0, sampled, state.sampled),
    )
