"""What the sampler compiles: traced functions of a policy, a way to draw, and a mesh whose devices own their slots."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from aem_jax.models import LoraPolicy, Params, Policy
from aem_jax.models.cache import Cached
from aem_jax.sampler.draw import Draw, uniforms
from aem_jax.sampler.state import SamplerState, cache_axes, copy_rows, merge, state_axes, take
from aem_jax.sharding import DECODE, partition

Array = jax.Array

GO_ON = -1
"""A budget: what was left of it."""


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["tokens", "logprobs", "entropies", "counts", "finished"],
    meta_fields=[],
)
@dataclass(frozen=True)
class Decoded:
    """What one `decode` said.

    Attributes:
        tokens: i32[S,G].
        logprobs: f32[S,G], nats.
        entropies: f32[S,G], nats.
        counts: i32[S], how many of the G are this slot's.
        finished: bool[S], whether the slot's last token was a stop id.
    """

    tokens: Array
    logprobs: Array
    entropies: Array
    counts: Array
    finished: Array


class Programs:
    """The functions behind a `Sampler`'s, not yet compiled; it says what their arguments are.

    Args:
        policy: the decoder.
        draw: picks tokens.
        stop_ids: ids that end a response.
        mesh: over which slots are split, or None.
        int8: whether keys and values are cached in 8 bits.
    """

    def __init__(
        self, policy: Policy | LoraPolicy, draw: Draw, stop_ids: Sequence[int], mesh: Mesh | None, *, int8: bool
    ) -> None:
        self._policy, self._draw, self._mesh = policy, draw, mesh
        self._state_axes, self._cache_axes = state_axes(int8=int8), cache_axes(int8=int8)
        self._stop_ids = jnp.asarray(sorted(set(stop_ids)), jnp.int32)

    def extend(
        self, params: Params, state: SamplerState, tokens: Array, counts: Array, slots: Array | None, *, window: int
    ) -> SamplerState:
        decoder, part = self._policy.bind(params), self._take(state, slots, window)
        count, places = tokens.shape
        hidden, chunk = decoder.extend(
            decoder.beside(part.keys, part.values, window),
            tokens,
            part.lengths[:, None] + jnp.arange(places)[None],
            part.lengths,
            decoder.empty_chunk(count, places),
            jnp.int32(0),
        )
        last = jnp.take_along_axis(hidden, jnp.maximum(counts - 1, 0)[:, None, None], axis=1)[:, 0]
        last = jnp.where((counts > 0)[:, None], last, part.hidden)
        return self._merge(state, slots, decoder.stacked_chunk(chunk), last, counts, counts * 0, part.remaining)

    def decode(
        self, params: Params, state: SamplerState, budgets: Array, slots: Array | None, *, num_tokens: int, window: int
    ) -> tuple[SamplerState, Decoded]:
        part, count = self._take(state, slots, window), budgets.shape[0]
        left = jnp.where(budgets == GO_ON, part.remaining, budgets)
        remaining, budgets = jnp.where(budgets == 0, part.remaining, left), jnp.minimum(left, num_tokens)
        # All that does not depend on what is said is done before the loop, whose every step is one token a slot.
        decoder = self._policy.bind(params)
        layers, head = decoder.beside(part.keys, part.values, window), decoder.head_weights()
        random = uniforms(part.prng, part.sampled[:, None] + jnp.arange(num_tokens)[None])
        out = Decoded(
            tokens=jnp.zeros((count, num_tokens), jnp.int32),
            logprobs=jnp.zeros((count, num_tokens)),
            entropies=jnp.zeros((count, num_tokens)),
            counts=jnp.zeros(count, jnp.int32),
            finished=jnp.zeros(count, bool),
        )

        def speaking(out: Decoded) -> Array:
            return ~out.finished & (out.counts < budgets)

        def going(carry: tuple[Array, Array, Any, Decoded]) -> Array:
            return jnp.any(speaking(carry[3]))

        def step(carry: tuple[Array, Array, Any, Decoded]) -> tuple[Array, Array, Any, Decoded]:
            index, hidden, chunk, out = carry
            active = speaking(out)
            logits = jnp.matmul(hidden, head, preferred_element_type=jnp.float32)
            tokens, logprobs, entropies = self._draw(
                logits, jax.lax.dynamic_index_in_dim(random, index, keepdims=False)
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
            new, chunk = decoder.extend(layers, tokens[:, None], positions, part.lengths, chunk, index)
            return index + 1, jnp.where(active[:, None], new[:, 0], hidden), chunk, out

        carry = (jnp.int32(0), part.hidden, decoder.empty_chunk(count, num_tokens), out)
        _, hidden, chunk, out = jax.lax.while_loop(going, step, carry)
        remaining = jnp.where(out.finished, 0, remaining - out.counts)
        chunk = decoder.stacked_chunk(chunk)
        return self._merge(state, slots, chunk, hidden, out.counts, out.counts, remaining), out

    def fork(self, state: SamplerState, prompts: SamplerState, source: Array, prng: Array, window: int) -> SamplerState:
        starts, row = source >= 0, jnp.maximum(source, 0)
        keys, values = self._copy_rows(window)(state.keys, state.values, prompts.keys, prompts.values, source)
        return SamplerState(
            keys=keys,
            values=values,
            lengths=jnp.where(starts, prompts.lengths[row], state.lengths),
            hidden=jnp.where(starts[:, None], prompts.hidden[row], state.hidden),
            prng=jnp.where(starts[:, None], prng, state.prng),
            sampled=jnp.where(starts, 0, state.sampled),
            remaining=jnp.where(starts, 0, state.remaining),
        )

    def _over_slots(self, function: Callable[..., Any], in_axes: tuple[Any, ...], out_axes: Any) -> Any:
        """Runs `function` on each device's own slots; its loop over slots then stays on the device."""
        if self._mesh is None:
            return function
        names = lambda axes: isinstance(axes, tuple) and all(each is None or isinstance(each, str) for each in axes)
        specs = lambda axes: jax.tree.map(lambda each: partition(each, DECODE), axes, is_leaf=names)
        return jax.shard_map(function, mesh=self._mesh, in_specs=specs(in_axes), out_specs=specs(out_axes))

    def _take(self, state: SamplerState, slots: Array | None, window: int) -> SamplerState:
        """The slots meant, as a state of their own."""
        if slots is None:
            return state
        axes = (self._state_axes, ("slots",))
        return self._over_slots(partial(take, window=window), axes, axes[0])(state, slots)

    def _merge(
        self,
        state: SamplerState,
        slots: Array | None,
        chunk: tuple[Array, Array],
        hidden: Array,
        counts: Array,
        sampled: Array,
        remaining: Array,
    ) -> SamplerState:
        """The state with a chunk behind its cache; see `merge`."""
        chosen = () if slots is None else (slots,)
        axes = (self._state_axes, cache_axes(int8=False), ("slots", None), *[("slots",)] * (3 + len(chosen)))
        merge_slots = self._over_slots(merge, axes, self._state_axes)
        return merge_slots(state, chunk, hidden, counts, sampled, remaining, *chosen)

    def _copy_rows(self, window: int) -> Callable[..., tuple[Cached, Cached]]:
        cache = self._cache_axes
        whole = jax.tree.map(lambda name: None if name == "slots" else name, cache)
        return self._over_slots(partial(copy_rows, window=window), (*cache, *whole, ("slots",)), cache)
