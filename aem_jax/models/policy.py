"""A policy: a decoder's structure, apart from its parameters, so that parameters travel as a plain pytree."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from aem_jax.models.attention import RowAttention, row_attention
from aem_jax.models.config import ModelConfig
from aem_jax.models.decoder import Constrain, Decoder
from aem_jax.models.int8 import INPUTS, layer_axes, quantize_layers, scale_of
from aem_jax.models.lora import Adapter, LoraConfig, adapter_axes, init_adapter, merge, merged_leaves

Array = jax.Array
Params = dict[str, Any]

_BLOCK_AXES = {
    "qkv": ("layers", "embed", "kv_heads", None, "head_dim"),
    "o": ("layers", "heads", "head_dim", "embed"),
    "gate_up": ("layers", "embed", None, "mlp"),
    "down": ("layers", "mlp", "embed"),
    "qkv_bias": ("layers", "kv_heads", None, "head_dim"),
    "q_norm": ("layers", "norm"),
    "k_norm": ("layers", "norm"),
    "attention_norm": ("layers", "norm"),
    "mlp_norm": ("layers", "norm"),
}

_OPTIONAL = {("q_norm", "k_norm"): "qk_norm", ("qkv_bias",): "qkv_bias"}
"""Parameters -> the option of ModelConfig that they come with."""


@dataclass(frozen=True)
class Policy:
    """Pure functions over a parameter tree; hashable, so it can be closed over by jitted functions.

    With `int8` the parameters are those to sample from in 8 bits: see `models.int8`, `in_int8` and `quantize`.
    """

    config: ModelConfig
    int8: bool = False

    @property
    def whole(self) -> "Policy":
        """The policy that all weights together belong to: this one."""
        return self

    @property
    def sampled(self) -> "Policy":
        """The policy that takes the parameters as they are laid out for sampling: this one."""
        return self

    @property
    def in_int8(self) -> "Policy":
        """The policy that takes `quantize`'s parameters."""
        return Policy(self.config, int8=True)

    def quantize(self, params: Params) -> Params:
        """These parameters for `in_int8`: matrices of layers as codes with scales, the rest as it is used."""
        layers = quantize_layers(params["layers"])
        rest = {name: leaf for name, leaf in params.items() if name != "layers"}
        return jax.tree.map(lambda leaf, dtype: leaf.astype(dtype), {**rest, "layers": layers}, self.in_int8.dtypes)

    @cached_property
    def _structure(self) -> tuple[Any, Any]:
        graphdef, state = nnx.split(nnx.eval_shape(lambda: Decoder(self.config, int8=self.int8, rngs=nnx.Rngs(0))))
        return graphdef, state

    @property
    def axes(self) -> Params:
        """Logical axes of every parameter, in the parameters' structure."""
        config = self.config
        absent = {name for names, there in _OPTIONAL.items() if not getattr(config, there) for name in names}
        layers = {name: axes for name, axes in _BLOCK_AXES.items() if name not in absent}
        layers = layer_axes(layers) if self.int8 else layers
        axes: Params = {"embed": ("vocab", "embed"), "layers": layers, "norm": ("norm",)}
        return axes if config.tied_head else {**axes, "head": ("embed", "vocab")}

    @property
    def shapes(self) -> Params:
        """Shape structs of every parameter (float32 masters)."""
        return jax.eval_shape(self.init, jax.random.key(0))

    @property
    def dtypes(self) -> Params:
        """In which each parameter is used: scales of norms in float32, all else in the config's; int8 with scales."""
        used = jnp.dtype(self.config.dtype)
        is_axes = lambda node: isinstance(node, tuple)
        found = jax.tree.map(lambda axes: jnp.dtype("float32") if "norm" in axes else used, self.axes, is_leaf=is_axes)
        if self.int8:
            found["layers"] |= dict.fromkeys(INPUTS, jnp.dtype("int8"))
            found["layers"] |= dict.fromkeys(map(scale_of, INPUTS), jnp.dtype("float32"))
        return found

    def init(self, key: Array) -> Params:
        """Random float32 parameters from a PRNG key."""
        return nnx.to_pure_dict(nnx.state(Decoder(self.config, int8=self.int8, rngs=nnx.Rngs(params=key)), nnx.Param))

    def bind(self, params: Params) -> Decoder:
        """The decoder with these parameters; cheap, meant to be called under jit."""
        return _bind(self._structure, params)

    def hidden(
        self,
        params: Params,
        tokens: Array,
        positions: Array,
        segment_ids: Array,
        remat: Callable | None = None,
        constrain: Constrain | None = None,
        attention: RowAttention = row_attention,
    ) -> Array:
        """See `Decoder.hidden`."""
        return self.bind(params).hidden(tokens, positions, segment_ids, remat, constrain, attention)

    def logits(self, params: Params, hidden: Array) -> Array:
        """See `Decoder.logits`."""
        return self.bind(params).logits(hidden)

    def head(self, params: Params) -> Array:
        """The head [D, V] as kept."""
        return params["embed"].T if self.config.tied_head else params["head"]

    def forward(self, params: Params, tokens: Array) -> Array:
        """float32 logits [B,T,V] of unpadded rows i32[B,T]: the plain, cache-less pass."""
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        return self.logits(params, self.hidden(params, tokens, positions, jnp.ones_like(tokens)))


