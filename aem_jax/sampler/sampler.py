"""Slots that hear and speak: `extend` a slot with tokens, `decode` a chunk, `fork` a prompt to the slots of its group.

A slot is a row of the KV cache. Its cache holds every token of its episode, heard or said; `hidden` is the state after
the last of them, from which the next one is drawn. Decoding writes to a small chunk beside the cache, merged once at
the end: the cache is never copied, and a slot that has finished costs nothing but its row. What an episode samples
depends on its own key and its own tokens alone: key, folded with the index of the sampled token.
"""

from collections.abc import Sequence
from functools import partial
from itertools import islice
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from aem_jax.models import LoraPolicy, Params, Policy
from aem_jax.models.cache import Coded
from aem_jax.sampler.draw import SamplingConfig, make_draw
from aem_jax.sampler.programs import Decoded, Programs
from aem_jax.sampler.state import SamplerState, rewind, state_axes
from aem_jax.sharding import DECODE, replicated, shardings, slot_shards

Array = jax.Array
HostArray = jax.Array | np.ndarray
"""What comes from the host: numpy will do."""


class Sampler:
    """The jitted functions of one policy, sampling configuration and set of stop ids.

    Args:
        policy: the decoder.
        sampling: temperature, top-k, top-p, dtype of the cache.
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
        self._int8 = sampling.cache == "int8"
        self._axes = state_axes(int8=self._int8)
        programs = Programs(policy, make_draw(sampling), stop_ids, mesh, int8=self._int8)
        # What a state is placed by on its way in, it keeps on its way out; what was said is whole on every device, for
        # every host.
        placed = None if mesh is None else shardings(mesh, self._axes, DECODE)
        said = None if mesh is None else (placed, replicated(mesh))
        self._init = jax.jit(self._init_impl, static_argnums=(0, 1), out_shardings=placed)
        self._extend = jax.jit(programs.extend, static_argnames="window", donate_argnums=1, out_shardings=placed)
        self._decode = jax.jit(
            programs.decode, static_argnames=("num_tokens", "window"), donate_argnums=1, out_shardings=said
        )
        self._fork = jax.jit(programs.fork, static_argnames="window", donate_argnums=0, out_shardings=placed)
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
        keys, values = (*shape, c.head_dim, length), (*shape, length, c.head_dim)
        empty = lambda like: jnp.zeros(like, c.dtype)
        if self._int8:
            empty = lambda like: Coded(jnp.zeros(like, jnp.int8), jnp.zeros((*shape, length)))
        return SamplerState(
            keys=empty(keys),
            values=empty(values),
            lengths=jnp.zeros(slots, jnp.int32),
            hidden=jnp.zeros((slots, c.hidden_size), c.dtype),
            prng=jnp.zeros((slots, 2), jnp.uint32),
            sampled=jnp.zeros(slots, jnp.int32),
            remaining=jnp.zeros(slots, jnp.int32),
        )

    def abstract(self, slots: int, capacity: int | None = None) -> SamplerState:
        """Shapes, dtypes and shardings of what `init` returns, without its numbers.

        Raises:
            ValueError: slots or heads do not divide over the mesh.
        """
        shapes = jax.eval_shape(lambda: self._init_impl(slots, capacity or self.capacity))
        if self._mesh is None:
            return shapes
        where = shardings(self._mesh, self._axes, DECODE, shapes)
        place = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
        return jax.tree.map(place, shapes, where)

    def lower_extend(
        self, params: Params, state: SamplerState, num_tokens: int, *, window: int | None = None
    ) -> jax.stages.Lowered:
        """The program of `extend` by chunks of `num_tokens`, to be compiled; `params` and `state` may be abstract."""
        self._check_chunk(num_tokens)
        slots = state.lengths.shape[0]
        tokens, counts = self._from_host(slots, num_tokens), self._from_host(slots)
        return self._extend.lower(params, state, tokens, counts, None, window=self._check_window(window))

    def lower_decode(
        self, params: Params, state: SamplerState, num_tokens: int, *, window: int | None = None
    ) -> jax.stages.Lowered:
        """The program of `decode` by chunks of `num_tokens`, to be compiled; `params` and `state` may be abstract."""
        self._check_chunk(num_tokens)
        budgets, window = self._from_host(state.lengths.shape[0]), self._check_window(window)
        return self._decode.lower(params, state, budgets, None, num_tokens=num_tokens, window=window)

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
        self,
        params: Params,
        state: SamplerState,
        tokens: HostArray,
        counts: HostArray,
        slots: np.ndarray | None = None,
        *,
        window: int | None = None,
    ) -> SamplerState:
        """Appends `counts[i]` of `tokens` i32[n,C] to slot `slots[i]`. `state` is donated.

        Args:
            params: decode-layout parameters.
            state: the slots.
            tokens: i32[n,C], left-aligned.
            counts: i32[n], 0 leaves a slot as it is.
            slots: i32[n], the slots meant, see `place`; None means all in order. What is computed grows with n.
            window: static; covers the longest cached length of the slots that are extended.
        """
        self._check_chunk(tokens.shape[1])
        return self._extend(
            params, state, tokens, counts, self._on_shards(state, slots), window=self._check_window(window)
        )

    def decode(
        self,
        params: Params,
        state: SamplerState,
        budgets: HostArray,
        num_tokens: int,
        slots: np.ndarray | None = None,
        *,
        window: int | None = None,
    ) -> tuple[SamplerState, Decoded]:
        """Samples up to `min(budgets[i], num_tokens)` tokens in slot `slots[i]`, until a stop id. `state` is donated.

        Args:
            params: decode-layout parameters.
            state: the slots; those that decode must have been extended at least once.
            budgets: i32[n], most tokens of the response; 0 leaves a slot as it is. `GO_ON` takes what the calls before
                left of their budget, which is nothing once the response has ended: so a response can go on before
                the host knows whether it has to.
            num_tokens: static chunk length G.
            slots: i32[n], the slots meant, see `place`; None means all in order. What is computed grows with n.
            window: static; covers the longest cached length of the slots that decode.
        """
        self._check_chunk(num_tokens)
        on_shards = self._on_shards(state, slots)
        return self._decode(params, state, budgets, on_shards, num_tokens=num_tokens, window=self._check_window(window))

    def place(self, slots: Sequence[int], num_slots: int, sizes: Sequence[int]) -> np.ndarray | None:
        """Where to put slots in a call on a part of them.

        Every device computes the same number of slots, all of them its own; so the slots of a call are dealt to the
        mesh's parts, and filled up with others, which the caller leaves as they are.

        Args:
            slots: that have something to do, all different.
            num_slots: S, of the state.
            sizes: how many slots a call may have, multiples of `slot_shards`; the smallest that suffices is taken.

        Returns:
            i32[n] of different slots, among them those asked for; n in sizes. None if none of them suffices: then the
            call is on all slots.
        """
        shards = self.slot_shards
        own = num_slots // shards
        parts = [[slot for slot in slots if slot // own == shard] for shard in range(shards)]
        most = max(map(len, parts))
        size = next((size for size in sorted(sizes) if size >= most * shards), None)
        if size is None:
            return None
        for shard, part in enumerate(parts):
            taken = set(part)
            others = (slot for slot in range(shard * own, (shard + 1) * own) if slot not in taken)
            part += islice(others, size // shards - len(part))
        return np.asarray(parts, np.int32).reshape(size)

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
        window = min(self._check_window(window), prompts.places)
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

    def _on_shards(self, state: SamplerState, slots: np.ndarray | None) -> np.ndarray | None:
        """Slots as their own device counts them."""
        return None if slots is None else slots % (state.lengths.shape[0] // self.slot_shards)
