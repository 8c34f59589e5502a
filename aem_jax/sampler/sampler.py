"""Slots that hear and speak: `extend` a slot with tokens, `decode` a chunk, `fork` a prompt to the slots of its group.

A slot is a row of the KV cache. Its cache holds every token of its episode, heard or said; `hidden` is the state after
the last of them, from which the next one is drawn. Decoding writes to a small chunk beside the cache, merged once at
the end: the cache is never copied, and a slot that has finished costs nothing but its row. What an episode samples
depends on its own key and its own tokens alone: key, folded with the index of the sampled token.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from aem_jax.models import LoraPolicy, Params, Policy
from aem_jax.sampler.draw import SamplingConfig, make_draw, uniforms
from aem_jax.sampler.state import KEY_AXES, STATE_AXES, VALUE_AXES, SamplerState, copy_rows, merge, rewind
from aem_jax.sharding import DECODE, partition, replicated, shardings, slot_shards

Array = jax.Array
HostArray = jax.Array | np.ndarray
"""What comes from the host: numpy will do."""


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


class Sampler:
    """The jitted functions of one policy, sampling configuration and set of stop ids.

    Args:
        policy: the decoder.
        sampling: temperature, top-k, top-p.
        stop_ids: ids that end a response.
        capacity: most tokens that an episode may hold; the cache has `slack` more so that a chunk always fits.
        slack: largest chunk that is written at once (extend or decode).
        windows: context lengths (ascending) to attend over; each call takes the smallest that covers its longest slot.
        mesh: the mesh over which slots and heads are split; without one, everything lies where the parameters lie.
    """

    def __init__(
        self,
        policy: Policy | LoraPolicy,
        sampling: SamplingConfig,
        stop_ids: Sequence[int],
        *,
        capacity: int,
        slack: int,
        windows: Sequence[int] = (),
        mesh: Mesh | None = None,
    ) -> None:
        if not stop_ids:
            raise ValueError("expected at least one stop id, got none; a response could never end by itself")
        self.policy = policy
        self.capacity = capacity
        self.slack = slack
        self.windows = tuple(sorted({w for w in windows if w < capacity} | {capacity}))
        self._mesh = mesh
        self._draw = make_draw(sampling)
        self._stop_ids = jnp.asarray(sorted(set(stop_ids)), jnp.int32)
        # What a state is placed by on its way in, it keeps on its way out; what was said is whole on every device, for
        # every host.
        placed = None if mesh is None else shardings(mesh, STATE_AXES, DECODE)
        said = None if mesh is None else (placed, replicated(mesh))
        self._init = jax.jit(self._init_impl, static_argnums=(0, 1), out_shardings=placed)
        self._extend = jax.jit(self._extend_impl, static_argnames="window", donate_argnums=1, out_shardings=placed)
        self._decode = jax.jit(
            self._decode_impl, static_argnames=("num_tokens", "window"), donate_argnums=1, out_shardings=said
        )
        self._fork = jax.jit(self._fork_impl, static_argnames="window", donate_argnums=0, out_shardings=placed)
        # A partial of its own: jits of one function share their programs, and `compilations` counts this sampler's.
        self._rewind = jax.jit(partial(rewind), donate_argnums=0, out_shardings=placed)

    @property
    def slot_shards(self) -> int:
        """Into how many parts the mesh splits a state's slots: their number must be a multiple of it."""
        return 1 if self._mesh is None else slot_shards(self._mesh)

    @property
    def compilations(self) -> int:
        """How many programs were compiled so far; flat after warm-up."""
        programs: tuple[Any, ...] = (self._extend, self._decode, self._fork, self._rewind)
        return sum(program._cache_size() for program in programs)

    def init(self, slots: int, capacity: int | None = None) -> SamplerState:
        """Empty slots; `capacity` tokens each (the sampler's own by default)."""
        capacity = capacity or self.capacity
        self.abstract(slots, capacity)  # says which dimension doesn't divide
        return self._init(slots, capacity)

    def _init_impl(self, slots: int, capacity: int) -> SamplerState:
        c = self.policy.config
        shape, length = (c.num_layers, slots, c.num_kv_heads), capacity + self.slack
        return SamplerState(
            keys=jnp.zeros((*shape, c.head_dim, length), c.dtype),
            values=jnp.zeros((*shape, length, c.head_dim), c.dtype),
            lengths=jnp.zeros(slots, jnp.int32),
            hidden=jnp.zeros((slots, c.hidden_size), c.dtype),
            prng=jnp.zeros((slots, 2), jnp.uint32),
            sampled=jnp.zeros(slots, jnp.int32),
        )

    def abstract(self, slots: int, capacity: int | None = None) -> SamplerState:
        """Shapes, dtypes and shardings of what `init` returns, without its numbers.

        Raises:
            ValueError: slots or heads do not divide over the mesh.
        """
        shapes = jax.eval_shape(lambda: self._init_impl(slots, capacity or self.capacity))
        if self._mesh is None:
            return shapes
        where = shardings(self._mesh, STATE_AXES, DECODE, shapes)
        place = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)  # noqa: E731
        return jax.tree.map(place, shapes, where)

    def lower_extend(
        self, params: Params, state: SamplerState, num_tokens: int, *, window: int | None = None
    ) -> jax.stages.Lowered:
        """The program of `extend` by chunks of `num_tokens`, to be compiled; `params` and `state` may be abstract."""
        self._check_chunk(num_tokens)
        slots = state.lengths.shape[0]
        tokens, counts = self._from_host(slots, num_tokens), self._from_host(slots)
        return self._extend.lower(params, state, tokens, counts, window=self._check_window(window))

    def lower_decode(
        self, params: Params, state: SamplerState, num_tokens: int, *, window: int | None = None
    ) -> jax.stages.Lowered:
        """The program of `decode` by chunks of `num_tokens`, to be compiled; `params` and `state` may be abstract."""
        self._check_chunk(num_tokens)
        budgets = self._from_host(state.lengths.shape[0])
        return self._decode.lower(params, state, budgets, num_tokens=num_tokens, window=self._check_window(window))

    def _from_host(self, *shape: int) -> jax.ShapeDtypeStruct:
        whole = None if self._mesh is None else replicated(self._mesh)
        return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=whole)

    def cover(self, length: int) -> int:
        """The smallest window that holds `length` cached tokens."""
        for window in self.windows:
            if length <= window:
                return window
        raise ValueError(f"expected at most {self.capacity} tokens a slot, got {length}; raise the context budget")

    def extend(
        self, params: Params, state: SamplerState, tokens: HostArray, counts: HostArray, *, window: int | None = None
    ) -> SamplerState:
        """Appends `counts[s]` of `tokens` i32[S,C] to each slot. `state` is donated.

        Args:
            params: decode-layout parameters.
            state: the slots.
            tokens: i32[S,C], left-aligned.
            counts: i32[S], 0 leaves a slot as it is.
            window: static; covers the longest cached length of the slots that are extended.
        """
        self._check_chunk(tokens.shape[1])
        return self._extend(params, state, tokens, counts, window=self._check_window(window))

    def decode(
        self, params: Params, state: SamplerState, budgets: HostArray, num_tokens: int, *, window: int | None = None
    ) -> tuple[SamplerState, Decoded]:
        """Samples up to `min(budgets[s], num_tokens)` tokens in each slot, until a stop id. `state` is donated.

        Args:
            params: decode-layout parameters.
            state: the slots; those that decode must have been extended at least once.
            budgets: i32[S]; 0 leaves a slot as it is.
            num_tokens: static chunk length G.
            window: static; covers the longest cached length of the slots that decode.
        """
        self._check_chunk(num_tokens)
        return self._decode(params, state, budgets, num_tokens=num_tokens, window=self._check_window(window))

    def fork(
        self,
        state: SamplerState,
        prompts: SamplerState,
        source: HostArray,
        prng: HostArray,
        *,
        window: int | None = None,
    ) -> SamplerState:
        """Begins episodes: slot s becomes a copy of row `source[s]` of `prompts` with a fresh key. `state` is donated.

        Args:
            state: the slots.
            prompts: rows that hold computed prompts (a state of their own).
            source: i32[S], row to copy, or -1 to leave the slot as it is.
            prng: u32[S,2], key data of the episodes that begin.
            window: static; covers the longest prompt.
        """
        window = min(self._check_window(window), prompts.keys.shape[-1])
        return self._fork(state, prompts, source, prng, window=window)

    def rewind(self, state: SamplerState, keep: HostArray) -> SamplerState:
        """Forgets all but the first `keep[s]` cached tokens of each slot; then comes an `extend`. `state` is donated.

        Args:
            state: the slots.
            keep: i32[S]; larger than a slot's length leaves it as it is.
        """
        return self._rewind(state, keep)

    def _check_chunk(self, places: int) -> None:
        if places > self.slack:
            raise ValueError(f"expected chunks of at most {self.slack} tokens (the slack), got {places}; raise slack")

    def _check_window(self, window: int | None) -> int:
        return self.capacity if window is None else self.cover(window) and window

    def _extend_impl(
        self, params: Params, state: SamplerState, tokens: Array, counts: Array, window: int
    ) -> SamplerState:
        decoder = self.policy.bind(params)
        slots, places = tokens.shape
        hidden, chunk = decoder.extend(
            decoder.beside(state.keys, state.values, window),
            tokens,
            state.lengths[:, None] + jnp.arange(places)[None],
            state.lengths,
            decoder.empty_chunk(slots, places),
            jnp.int32(0),
        )
        last = jnp.take_along_axis(hidden, jnp.maximum(counts - 1, 0)[:, None, None], axis=1)[:, 0]
        last = jnp.where((counts > 0)[:, None], last, state.hidden)
        return self._merge(state, decoder.stacked_chunk(chunk), last, counts, 0)

    def _decode_impl(
        self, params: Params, state: SamplerState, budgets: Array, num_tokens: int, window: int
    ) -> tuple[SamplerState, Decoded]:
        slots = budgets.shape[0]
        budgets = jnp.minimum(budgets, num_tokens)
        # All that does not depend on what is said is done before the loop, whose every step is one token a slot.
        decoder = self.policy.bind(params)
        layers, head = decoder.beside(state.keys, state.values, window), decoder.head_weights()
        random = uniforms(state.prng, state.sampled[:, None] + jnp.arange(num_tokens)[None])
        out = Decoded(
            tokens=jnp.zeros((slots, num_tokens), jnp.int32),
            logprobs=jnp.zeros((slots, num_tokens)),
            entropies=jnp.zeros((slots, num_tokens)),
            counts=jnp.zeros(slots, jnp.int32),
            finished=jnp.zeros(slots, bool),
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
            put = lambda rows, new: rows.at[:, index].set(jnp.where(active, new, 0))  # noqa: E731
            out = Decoded(
                tokens=put(out.tokens, tokens),
                logprobs=put(out.logprobs, logprobs),
                entropies=put(out.entropies, entropies),
                counts=out.counts + active,
                finished=out.finished | (active & jnp.any(tokens[:, None] == self._stop_ids[None], axis=-1)),
            )
            positions = (state.lengths + index)[:, None]
            new, chunk = decoder.extend(layers, tokens[:, None], positions, state.lengths, chunk, index)
            return index + 1, jnp.where(active[:, None], new[:, 0], hidden), chunk, out

        carry = (jnp.int32(0), state.hidden, decoder.empty_chunk(slots, num_tokens), out)
        _, hidden, chunk, out = jax.lax.while_loop(going, step, carry)
        return self._merge(state, decoder.stacked_chunk(chunk), hidden, out.counts, out.counts), out

    def _fork_impl(
        self, state: SamplerState, prompts: SamplerState, source: Array, prng: Array, window: int
    ) -> SamplerState:
        starts, row = source >= 0, jnp.maximum(source, 0)
        keys, values = self._copy_rows(window)(state.keys, state.values, prompts.keys, prompts.values, source)
        return SamplerState(
            keys=keys,
            values=values,
            lengths=jnp.where(starts, prompts.lengths[row], state.lengths),
            hidden=jnp.where(starts[:, None], prompts.hidden[row], state.hidden),
            prng=jnp.where(starts[:, None], prng, state.prng),
            sampled=jnp.where(starts, 0, state.sampled),
        )

    def _over_slots(self, function: Callable[..., Any], in_axes: tuple[Any, ...], out_axes: tuple[Any, ...]) -> Any:
        """Runs `function` on each device's own slots; its loop over slots then stays on the device."""
        if self._mesh is None:
            return function
        specs = lambda axes: tuple(partition(names, DECODE) for names in axes)  # noqa: E731
        return jax.shard_map(function, mesh=self._mesh, in_specs=specs(in_axes), out_specs=specs(out_axes))

    def _merge(
        self, state: SamplerState, chunk: tuple[Array, Array], hidden: Array, counts: Array, sampled: Array | int
    ) -> SamplerState:
        """The state with a chunk behind its cache, of which each slot keeps `counts` tokens."""
        cache = (KEY_AXES, VALUE_AXES, ("slots", None))
        merge_slots = self._over_slots(merge, (*cache, ("slots",), *cache), cache)
        keys, values, hidden = merge_slots(state.keys, state.values, state.hidden, state.lengths, *chunk, hidden)
        lengths = state.lengths + counts
        return SamplerState(keys, values, lengths, hidden, state.prng, state.sampled + sampled)

    def _copy_rows(self, window: int) -> Callable[..., tuple[Array, Array]]:
        cache = (KEY_AXES, VALUE_AXES)
        whole = tuple(tuple(None if name == "slots" else name for name in axes) for axes in cache)
        return self._over_slots(partial(copy_rows, window=window), (*cache, *whole, ("slots",)), cache)
