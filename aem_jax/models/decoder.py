"""The decoder in Flax NNX. Layers are stacked and scanned, so that compile time does not grow with depth.

Two ways through the same weights: `hidden` sees whole packed rows (learning), `extend` sees a chunk of new tokens
beside a KV cache (sampling). The cache is read-only inside `extend`; the chunk's keys and values come back to the
caller, who merges them once per chunk. So a decode step copies no cache, whatever its size.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from aem_jax.models.attention import RowAttention, chunk_attention, row_attention
from aem_jax.models.config import ModelConfig, RopeScaling
from aem_jax.models.int8 import scale_of
from aem_jax.models.kv_cache import LENGTH, KVArray, first_places
from aem_jax.models.lora import Adapter, Adapters, LoraConfig

Array = jax.Array


FEW_LAYERS = 8
"""A decoder with at most so many layers samples with its layers written out. A scan would copy each layer's weights and
cache out of the stacks at every token, which on a CPU costs as much as using them; the slices of written-out layers are
taken once a chunk. Deeper ones are scanned, so that programs stay small."""

Constrain = Callable[[Array], Array]
"""Gives back its argument, with a sharding laid down."""

PerLayer = Any
"""Either one tree for each layer in a list (few layers), or one tree with a leading axis of layers (many)."""


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


PRODUCT = "product"
"""What the products with weights are called, for policies of what `jax.checkpoint` keeps."""


def project(spec: str, x: Array, weights: Array) -> Array:
    """`einsum(spec, x, weights)`, weights used once in it.

    Going back, x is what is turned round to give the weights' gradient. Autodiff turns the cotangent round, which is
    often wider, and computes it a second time to do so.
    """
    return checkpoint_name(_project(spec, x, weights), PRODUCT)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _project(spec: str, x: Array, weights: Array) -> Array:
    return jnp.einsum(spec, x, weights)


def _project_backward(spec: str, residuals: tuple[Array, Array], cotangent: Array) -> tuple[Array, Array]:
    x, weights = residuals
    inputs, out = spec.split("->")
    left, right = inputs.split(",")
    d_x = jnp.einsum(f"{out},{right}->{left}", cotangent, weights)
    return d_x, jnp.einsum(f"{left},{out}->{right}", x, cotangent)


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


def rotary_tables(
    positions: Array, head_dim: int, theta: float, scaling: RopeScaling | None = None
) -> tuple[Array, Array]:
    """cos and sin [..., head_dim/2] of the rotary angles `position * theta^(-2i/head_dim)`, stretched if asked for."""
    frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    if scaling:
        turns = scaling.original_context * frequencies / (2 * jnp.pi)
        fast = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        fast = jnp.clip(fast, 0.0, 1.0)
        frequencies = frequencies * (fast + (1 - fast) / scaling.factor)
    angles = jnp.tensordot(positions.astype(jnp.float32), frequencies, axes=0)
    return jnp.cos(angles), jnp.sin(angles)


@jax.custom_vjp
def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Turns the pairs (x[i], x[i + head_dim/2]) of x [..., heads, head_dim] by the angles of its position."""
    cos, sin = cos[..., None, :], sin[..., None, :]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


rotate.defvjp(
    lambda x, cos, sin: (rotate(x, cos, sin), (cos, sin)),
    lambda angles, cotangent: (rotate(cotangent, angles[0], -angles[1]), None, None),  # turned back
)


def _without_adapter(name: str, x: Array, y: Array) -> Array:
    """What a projection makes of x, without an adapter: y."""
    return y


