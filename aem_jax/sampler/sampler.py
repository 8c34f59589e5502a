"""Slots that hear and speak: `extend` a slot with tokens, `decode` a chunk, `fork` a prompt to the slots of its group.

A slot is a row of the KV cache. Its cache holds every token of its episode, heard or said; `hidden` is the state after
the last of them, from which the next one is drawn. Decoding writes to a small chunk beside the cache, merged once at
the end: the cache is never copied, and a slot that has finished costs nothing but its row. What an episode samples
depends on its own key and its own tokens alone: key, folded with the index of the sampled token.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from aem_jax.models import Params, Policy
from aem_jax.sampler.draw import SamplingConfig, make_draw
from aem_jax.sharding import DECODE, replicated, shardings

Array = jax.Array
HostArray = jax.Array | np.ndarray
"""What comes from the host: numpy will do."""


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["keys", "values", "lengths", "hidden", "prng", "sampled"],
    meta_fields=[],
)
@dataclass(frozen=True)
class SamplerState:
    """What S slots remember.

    Attributes:
        keys: [L,S,KV,T,Dh], rotated keys.
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


_STATE_AXES = SamplerState(
    keys=("layers", "slots", "kv_heads", "length", "head_dim"),  # pyright: ignore[reportArgumentType]
    values=("layers", "slots", "kv_heads", "length", "head_dim"),  # pyright: ignore[reportArgumentType]
    lengths=("slots",),  # pyright: ignore[reportArgumentType]
    hidden=("slots", None),  # pyright: ignore[reportArgumentType]
    prng=("slots", None),  # pyright: ignore[reportArgumentType]
    sampled=("slots",),  # pyright: ignore[reportArgumentType]
)


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
        policy: Policy,
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
        placed = None if mesh is None else shardings(mesh, _STATE_AXES, DECODE)
        said = None if mesh is None else (placed, replicated(mesh))
        self._init = jax.jit(self._init_impl, static_argnums=(0, 1), out_shardings=placed)
        self._extend = jax.jit(self._extend_impl, static_argnames="window", donate_argnums=1, out_shardings=placed)
        self._decode = jax.jit(
            self._decode_impl, static_argnames=("num_tokens", "window"), donate_argnums=1, out_shardings=said
        )
        self._fork = jax.jit(_fork_impl, static_argnames="window", donate_argnums=0, out_shardings=placed)
        self._rewind = jax.jit(_rewind_impl, donate_argnums=0, out_shardings=placed)

    @property
    def compilations(self) -> int:
        """How many programs were compiled so far; flat after warm-up."""
        programs: tuple[Any, ...] = (self._extend, self._decode, self._fork, self._rewind)
        return sum(program._cache_size() for program in programs)

    def init(self, slots: int, capacity: int | None = None) -> SamplerState:
        """Empty slots; `capacity` tokens each (the sampler's own by default)."""
        capacity = capacity or self.capacity
        if self._mesh is not None:
            shapes = jax.eval_shape(lambda: self._init_impl(slots, capacity))
            shardings(self._mesh, _STATE_AXES, DECODE, shapes)  # says which dimension doesn't divide
        return self._init(slots, capacity)

    def _init_impl(self, slots: int, capacity: int) -> SamplerState:
        c = self.policy.config
        shape = (c.num_layers, slots, c.num_kv_heads, capacity + self.slack, c.head_dim)
        return SamplerState(
            keys=jnp.zeros(shape, c.dtype),
            values=jnp.zeros(shape, c.dtype),
            lengths=jnp.zeros(slots, jnp.int32),
            hidden=jnp.zeros((slots, c.hidden_size), c.dtype),
            prng=jnp.zeros((slots, 2), jnp.uint32),
            sampled=jnp.zeros(slots, jnp.int32),
        )

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
        window = min(self._check_window(window), prompts.keys.shape[3])
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
        chunk = tokens.shape[1]
        positions = state.lengths[:, None] + jnp.arange(chunk)[None]
        empty = _empty_chunk(state, chunk)
        cache = (state.keys[..., :window, :], state.values[..., :window, :])
        hidden, (keys, values) = self.policy.bind(params).extend(
            tokens, positions, cache, state.lengths, empty, jnp.int32(0)
        )
        last = jnp.take_along_axis(hidden, jnp.maximum(counts - 1, 0)[:, None, None], axis=1)[:, 0]
        return SamplerState(
            keys=_merge(state.keys, keys, state.lengths),
            values=_merge(state.values, values, state.lengths),
            lengths=state.lengths + counts,
            hidden=jnp.where((counts > 0)[:, None], last, state.hidden),
            prng=state.prng,
            sampled=state.sampled,
        )

    def _decode_impl(
        self, params: Params, state: SamplerState, budgets: Array, num_tokens: int, window: int
    ) -> tuple[SamplerState, Decoded]:
        decoder = self.policy.bind(params)
        slots = budgets.shape[0]
        cache = (state.keys[..., :window, :], state.values[..., :window, :])
        budgets = jnp.minimum(budgets, num_tokens)
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
            keys = jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(state.prng), state.sampled + index)
            tokens, logprobs, entropies = self._draw(decoder.logits(hidden), keys)
            put = lambda rows, new: rows.at[:, index].set(jnp.where(active, new, 0))  # noqa: E731
            out = Decoded(
                tokens=put(out.tokens, tokens),
                logprobs=put(out.logprobs, logprobs),
                entropies=put(out.entropies, entropies),
                counts=out.counts + active,
                finished=out.finished | (active & jnp.any(tokens[:, None] == self._stop_ids[None], axis=-1)),
            )
            positions = (state.lengths + index)[:, None]
            new, chunk = decoder.extend(tokens[:, None], positions, cache, state.lengths, chunk, index)
            return index + 1, jnp.where(active[:, None], new[:, 0], hidden), chunk, out

        carry = (jnp.int32(0), state.hidden, _empty_chunk(state, num_tokens), out)
        _, hidden, (keys, values), out = jax.lax.while_loop(going, step, carry)
        state = SamplerState(
            keys=_merge(state.keys, keys, state.lengths),
            values=_merge(state.values, values, state.lengths),
            lengths=state.lengths + out.counts,
            hidden=hidden,
            prng=state.prng,
            sampled=state.sampled + out.counts,
        )
        return state, out


