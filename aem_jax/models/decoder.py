"""The decoder in Flax NNX: the layers of `block.py`, between the embedding and the head.

Two passes use the same weights: `hidden` takes packed rows (learning), `extend` takes a chunk of new tokens with a KV
cache (sampling). For learning, layers are stacked and scanned. For sampling, each layer has arrays of its own and the
layers are unrolled: a scan copies each layer's weights and cache out of the stacks at every token. `extend` only reads
the cache and returns the keys and values of the chunk, which the caller appends once per chunk. So a decode step copies
no cache, whatever its size.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from aem_jax.models import kv_cache
from aem_jax.models.attention import RowAttention, row_attention
from aem_jax.models.block import GATED, Block, norm_of
from aem_jax.models.config import ModelConfig
from aem_jax.models.decode_attention import Attend, attend_chunked
from aem_jax.models.experts import Experts, Load, load_of, make_experts
from aem_jax.models.kv_cache import KVCache, KVChunk, LayerCache
from aem_jax.models.lora import Adapter, LoraConfig
from aem_jax.models.rotary import rotary_tables

Array = jax.Array


FEW_LAYERS = 8
"""If weights are stacked (an adapter beside frozen weights), decoders of at most this many layers slice them once a
chunk. Deeper decoders slice a layer at every token, which costs a copy of it, but no memory for all layers."""

Constrain = Callable[[Array], Array]
"""Returns its argument with a sharding constraint."""

WINDOWS = "attention_of_windows"
"""Name in compiled programs of the choice between the attentions of layers with different sliding windows."""


class LayerInput(NamedTuple):
    """What `Decoder.extend` reads of one layer.

    Attributes:
        weights: index of the token -> the state of the layer's `Block`.
        cache: keys and values of earlier tokens.
        sliding_window: the layer's; 0 for none.
        rope: index in the rotary tables.
    """

    weights: Callable[[Array], Any]
    cache: LayerCache
    sliding_window: int
    rope: int


def _kinds(of_layers: Sequence[Any]) -> list[Any]:
    """The different values of a property of layers, in order of their first layer."""
    return list(dict.fromkeys(of_layers))


def window_shares(config: ModelConfig) -> list[float]:
    """Share of the layers that take each branch of the choice between attentions (`WINDOWS`)."""
    return [config.windows.count(size) / config.num_layers for size in _kinds(config.windows)]


def _kind_of_layers(of_layers: Sequence[Any]) -> Array | None:
    """i32[L], the index in `_kinds` of each layer's value; None if all layers have the same."""
    kinds = _kinds(of_layers)
    return jnp.asarray([kinds.index(value) for value in of_layers], jnp.int32) if len(kinds) > 1 else None


