"""The slot sampler: `extend` slots with tokens, `decode` a chunk of tokens, `fork` a prompt to the slots of its group.

A slot is a row of the KV cache, which holds every token of its episode. `hidden` is the hidden state after the last of
them, which predicts the next. Decoding writes to a small chunk that is appended once at the end: the cache is never
copied. Each token is sampled with the episode's key, folded with the token's index, so an episode depends on its own
key and tokens alone.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from aem_jax.models import Params, Policy, kv_cache
from aem_jax.models.decode_attention import CHUNKED, DecodeAttention, make_decode_attention
from aem_jax.sampler.programs import Decoded, Programs
from aem_jax.sampler.sampling import SamplingConfig, make_sample_token
from aem_jax.sampler.state import SamplerState, init_state, restart, rewind, state_axes
from aem_jax.sharding import DECODE, ordered, replicated, shardings, slot_shards

log = logging.getLogger(__name__)

Array = jax.Array
KERNEL_POSITIONS = 128
"""Kernels read positions in tiles; the cache's length is a multiple of this number. A TPU's memory is padded to it."""
HostArray = jax.Array | np.ndarray
"""An argument from the host."""


class Sampler:
    """The jitted functions of one policy, sampling configuration and set of stop ids.

    Args:
        policy: the decoder.
        sampling: distribution of the tokens, dtype of the cache, and attention of decode.
        stop_ids: ids that end a response.
        capacity: most tokens of an episode; the cache has `slack` more positions, so that a chunk always fits.
        slack: largest chunk of one call (extend or decode).
        windows: context lengths to attend over; each call takes the smallest that covers its longest slot.
        mesh: splits slots and heads; None keeps everything on the parameters' device.
        grows: whether slots only grow, until they are emptied or forked to: `rewind` takes back at most the last chunk.
            Then layers with a sliding window hold no more than the window and two chunks.
        attention: of decode; by default that of `sampling` and of the mesh's devices.
        records_experts: whether a state records the experts of each token, for `read_experts`; the policy then has a
            mixture of experts.
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
        grows: bool = False,
        attention: DecodeAttention | None = None,
        records_experts: bool = False,
    ) -> None:
        if not stop_ids:
            raise ValueError("expected at least one stop id, got none; a response could never end by itself")
        if capacity > (longest := policy.config.longest_context):
            log.warning(
                "expected a context of at most %d tokens, which the model was trained for, got %d; after that many "
                "tokens of an episode its answers may be worthless",
                longest,
                capacity,
            )
        self.policy = policy
        self.capacity = capacity
        self.slack = slack
        self.windows: tuple[int, ...] = tuple(sorted({w for w in windows if w < capacity} | {capacity}))
        self._mesh = mesh
        self._int8 = sampling.cache == "int8"
        rings = kv_cache.ring_layers(policy.config, enabled=grows)
        self._has_rings, self._ring_slack = any(rings), slack if grows else None
        self._axes = state_axes(rings, int8=self._int8, records_experts=records_experts)
        self.records_experts: bool = records_experts
        if attention is None:
            own = make_decode_attention(policy.config, mesh, int8=self._int8)
            attention = own if sampling.attention == "auto" else CHUNKED
        self._attention = attention
        constrain = lambda x: x
        if mesh is not None:
            where = shardings(mesh, ("slots", None), DECODE)
            constrain = lambda x: jax.lax.with_sharding_constraint(x, where)
        sample_token = make_sample_token(sampling, constrain)
        programs = Programs(policy, sample_token, stop_ids, mesh, self._attention, self._axes)
        # A state keeps its layout from call to call. Decoded tokens are replicated, so that every process has them.
        placed = None if mesh is None else self._layout(mesh)
        decoded = None if mesh is None else (placed, replicated(mesh))
        self._init = jax.jit(self._init_impl, static_argnums=(0, 1), out_shardings=placed)
        self._extend = jax.jit(programs.extend, static_argnames="window", donate_argnums=1, out_shardings=placed)
        self._decode = jax.jit(
            programs.decode, static_argnames=("num_tokens", "window"), donate_argnums=1, out_shardings=decoded
        )
        self._fork = jax.jit(programs.fork, static_argnames="window", donate_argnums=0, out_shardings=placed)
        self._copy_prefix = jax.jit(
            programs.copy_prefix, static_argnames="window", donate_argnums=0, out_shardings=placed
        )
        self._read_experts = jax.jit(programs.read_experts, out_shardings=None if mesh is None else replicated(mesh))
        # A partial of its own: jits of one function share their programs, and `compilations` counts this sampler's.
        self._rewind = jax.jit(partial(rewind), donate_argnums=0, out_shardings=placed)
        self._restart = jax.jit(partial(restart), donate_argnums=0, out_shardings=placed)

    def _layout(self, mesh: Mesh, shapes: SamplerState | None = None) -> Any:
        """Shardings of the state, and the cache's order in memory."""
        where = shardings(mesh, self._axes, DECODE, shapes)
        return replace(where, cache=ordered(self._axes.cache, where.cache, self._attention.order))

    @property
    def is_ragged(self) -> bool:
        """Whether the cost of `decode` follows each slot's length. Then it takes no `slots` and no `window`."""
        return self._attention.follows_lengths

    @property
    def slot_shards(self) -> int:
        """Number of parts into which the mesh splits slots; the number of slots is a multiple of it."""
        return 1 if self._mesh is None else slot_shards(self._mesh)

    @property
    def compilations(self) -> int:
        """Number of programs compiled so far; constant after warm-up."""
        programs: tuple[Any, ...] = (self._extend, self._decode, self._fork)
        programs += (self._copy_prefix, self._rewind, self._restart, self._read_experts)
        return sum(program._cache_size() for program in programs)

    def init(self, slots: int, capacity: int | None = None) -> SamplerState:
        """Empty slots; `capacity` tokens each (the sampler's own by default)."""
        capacity = capacity or self.capacity
        self.abstract(slots, capacity)  # raises if a dimension does not divide
        return self._init(slots, capacity)

    def _init_impl(self, slots: int, capacity: int) -> SamplerState:
        length = capacity + self.slack
        if self.is_ragged:
            length = -(-length // KERNEL_POSITIONS) * KERNEL_POSITIONS
        return init_state(
            self.policy.config,
            slots,
            length,
            int8=self._int8,
            ring_slack=self._ring_slack,
            records_experts=self.records_experts,
        )

    def abstract(self, slots: int, capacity: int | None = None) -> SamplerState:
        """Shapes, dtypes and shardings of the state that `init` returns.

        Raises:
            ValueError: slots or heads do not divide over the mesh.
        """
        shapes = jax.eval_shape(lambda: self._init_impl(slots, capacity or self.capacity))
        if self._mesh is None:
            return shapes
        where = self._layout(self._mesh, shapes)
        struct = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
        return jax.tree.map(struct, shapes, where)

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
        budgets, window = self._from_host(state.lengths.shape[0]), self._decode_window(None, window)
        return self._decode.lower(params, state, budgets, None, num_tokens=num_tokens, window=window)

    def _from_host(self, *shape: int) -> jax.ShapeDtypeStruct:
        sharding = None if self._mesh is None else replicated(self._mesh)
        return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding)

    def window_for(self, length: int) -> int:
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
            slots: i32[n], from `pad_slots`; None means all, in order. The cost grows with n.
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
            budgets: i32[n], most tokens of the response; 0 leaves a slot as it is. `CONTINUE` is what is left
                of the response's budget, and 0 once it has ended: a response can go on before the host knows whether
                it has to.
            num_tokens: static chunk length G.
            slots: i32[n], from `pad_slots`; None means all, in order. The cost grows with n.
            window: static; covers the longest cached length of the slots that decode. Not used if `is_ragged`.

        Raises:
            ValueError: `slots` are given, and the sampler `is_ragged`.
        """
        self._check_chunk(num_tokens)
        window, on_shards = self._decode_window(slots, window), self._on_shards(state, slots)
        return self._decode(params, state, budgets, on_shards, num_tokens=num_tokens, window=window)

    def _decode_window(self, slots: np.ndarray | None, window: int | None) -> int:
        if not self.is_ragged:
            return self._check_window(window)
        if slots is not None:
            raise ValueError(
                f"expected decode on all slots, since its cost follows their lengths, got {len(slots)} of them; pass "
                "slots None, and budget 0 for those that do not decode"
            )
        return self.capacity

    def pad_slots(self, slots: Sequence[int], num_slots: int, sizes: Sequence[int]) -> np.ndarray | None:
        """Pads the slots of a call to one of a few sizes.

        Every device computes the same number of its own slots. So slots are grouped by the shard that they are in, and
        each shard is padded with others, which the caller leaves as they are (count or budget 0).

        Args:
            slots: to compute, all different.
            num_slots: S, of the state.
            sizes: accepted numbers of slots, multiples of `slot_shards`; the smallest that suffices is taken.

        Returns:
            i32[n], different slots that include `slots`, n in `sizes`; None if no size suffices, for a call on all.
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
        """Starts episodes: slot s becomes a copy of row `source[s]` of `prompts` with a new key. `state` is donated.

        Args:
            state: the slots.
            prompts: a state whose rows hold prefilled prompts.
            source: i32[S], row to copy, or -1 to leave the slot as it is.
            prng: u32[S,2], key data of the new episodes.
            window: static; covers the longest prompt.
        """
        window = min(self._check_window(window), prompts.cache.length)
        return self._fork(state, prompts, source, prng, window=window)

    def rewind(self, state: SamplerState, keep: HostArray, sampled: HostArray | None = None) -> SamplerState:
        """Truncates each slot to its first `keep[s]` cached tokens, before an `extend`. `state` is donated.

        Args:
            state: the slots.
            keep: i32[S]; larger than a slot's length leaves it as it is.
            sampled: i32[S], index of the next token in the key's sequence; -1, and by default, as if nothing had been
                truncated.
        """
        return self._rewind(state, keep, np.full(len(keep), -1, np.int32) if sampled is None else sampled)

    def restart(self, state: SamplerState, chosen: HostArray, prng: HostArray, sampled: HostArray) -> SamplerState:
        """Empties slots, so that `extend` can compute episodes under way again. `state` is donated.

        Args:
            state: the slots.
            chosen: bool[S], the slots to empty.
            prng: u32[S,2], key data of their episodes.
            sampled: i32[S], tokens that these have sampled so far: the index of the next one in its key's sequence.
        """
        return self._restart(state, chosen, prng, sampled)

    def copy_prefix(
        self, state: SamplerState, source: np.ndarray, keep: HostArray, *, window: int | None = None
    ) -> SamplerState:
        """Slot s becomes the first `keep[s]` tokens of slot `source[s]`, with its own key. `state` is donated.

        If all tokens of the source are copied, the slot can decode at once. Otherwise an `extend` comes first.

        Args:
            state: the slots.
            source: i32[S], a slot in the same shard that is not copied to itself; -1 truncates slot s as `rewind` does.
            keep: i32[S].
            window: static; covers the copied tokens.

        Raises:
            ValueError: a source is in another shard, or is copied to, or a layer's ring may have lost the prefix.
        """
        if self._has_rings:
            raise ValueError(
                "expected a sampler whose slots have all of their tokens, got one whose layers with a sliding window "
                "hold the last ones alone; make it with grows=False"
            )
        slots, own = np.arange(len(source)), len(source) // self.slot_shards
        copied = source >= 0
        if (source[copied] // own != slots[copied] // own).any() or copied[source[copied]].any():
            raise ValueError(
                f"expected sources in the slot's own shard of {own} slots that are not copied to, got {source.tolist()}"
            )
        local = np.where(copied, source % own, -1).astype(np.int32)
        return self._copy_prefix(state, local, keep, window=self._check_window(window))

    def read_experts(self, state: SamplerState, slot: int) -> Array:
        """The experts of a slot's tokens, integers [T, layers · experts per token]; only the first tokens are valid.

        Args:
            state: the slots, of a sampler that `records_experts`; not donated.
            slot: number of the slot.
        """
        return self._read_experts(state, np.int32(slot))

    def _check_chunk(self, length: int) -> None:
        if length > self.slack:
            raise ValueError(f"expected chunks of at most {self.slack} tokens (the slack), got {length}; raise slack")

    def _check_window(self, window: int | None) -> int:
        return self.capacity if window is None else self.window_for(window) and window

    def _on_shards(self, state: SamplerState, slots: np.ndarray | None) -> np.ndarray | None:
        """Each slot's index within its shard."""
        return None if slots is None else slots % (state.lengths.shape[0] // self.slot_shards)