def _fork_impl(state: SamplerState, prompts: SamplerState, source: Array, prng: Array, window: int) -> SamplerState:
    starts = source >= 0
    row = jnp.maximum(source, 0)

    def copy(into: Array, rows: Array) -> Array:
        old = into[..., :window, :]
        new = jnp.take(rows[..., :window, :], row, axis=1)
        chosen = jnp.where(starts[None, :, None, None, None], new, old)
        return jax.lax.dynamic_update_slice(into, chosen, (0,) * into.ndim)

    return SamplerState(
        keys=copy(state.keys, prompts.keys),
        values=copy(state.values, prompts.values),
        lengths=jnp.where(starts, prompts.lengths[row], state.lengths),
        hidden=jnp.where(starts[:, None], prompts.hidden[row], state.hidden),
        prng=jnp.where(starts[:, None], prng, state.prng),
        sampled=jnp.where(starts, 0, state.sampled),
    )


def _rewind_impl(state: SamplerState, keep: Array) -> SamplerState:
    return replace(state, lengths=jnp.minimum(state.lengths, keep))


def _empty_chunk(state: SamplerState, places: int) -> tuple[Array, Array]:
    layers, slots, kv_heads, _, head_dim = state.keys.shape
    empty = jnp.zeros((layers, slots, kv_heads, places, head_dim), state.keys.dtype)
    return empty, empty


def _merge(cache: Array, chunk: Array, lengths: Array) -> Array:
    """Writes each slot's chunk [L,KV,G,Dh] behind its cached tokens. What lies past its end is overwritten later."""
    write = lambda rows, new, at: jax.lax.dynamic_update_slice(rows, new, (0, 0, at, 0))  # noqa: E731
    return jax.vmap(write, in_axes=(1, 1, 0), out_axes=1)(cache, chunk, lengths)
