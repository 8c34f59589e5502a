"""The decoder in Flax NNX.

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
from jax.ad_checkpoint import checkpoint_name

from aem_jax.models import kv_cache
from aem_jax.models.attention import RowAttention, row_attention
from aem_jax.models.config import Activation, ModelConfig, NormPlacement
from aem_jax.models.decode_attention import Attend, attend_chunked
from aem_jax.models.experts import (
    PRODUCT,
    Experts,
    ExpertWeights,
    Load,
    Matrices,
    Routing,
    load_of,
    make_experts,
    route,
)
from aem_jax.models.int8 import scale_of
from aem_jax.models.kv_cache import KVCache, KVChunk, LayerCache
from aem_jax.models.lora import Adapter, Adapters, LoraConfig
from aem_jax.models.parameters import OUTPUT_NORMS
from aem_jax.models.rotary import rotary_tables, rotate

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


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def rms_norm(x: Array, scale: Array, eps: float) -> Array:
    """`x / sqrt(mean(x^2) + eps) * scale` over the last axis, reduced in float32."""
    return _rms_norm_forward(x, scale, eps)[0]


def _rms_norm_forward(x: Array, scale: Array, eps: float) -> tuple[Array, Any]:
    x32 = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return (x32 * inverse * _wide(scale, x)).astype(x.dtype), (x, scale, inverse)


def _rms_norm_backward(eps: float, residuals: Any, cotangent: Array) -> tuple[Array, Array]:
    # With y = x / r: dx = (g·scale − y · mean(g·scale·y)) / r. Autodiff keeps and reads several arrays of x's size.
    x, scale, inverse = residuals
    cotangent = cotangent.astype(jnp.float32)
    normed, scaled = x.astype(jnp.float32) * inverse, cotangent * _wide(scale, x)
    d_x = inverse * (scaled - normed * jnp.mean(scaled * normed, axis=-1, keepdims=True))
    d_scale = jnp.sum(cotangent * normed, axis=tuple(range(x.ndim - 1)))
    return d_x.astype(x.dtype), d_scale.astype(scale.dtype)


rms_norm.defvjp(_rms_norm_forward, _rms_norm_backward)


def _wide(scale: Array, x: Array) -> Array:
    return jnp.expand_dims(scale.astype(jnp.float32), range(x.ndim - 1))


def norm_of(config: ModelConfig, weight: Array, x: Array) -> Array:
    """x with a norm of the model."""
    return rms_norm(x, 1 + weight if config.zero_centered_norms else weight, config.norm_eps)


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


def project(spec: str, x: Array, weights: Array) -> Array:
    """`einsum(spec, x, weights)`.

    The backward pass transposes x for the weight gradient. Autodiff would transpose the usually wider cotangent, and
    compute it twice.
    """
    return checkpoint_name(_project(spec, x, weights), PRODUCT)


def _product(spec: str, a: Array, b: Array) -> Array:
    """`einsum(spec, a, b)` in the dtype of a.

    XLA for CPUs has fast products of bfloat16 with float32 results, also where those with bfloat16 results are slower
    than products of float32 (until jaxlib 0.11). Other devices get the plain product.
    """
    plain = partial(jnp.einsum, spec)
    if a.dtype != jnp.bfloat16:
        return plain(a, b)
    in_float32 = lambda a, b: plain(a, b, preferred_element_type=jnp.float32).astype(a.dtype)
    return jax.lax.platform_dependent(a, b, cpu=in_float32, default=plain)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _project(spec: str, x: Array, weights: Array) -> Array:
    return _product(spec, x, weights)


def _project_backward(spec: str, residuals: tuple[Array, Array], cotangent: Array) -> tuple[Array, Array]:
    x, weights = residuals
    inputs, out = spec.split("->")
    left, right = inputs.split(",")
    d_x = _product(f"{out},{right}->{left}", cotangent, weights)
    return d_x, _product(f"{left},{out}->{right}", x, cotangent)


_project.defvjp(lambda spec, x, weights: (_project(spec, x, weights), (x, weights)), _project_backward)


@jax.custom_vjp
def swiglu(gate: Array, up: Array) -> Array:
    """`silu(gate) * up`, silu(z) = z / (1 + exp(-z))."""
    return jax.nn.silu(gate) * up


def _swiglu_backward(residuals: tuple[Array, Array], cotangent: Array) -> tuple[Array, Array]:
    gate, up = residuals
    share = jax.nn.sigmoid(gate)
    return cotangent * up * share * (1 + gate * (1 - share)), cotangent * gate * share


swiglu.defvjp(lambda gate, up: (swiglu(gate, up), (gate, up)), _swiglu_backward)


def geglu(gate: Array, up: Array) -> Array:
    """`gelu(gate) * up`, gelu in its tanh approximation."""
    return jax.nn.gelu(gate, approximate=True) * up


GATED: Mapping[Activation, Callable[[Array, Array], Array]] = {"silu": swiglu, "gelu_tanh": geglu}
"""`ModelConfig.activation` -> the MLP's product of gate and up."""


def _without_adapter(name: str, x: Array, y: Array) -> Array:
    """y: the output of a projection of x that has no adapter."""
    return y