class Decoder(nnx.Module):
    """Embedding, stacked blocks, final norm, head."""

    def __init__(
        self,
        config: ModelConfig,
        params: Mapping[str, Any],
        *,
        int8: bool = False,
        adapter: Adapter | None = None,
        lora: LoraConfig | None = None,
        experts: Experts | None = None,
    ) -> None:
        self.experts: Experts = experts or make_experts(GATED[config.activation], None)
        self.embed: nnx.Param[Array] = nnx.Param(params["embed"])
        layers = params["layers"]
        self.by_layer: bool = isinstance(layers, list)  # the layout of sampling; see `Policy.by_layer`
        self.layers: Any = (
            nnx.List([Block(config, weights, int8=int8) for weights in layers])
            if self.by_layer
            else Block(config, layers, int8=int8, adapter=adapter, lora=lora)
        )
        self.norm: nnx.Param[Array] = nnx.Param(params["norm"])
        if not config.tied_head:
            self.head: nnx.Param[Array] = nnx.Param(params["head"])
        self.config: ModelConfig = config

    def _embed(self, tokens: Array) -> Array:
        embedded = jnp.take(self.embed[...], tokens, axis=0).astype(self.config.dtype)
        if not self.config.scaled_embedding:
            return embedded
        return embedded * jnp.asarray(self.config.hidden_size**0.5, embedded.dtype)

    def _rotary_tables(self, positions: Array) -> list[tuple[Array, Array]]:
        """cos and sin of each kind of rotary positions that layers have."""
        return [rotary_tables(positions, self.config.head_dim, rope) for rope in _kinds(self.config.ropes)]

    def hidden(
        self,
        tokens: Array,
        positions: Array,
        segment_ids: Array,
        remat: Callable | None = None,
        constrain: Constrain | None = None,
        attention: RowAttention = row_attention,
        recorded: Array | None = None,
    ) -> tuple[Array, Load | None]:
        """Hidden states of packed rows.

        Args:
            tokens: i32[B,T].
            positions: i32[B,T], position inside its segment.
            segment_ids: i32[B,T], 0 for padding; a token attends to its segment up to itself.
            remat: a `jax.checkpoint_policies` policy, or None to keep every activation.
            constrain: constrains the sharding of the residual stream [B,T,D]; None leaves it to the partitioner.
            attention: of the rows; `kernels.make_row_attention` makes a device's.
            recorded: integers [B,T,L·k], experts to take instead of the most likely ones; of a mixture.

        Returns:
            [B,T,D] after the final norm, and the experts' load if there are experts.
        """
        config, constrain = self.config, constrain or (lambda x: x)
        tables, windows = self._rotary_tables(positions), _kinds(config.windows)
        stacked_tables = jax.tree.map(lambda *kinds: jnp.stack(kinds), *tables) if len(tables) > 1 else None
        attends = [partial(attention, sliding_window=size) if size else attention for size in windows]
        graphdef, stacked = nnx.split(self.layers)

        mixture, given = config.mixture, recorded is not None
        by_layer = None
        if recorded is not None:
            by_layer = jnp.moveaxis(recorded.reshape(*tokens.shape, config.num_layers, -1), 2, 0)

        def layer(x: Array, scanned: tuple[Any, Array | None, Array | None, Array | None]) -> tuple[Array, Load | None]:
            state, rope, window, experts = scanned
            block = nnx.merge(graphdef, state)
            table = lambda kinds: jax.lax.dynamic_index_in_dim(kinds, rope, keepdims=False)
            cos, sin = tables[0] if rope is None else jax.tree.map(table, stacked_tables)
            q, k, v = block.project_qkv(x, cos, sin)
            if window is None:
                attended = attends[0](q, k, v, segment_ids)
            else:
                with jax.named_scope(WINDOWS):
                    attended = jax.lax.switch(window, attends, q, k, v, segment_ids)
            x = block.output(x, attended)
            if mixture is None:
                return constrain(block.mlp(x, split_gate_up=True)), None
            valid = segment_ids > 0
            x, routing = block.mixture(x, self.experts, experts, valid)
            return constrain(x), load_of(routing, valid, mixture, given=given)

        body = layer if remat is None else jax.checkpoint(layer, policy=remat)
        x, load = jax.lax.scan(
            body,
            constrain(self._embed(tokens)),
            (stacked, _kind_of_layers(config.ropes), _kind_of_layers(config.windows), by_layer),
        )
        if load is not None:
            totals = {"flips": jnp.sum(load.flips), "choices": jnp.sum(load.choices)}
            load = load._replace(**totals, tokens=load.tokens[0])
        return norm_of(config, self.norm[...], x), load

    def with_cache(self, cache: KVCache, window: int) -> list[LayerInput]:
        """What `extend` reads of each layer; of the cache, the first `window` (static) positions."""
        ropes, kinds = self.config.ropes, _kinds(self.config.ropes)
        return [
            LayerInput(self._layer_weights(i), layer_cache, self.config.windows[i], kinds.index(ropes[i]))
            for i, layer_cache in enumerate(kv_cache.window(cache, window).layers)
        ]

    def _layer_weights(self, layer: int) -> Callable[[Array], Any]:
        """index of a token -> weights of a layer."""
        if self.by_layer:
            state = nnx.state(self.layers[layer])
            return lambda index: state
        stacked = nnx.state(self.layers)
        if self.config.num_layers <= FEW_LAYERS:
            state = jax.tree.map(lambda leaf: leaf[layer], stacked)
            return lambda index: state
        # The index never changes the slice, but XLA does not know that. Else it would slice all layers before the loop
        # over tokens: a copy of the model.
        return lambda index: jax.tree.map(
            lambda leaf: jax.lax.dynamic_index_in_dim(leaf, layer + jnp.minimum(index, 0), keepdims=False), stacked
        )

    def empty_chunk(self, slots: int, length: int) -> tuple[KVChunk, ...]:
        """Chunks of all layers, for `length` tokens, in which nothing is written yet."""
        return kv_cache.init_chunk(self.config, slots, length)

    def extend(
        self,
        layers: Sequence[LayerInput],
        tokens: Array,
        positions: Array,
        lengths: Array,
        chunks: Sequence[Any],
        index: Array,
        attend: Attend = attend_chunked,
    ) -> tuple[Array, tuple[Any, ...], Array | None]:
        """Hidden states of C new tokens a slot, which attend to the cache and to earlier tokens of the chunk.

        Args:
            layers: from `with_cache`.
            tokens: i32[S,C].
            positions: i32[S,C].
            lengths: i32[S], cached tokens of each slot.
            chunks: keys and values of this chunk, filled up to `index`; from `empty_chunk` or the previous step.
            index: i32 scalar, position of the C tokens in the chunk.
            attend: attention of the new tokens to the cache and to the chunk.

        Returns:
            hidden [S,C,D] after the final norm, the chunks with the new tokens' keys and values, and of a mixture the
            tokens' experts, integers [S,C,L,k].
        """
        tables = self._rotary_tables(positions)
        graphdef = nnx.graphdef(self.layers[0] if self.by_layer else self.layers)
        mixture = self.config.mixture
        x, written, experts = self._embed(tokens), [], []
        for layer, chunk in zip(layers, chunks, strict=True):
            block = nnx.merge(graphdef, layer.weights(index))
            q, k, v = block.project_qkv(x, *tables[layer.rope])
            windowed = partial(attend, sliding_window=layer.sliding_window) if layer.sliding_window else attend
            attended, chunk = windowed(q, k, v, layer.cache, lengths, chunk, index)
            x = block.output(x, attended)
            if mixture is None:
                x = block.mlp(x)
            else:
                x, routing = block.mixture(x, self.experts)
                experts.append(routing.experts.astype(mixture.record_dtype))
            written.append(chunk)
        record = jnp.stack(experts, axis=2) if experts else None
        return norm_of(self.config, self.norm[...], x), tuple(written), record

    def logits(self, hidden: Array) -> Array:
        """float32 logits [..., V] of hidden states [..., D], without rounding to the activations' dtype in between.

        A tied head is read as the embedding has it, [V, D]: its transpose would be a copy on CPUs.
        """
        tied = self.config.tied_head
        weights = (self.embed if tied else self.head)[...].astype(self.config.dtype)
        equation = "...d,vd->...v" if tied else "...d,dv->...v"
        return jnp.einsum(equation, hidden, weights, preferred_element_type=jnp.float32)