class Block(nnx.Module):
    """All layers' weights, stacked on a leading axis; the methods see one layer's slice.

    What reads the same input is one matrix, hence one product: `qkv` [D,KV,H/KV+2,Dh] holds for each key head its
    queries, its key and its value (so tensor parallelism splits it between groups), `gate_up` [D,2,F] both halves of
    the MLP's input. With `lora`, adapters stand beside the projections; with `int8`, matrices are codes, their scales
    beside them.
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
        self.adapters = Adapters(adapter, lora) if adapter and lora else None
        self.config = config
        self.int8 = int8

    def _weight(self, name: str) -> Array:
        return getattr(self, name)[...]

    def _project(self, equation: str, name: str, x: Array) -> Array:
        """x [B,T,*inputs] times one layer's matrix [*inputs,*outputs]."""
        weights = self._weight(name).astype(x.dtype)
        if not self.int8:
            return project(equation, x, weights)
        y = jnp.einsum(equation, x, weights, preferred_element_type=jnp.float32)
        return (y * self._weight(scale_of(name))[None, None]).astype(x.dtype)

    def project_qkv(self, x: Array, cos: Array, sin: Array) -> tuple[Array, Array, Array]:
        """Rotated queries [B,T,H,Dh], keys and values [B,T,KV,Dh] of x [B,T,D]."""
        config, eps = self.config, self.config.norm_eps
        x = rms_norm(x, self._weight("attention_norm"), eps)
        groups = self._project("btd,dkgh->btkgh", "qkv", x)
        if config.qkv_bias:
            groups = groups + self._weight("qkv_bias").astype(x.dtype)[None, None]
        queries = groups.shape[-2] - 2
        parts = jnp.split(groups, (queries, queries + 1), axis=-2)
        add = self.adapters.add if self.adapters else _without_adapter
        parts = [add(name, x, part) for name, part in zip(("q_proj", "k_proj", "v_proj"), parts, strict=True)]
        q, k, v = (part.reshape(*x.shape[:2], -1, part.shape[-1]) for part in parts)
        if config.qk_norm:
            q, k = rms_norm(q, self._weight("q_norm"), eps), rms_norm(k, self._weight("k_norm"), eps)
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def output_and_mlp(self, x: Array, attended: Array, *, split_gate_up: bool = False) -> Array:
        """Output projection, then the MLP, each with its residual.

        `split_gate_up` makes its two inputs two products: one more to start, but going back nothing has to be joined.
        """
        add = self.adapters.add if self.adapters else _without_adapter
        x = x + add("o_proj", attended, self._project("bthk,hkd->btd", "o", attended))
        y: Any = rms_norm(x, self._weight("mlp_norm"), self.config.norm_eps)
        if split_gate_up and not self.int8:
            halves = jnp.split(self._weight("gate_up").astype(y.dtype), 2, axis=-2)
            parts = [project("btd,dgf->btgf", y, half) for half in halves]
        else:
            parts = jnp.split(self._project("btd,dgf->btgf", "gate_up", y), 2, axis=-2)
        names = ("gate_proj", "up_proj")
        gate, up = (jnp.squeeze(add(name, y, part), -2) for name, part in zip(names, parts, strict=True))
        y = swiglu(gate, up)
        return x + add("down_proj", y, self._project("btf,fd->btd", "down", y))


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
    ) -> None:
        self.embed = nnx.Param(params["embed"])
        self.layers = Block(config, params["layers"], int8=int8, adapter=adapter, lora=lora)
        self.norm = nnx.Param(params["norm"])
        if not config.tied_head:
            self.head = nnx.Param(params["head"])
        self.config = config

    def _embed(self, tokens: Array) -> Array:
        return jnp.take(self.embed[...], tokens, axis=0).astype(self.config.dtype)

    def hidden(
        self,
        tokens: Array,
        positions: Array,
        segment_ids: Array,
        remat: Callable | None = None,
        constrain: Constrain | None = None,
        attention: RowAttention = row_attention,
    ) -> Array:
        """Hidden states of packed rows.

        Args:
            tokens: i32[B,T].
            positions: i32[B,T], position inside its segment.
            segment_ids: i32[B,T], 0 for padding; a token attends to earlier tokens of its own segment.
            remat: a `jax.checkpoint_policies` policy, or None to keep every activation.
            constrain: says where the residual stream [B,T,D] lies; None leaves it to the partitioner.
            attention: of the rows; `kernels.make_row_attention` makes that of a device.

        Returns:
            [B,T,D] after the final norm.
        """
        config, constrain = self.config, constrain or (lambda x: x)
        cos, sin = rotary_tables(positions, config.head_dim, config.rope_theta, config.rope_scaling)
        graphdef, stacked = nnx.split(self.layers)

        def layer(x: Array, state: Any) -> tuple[Array, None]:
            block = nnx.merge(graphdef, state)
            q, k, v = block.project_qkv(x, cos, sin)
            return constrain(block.output_and_mlp(x, attention(q, k, v, segment_ids), split_gate_up=True)), None

        body = layer if remat is None else jax.checkpoint(layer, policy=remat)
        x, _ = jax.lax.scan(body, constrain(self._embed(tokens)), stacked)
        return rms_norm(x, self.norm[...], config.norm_eps)

    def with_cache(self, keys: KVArray, values: KVArray, window: int) -> PerLayer:
        """Each layer's weights beside the first `window` positions of its cache: what `extend` reads.

        Args:
            keys: [L,S,KV,Dh,T], or in 8 bits.
            values: [L,S,KV,T,Dh], or in 8 bits.
            window: static, positions to attend over.
        """
        weights = nnx.state(self.layers)
        return self._per_layer(
            (weights, first_places(keys, window, LENGTH[0]), first_places(values, window, LENGTH[1]))
        )

    def empty_chunk(self, slots: int, places: int) -> PerLayer:
        """Keys and values of a chunk of `places` tokens in which nothing is written yet."""
        c = self.config
        shape = (c.num_layers, slots, c.num_kv_heads)
        keys, values = (
            jnp.zeros((*shape, c.head_dim, places), c.dtype),
            jnp.zeros((*shape, places, c.head_dim), c.dtype),
        )
        return self._per_layer((keys, values))

    def stacked_chunk(self, chunk: PerLayer) -> tuple[Array, Array]:
        """Keys [L,S,KV,Dh,G] and values [L,S,KV,G,Dh] of a chunk."""
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *chunk) if isinstance(chunk, list) else chunk

    def extend(
        self, layers: PerLayer, tokens: Array, positions: Array, cached: Array, chunk: PerLayer, index: Array
    ) -> tuple[Array, PerLayer]:
        """Hidden states of C new tokens a slot, beside a cache and the chunk's own earlier tokens.

        Args:
            layers: from `with_cache`.
            tokens: i32[S,C].
            positions: i32[S,C].
            cached: i32[S], how many positions of the cache are filled.
            chunk: keys and values of this chunk, filled up to `index`; from `empty_chunk` or the step before.
            index: i32 scalar, where the C tokens go in the chunk.

        Returns:
            hidden [S,C,D] after the final norm, and the chunk with the new tokens' keys and values.
        """
        config = self.config
        cos, sin = rotary_tables(positions, config.head_dim, config.rope_theta, config.rope_scaling)
        graphdef = nnx.graphdef(self.layers)

        def layer(x: Array, scanned: tuple[Any, tuple[Array, Array]]) -> tuple[Array, tuple[Array, Array]]:
            (weights, cache_k, cache_v), (chunk_k, chunk_v) = scanned
            block = nnx.merge(graphdef, weights)
            q, k, v = block.project_qkv(x, cos, sin)
            chunk_k = jax.lax.dynamic_update_slice(chunk_k, jnp.transpose(k, (0, 2, 3, 1)), (0, 0, 0, index))
            chunk_v = jax.lax.dynamic_update_slice(chunk_v, jnp.swapaxes(v, 1, 2), (0, 0, index, 0))
            attended = chunk_attention(q, cache_k, cache_v, cached, chunk_k, chunk_v, index)
            return block.output_and_mlp(x, attended), (chunk_k, chunk_v)

        x = self._embed(tokens)
        if isinstance(layers, list):
            written = []
            for scanned in zip(layers, chunk, strict=True):
                x, new = layer(x, scanned)
                written.append(new)
            chunk = written
        else:
            x, chunk = jax.lax.scan(layer, x, (layers, chunk))
        return rms_norm(x, self.norm[...], config.norm_eps), chunk

    def _per_layer(self, stacked: Any) -> PerLayer:
        count = self.config.num_layers
        if count > FEW_LAYERS:
            return stacked
        return [jax.tree.map(lambda leaf: leaf[layer], stacked) for layer in range(count)]  # noqa: B023

    def head_weights(self) -> Array:
        """The head [D,V] in the dtype of activations."""
        head = self.embed[...].T if self.config.tied_head else self.head[...]
        return head.astype(self.config.dtype)

    def logits(self, hidden: Array) -> Array:
        """float32 logits [..., V] of hidden states [..., D]; not rounded to the activations' dtype on the way."""
        return jnp.matmul(hidden, self.head_weights(), preferred_element_type=jnp.float32)
