"""The functions that the sampler compiles, for a policy, a sampling function and a mesh that splits the slots."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from aem_jax.models import Params, Policy, kv_cache
from aem_jax.models.decode_attention import DecodeAttention
from aem_jax.models.kv_cache import KVCache, KVChunk
from aem_jax.sampler.sampling import SampleToken, uniforms
from aem_jax.sampler.state import (
    EXPERT_AXES,
    SamplerState,
    append_chunk,
    append_experts,
    copy_experts,
    copy_prefix,
    gather_slots,
)
from aem_jax.sharding import DECODE, shardings

Array = jax.Array

CONTINUE = -1
"""As a budget: the rest of the response's budget."""


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["tokens", "logprobs", "entropies", "counts", "finished"],
    meta_fields=[],
)
@dataclass(frozen=True)
class Decoded:
    """The tokens of one `decode` call.

    Attributes:
        tokens: i32[S,G].
        logprobs: f32[S,G], nats.
        entropies: f32[S,G], nats.
        counts: i32[S], how many of the G tokens the slot sampled.
        finished: bool[S], whether the slot's last token was a stop id.
    """

    tokens: Array
    logprobs: Array
    entropies: Array
    counts: Array
    finished: Array


class Programs:
    """The functions of a `Sampler` before compilation; see there for their arguments.

    Args:
        policy: the decoder.
        sample_token: draws a token from each row of logits.
        stop_ids: ids that end a response.
        mesh: splits the slots; None for one device.
        attention: of decode.
        axes: logical axes of the state.
    """

    def __init__(
        self,
        policy: Policy,
        sample_token: SampleToken,
        stop_ids: Sequence[int],
        mesh: Mesh | None,
        attention: DecodeAttention,
        axes: SamplerState,
    ) -> None:
        self._policy, self._sample_token, self._mesh, self._attention = policy, sample_token, mesh, attention
        self._state_axes = axes
        self._experts = policy.experts(mesh)
        self._stop_ids = jnp.asarray(sorted(set(stop_ids)), jnp.int32)

    def extend(
        self, params: Params, state: SamplerState, tokens: Array, counts: Array, slots: Array | None, *, window: int
    ) -> SamplerState:
        decoder, part = self._policy.bind(params, self._experts), self._gather_slots(state, slots, window)
        count, length = tokens.shape
        hidden, chunk, experts = decoder.extend(
            decoder.with_cache(part.cache, window),
            tokens,
            part.lengths[:, None] + jnp.arange(length)[None],
            part.lengths,
            decoder.empty_chunk(count, length),
            jnp.int32(0),
        )
        last = jnp.take_along_axis(hidden, jnp.maximum(counts - 1, 0)[:, None, None], axis=1)[:, 0]
        last = jnp.where((counts > 0)[:, None], last, part.hidden)
        return self._append_chunk(state, slots, chunk, last, counts, counts * 0, part.remaining, experts)

    def decode(
        self, params: Params, state: SamplerState, budgets: Array, slots: Array | None, *, num_tokens: int, window: int
    ) -> tuple[SamplerState, Decoded]:
        part, count = self._gather_slots(state, slots, window), budgets.shape[0]
        left = jnp.where(budgets == CONTINUE, part.remaining, budgets)
        remaining, budgets = jnp.where(budgets == 0, part.remaining, left), jnp.minimum(left, num_tokens)
        # All that does not depend on sampled tokens is computed before the loop over tokens.
        decoder, attention = self._policy.bind(params, self._experts), self._attention
        window = part.cache.length if attention.follows_lengths else window
        layers = decoder.with_cache(part.cache, window)
        random = uniforms(part.prng, part.sampled[:, None] + jnp.arange(num_tokens)[None])
        out = Decoded(
            tokens=jnp.zeros((count, num_tokens), jnp.int32),
            logprobs=jnp.zeros((count, num_tokens)),
            entropies=jnp.zeros((count, num_tokens)),
            counts=jnp.zeros(count, jnp.int32),
            finished=jnp.zeros(count, bool),
        )

        def is_active(out: Decoded) -> Array:
            return ~out.finished & (out.counts < budgets)

        def any_active(carry: tuple[Array, Array, Any, Decoded, Array | None]) -> Array:
            return jnp.any(is_active(carry[3]))

        def step(
            carry: tuple[Array, Array, Any, Decoded, Array | None],
        ) -> tuple[Array, Array, Any, Decoded, Array | None]:
            index, hidden, chunk, out, experts = carry
            active = is_active(out)
            tokens, logprobs, entropies = self._sample_token(
                decoder.logits(hidden), jax.lax.dynamic_index_in_dim(random, index, keepdims=False)
            )
            put = lambda rows, new: rows.at[:, index].set(jnp.where(active, new, 0))
            out = Decoded(
                tokens=put(out.tokens, tokens),
                logprobs=put(out.logprobs, logprobs),
                entropies=put(out.entropies, entropies),
                counts=out.counts + active,
                finished=out.finished | (active & jnp.any(tokens[:, None] == self._stop_ids[None], axis=-1)),
            )
            positions = (part.lengths + index)[:, None]
            lengths = jnp.where(active, part.lengths, 0) if attention.follows_lengths else part.lengths
            new, chunk, routed = decoder.extend(
                layers, tokens[:, None], positions, lengths, chunk, index, attention.attend
            )
            if experts is not None and routed is not None:
                experts = experts.at[:, index].set(routed.reshape(count, -1))
            return index + 1, jnp.where(active[:, None], new[:, 0], hidden), chunk, out, experts

        empty = part.cache.layers if attention.in_place else decoder.empty_chunk(count, num_tokens)
        record = state.experts
        experts = None if record is None else jnp.zeros((count, num_tokens, record.shape[2]), record.dtype)
        start = jnp.int32(0), part.hidden, empty, out, experts
        _, hidden, chunk, out, experts = jax.lax.while_loop(any_active, step, start)
        remaining = jnp.where(out.finished, 0, remaining - out.counts)
        if attention.in_place:
            return replace(
                state,
                cache=KVCache(chunk),
                lengths=state.lengths + out.counts,
                hidden=hidden,
                sampled=state.sampled + out.counts,
                remaining=remaining,
                experts=self._append_experts(state, experts),
            ), out
        return self._append_chunk(state, slots, chunk, hidden, out.counts, out.counts, remaining, experts), out

    def fork(self, state: SamplerState, prompts: SamplerState, source: Array, prng: Array, window: int) -> SamplerState:
        starts, row = source >= 0, jnp.maximum(source, 0)
        return SamplerState(
            cache=self._copy_rows(window)(state.cache, prompts.cache, source),
            lengths=jnp.where(starts, prompts.lengths[row], state.lengths),
            hidden=jnp.where(starts[:, None], prompts.hidden[row], state.hidden),
            prng=jnp.where(starts[:, None], prng, state.prng),
            sampled=jnp.where(starts, 0, state.sampled),
            remaining=jnp.where(starts, 0, state.remaining),
            experts=copy_experts(state.experts, prompts.experts, source, window),
        )

    def read_experts(self, state: SamplerState, slot: Array) -> Array:
        """The record of one slot [T,L·k], on every device."""
        assert state.experts is not None
        is_slot = (jnp.arange(state.experts.shape[0]) == slot)[:, None, None]
        return jnp.sum(jnp.where(is_slot, state.experts, 0), axis=0, dtype=state.experts.dtype)

    def copy_prefix(self, state: SamplerState, source: Array, keep: Array, window: int) -> SamplerState:
        axes = (self._state_axes, ("slots",), ("slots",))
        return self._over_slots(partial(copy_prefix, length=window), axes, axes[0])(state, source, keep)

    def _over_slots(self, function: Callable[..., Any], in_axes: tuple[Any, ...], out_axes: Any) -> Any:
        """`function` under `shard_map`: each device runs it on its own slots, without communication."""
        if self._mesh is None:
            return function
        mesh = self._mesh
        specs = lambda axes: jax.tree.map(lambda sharding: sharding.spec, shardings(mesh, axes, DECODE))
        return jax.shard_map(function, mesh=mesh, in_specs=specs(in_axes), out_specs=specs(out_axes))

    def _gather_slots(self, state: SamplerState, slots: Array | None, window: int) -> SamplerState:
        """A state of the given slots; None means all."""
        if slots is None:
            return state
        axes = (replace(self._state_axes, experts=None), ("slots",))
        gather = self._over_slots(partial(gather_slots, window=window), axes, axes[0])
        return gather(replace(state, experts=None), slots)

    def _append_chunk(
        self,
        state: SamplerState,
        slots: Array | None,
        chunk: Sequence[KVChunk],
        hidden: Array,
        counts: Array,
        sampled: Array,
        remaining: Array,
        experts: Array | None = None,
    ) -> SamplerState:
        """`append_chunk` on each device's slots."""
        chosen = () if slots is None else (slots,)
        record = None
        if experts is not None and state.experts is not None:
            record = experts.reshape(*experts.shape[:2], -1)
        axes = (
            self._state_axes,
            kv_cache.chunk_axes(self._policy.config.num_layers),
            ("slots", None),
            *[("slots",)] * 3,
            None if record is None else EXPERT_AXES,
            *[("slots",)] * len(chosen),
        )
        append = self._over_slots(append_chunk, axes, self._state_axes)
        return append(state, chunk, hidden, counts, sampled, remaining, record, *chosen)

    def _append_experts(self, state: SamplerState, experts: Array | None) -> Array | None:
        """`append_experts` on each device's slots."""
        if experts is None:
            return state.experts
        axes = (EXPERT_AXES, EXPERT_AXES, ("slots",))
        return self._over_slots(append_experts, axes, EXPERT_AXES)(state.experts, experts, state.lengths)

    def _copy_rows(self, window: int) -> Callable[[KVCache, KVCache, Array], KVCache]:
        axes = self._state_axes.cache
        copy = partial(kv_cache.copy_rows, length=window)
        return self._over_slots(copy, (axes, kv_cache.replicated_axes(axes), ("slots",)), axes)