class Block(nnx.Module):
    """The weights of all layers, stacked on a leading axis; the methods see one layer's slice.

    `parameters.py` lists the weights. With `adapter` the projections have adapters; with `int8` matrices are codes, and
    `scale_of(name)` names the scales of each.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, Array],
        *,
        int8: bool = False,
        adapter: Adapter | None = None,
        lora: LoraConfig | None = None,
    ) -> None:
        for name, array in weights.items():
            setattr(self, name, nnx.Param(array))
        self.adapters: Adapters | None = Adapters(adapter, lora) if adapter and lora else None
        self.config: ModelConfig = config
        self.int8: bool = int8

    def _weight(self, name: str) -> Array:
        return getattr(self, name)[...]

    def _norm(self, name: str, x: Array) -> Array:
        return norm_of(self.config, self._weight(name), x)

    def _norm_at(self, placement: NormPlacement, name: str, x: Array) -> Array:
        """x, normalised if the model's norms are placed there."""
        of_model = self.config.norm_placement
        if of_model == "both":
            return self._norm(name if placement == "pre" else OUTPUT_NORMS[name], x)
        return self._norm(name, x) if of_model == placement else x

    def _qk_norm(self, name: str, x: Array) -> Array:
        """Queries or keys [B,T,H,Dh], normalised by head, or all heads of a token together."""
        rows = x if self.config.qk_norm == "head" else x.reshape(*x.shape[:2], -1)
        return jnp.reshape(self._norm(name, rows), x.shape)

    def _project(self, equation: str, name: str, x: Array) -> Array:
        """x [B,T,*inputs] times one layer's matrix [*inputs,*outputs]."""
        weights = self._weight(name).astype(x.dtype)
        if not self.int8:
            return project(equation, x, weights)
        y = jnp.einsum(equation, x, weights, preferred_element_type=jnp.float32)
        return (y * self._weight(scale_of(name))[None, None]).astype(x.dtype)

    def project_qkv(self, x: Array, cos: Array, sin: Array) -> tuple[Array, Array, Array]:
        """Rotated queries [B,T,H,Dh], keys and values [B,T,KV,Dh] of x [B,T,D]."""
        config = self.config
        x = self._norm_at("pre", "attention_norm", x)
        groups = self._project("btd,dkgh->btkgh", "qkv", x)
        if config.qkv_bias:
            groups = groups + self._weight("qkv_bias").astype(x.dtype)[None, None]
        queries = groups.shape[-2] - 2
        parts = jnp.split(groups, (queries, queries + 1), axis=-2)
        add = self.adapters.add if self.adapters else _without_adapter
        parts = [add(name, x, part) for name, part in zip(("q_proj", "k_proj", "v_proj"), parts, strict=True)]
        q, k, v = (part.reshape(*x.shape[:2], -1, part.shape[-1]) for part in parts)
        if config.qk_norm:
            q, k = self._qk_norm("q_norm", q), self._qk_norm("k_norm", k)
        k = rotate(k, cos, sin)
        if config.score_dim not in (None, config.head_dim):
            # Attention divides by √head_dim. The rest is a factor of the rotation, so that queries are rounded once.
            scale = (config.head_dim / config.score_dim) ** 0.5
            cos, sin = cos * scale, sin * scale
        return rotate(q, cos, sin), k, v

    def output(self, x: Array, attended: Array) -> Array:
        """Output projection of attention, with its residual."""
        add = self.adapters.add if self.adapters else _without_adapter
        y: Any = add("o_proj", attended, self._project("bthk,hkd->btd", "o", attended))
        return x + self._norm_at("post", "attention_norm", y)

    def mixture(
        self, x: Array, experts: Experts, recorded: Array | None = None, valid: Array | None = None
    ) -> tuple[Array, Routing]:
        """The mixture of experts, with its residual.

        Args:
            x: [B,T,D].
            experts: their products.
            recorded: integers [B,T,k], experts to take instead of the most likely ones.
            valid: bool[B,T], tokens that count; the output of others is 0. None for all.

        Returns:
            [B,T,D], and the tokens' experts.
        """
        assert self.config.mixture is not None
        y = self._norm_at("pre", "mlp_norm", x)
        routing = route(y, self._weight("router"), self.config.mixture, recorded)
        y = experts(y, routing, valid, ExpertWeights(*(self._experts(name) for name in ("gate", "up", "down"))))
        return x + self._norm_at("post", "mlp_norm", y), routing

    def _experts(self, part: str) -> Matrices:
        name = f"experts_{part}"
        scales = self._weight(scale_of(name)) if self.int8 else None
        adapter = self.adapters.of_experts(f"{part}_proj") if self.adapters else None
        return Matrices(self._weight(name), scales, *(adapter or ()))

    def mlp(self, x: Array, *, split_gate_up: bool = False) -> Array:
        """The MLP, with its residual.

        `split_gate_up` computes gate and up as two products: one more to start, but the backward pass concatenates
        nothing.
        """
        add = self.adapters.add if self.adapters else _without_adapter
        y: Any = self._norm_at("pre", "mlp_norm", x)
        if split_gate_up and not self.int8:
            # Without an axis of size 1, each is gathered once for both of its products backward. XLA for GPUs gathers
            # it twice otherwise.
            halves = jnp.split(self._weight("gate_up").astype(y.dtype), 2, axis=-2)
            parts = [jnp.expand_dims(project("btd,df->btf", y, jnp.squeeze(half, -2)), -2) for half in halves]
        else:
            parts = jnp.split(self._project("btd,dgf->btgf", "gate_up", y), 2, axis=-2)
        names = ("gate_proj", "up_proj")
        gate, up = (jnp.squeeze(add(name, y, part), -2) for name, part in zip(names, parts, strict=True))
        y = GATED[self.config.activation](gate, up)
        y = add("down_proj", y, self._project("btf,fd->btd", "down", y))
        return x + self._norm_at("post", "mlp_norm", y)


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
