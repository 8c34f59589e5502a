"""One layer of the decoder in Flax NNX: norms, projections, the MLP or the mixture of experts.

The norm, the projections and SwiGLU have backward passes of their own, which keep and read less than those of autodiff.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from aem_jax.models.config import Activation, ModelConfig, NormPlacement
from aem_jax.models.experts import PRODUCT, Experts, ExpertWeights, Matrices, Routing, route
from aem_jax.models.int8 import scale_of
from aem_jax.models.lora import Adapter, Adapters, LoraConfig
from aem_jax.models.parameters import OUTPUT_NORMS
from aem_jax.models.rotary import rotate

Array = jax.Array


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