@dataclass(frozen=True)
class LoraPolicy:
    """A policy of which only an adapter is trained: the same functions, whose `params` are (adapter, frozen weights).

    `axes`, `shapes` and `init` are those of the adapter, in float32; `whole` is the policy that the frozen weights, and
    the merged ones, belong to.
    """

    whole: Policy
    lora: LoraConfig

    @property
    def config(self) -> ModelConfig:
        """Sizes and options."""
        return self.whole.config

    @property
    def sampled(self) -> "Policy | LoraPolicy":
        """The policy that takes the parameters as they are laid out for sampling: merged, or the pair."""
        return self.whole if self.lora.merge else self

    @cached_property
    def _structure(self) -> tuple[Any, Any]:
        return nnx.split(nnx.eval_shape(lambda: Decoder(self.config, lora=self.lora, rngs=nnx.Rngs(0))))

    @property
    def axes(self) -> Adapter:
        """Logical axes of the adapter.

        Raises:
            ValueError: a rank that a projection cannot have.
        """
        return adapter_axes(self.config, self.lora)

    @property
    def shapes(self) -> Adapter:
        """Shape structs of the adapter."""
        return jax.eval_shape(self.init, jax.random.key(0))

    @property
    def merged_leaves(self) -> tuple[str, ...]:
        """Stacked weights, inside "layers", that the adapter changes."""
        return merged_leaves(self.config, self.lora)

    def init(self, key: Array) -> Adapter:
        """A float32 adapter that adds nothing yet."""
        return init_adapter(self.config, self.lora, key)

    def merge(self, adapter: Adapter, layers: Params) -> Params:
        """The `merged_leaves` of the stacked weights with the adapter in them; see `lora.merge`."""
        return merge(self.config, self.lora, adapter, {name: layers[name] for name in self.merged_leaves})

    def bind(self, params: Any) -> Decoder:
        """The decoder with frozen weights and the adapter beside them; cheap, meant to be called under jit."""
        adapter, frozen = params
        return _bind(self._structure, {**frozen, "layers": {**frozen["layers"], "adapters": adapter}})

    def hidden(
        self,
        params: Any,
        tokens: Array,
        positions: Array,
        segment_ids: Array,
        remat: Callable | None = None,
        constrain: Constrain | None = None,
        attention: RowAttention = row_attention,
    ) -> Array:
        """See `Decoder.hidden`."""
        return self.bind(params).hidden(tokens, positions, segment_ids, remat, constrain, attention)

    def logits(self, params: Any, hidden: Array) -> Array:
        """See `Decoder.logits`."""
        return self.bind(params).logits(hidden)

    def head(self, params: Any) -> Array:
        """See `Policy.head`."""
        return self.whole.head(params[1])


def _bind(structure: tuple[Any, Any], params: Params) -> Decoder:
    graphdef, state = structure
    state = jax.tree.map(lambda leaf: leaf, state)  # a fresh tree: the abstract one stays as it is
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graphdef, state)
