"""A policy: pure functions over a decoder's parameters, which are a plain pytree."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp

from aem_jax.models.attention import RowAttention, row_attention
from aem_jax.models.config import ModelConfig
from aem_jax.models.decoder import Constrain, Decoder
from aem_jax.models.int8 import quantize_layers, quantized_table
from aem_jax.models.lora import Adapter, LoraConfig, adapter_axes, init_adapter, merge, merged_leaves
from aem_jax.models.parameters import Parameter, as_tree, init_parameters, parameter_table

Array = jax.Array
Params = dict[str, Any]


@dataclass(frozen=True)
class Policy:
    """Pure functions over a parameter tree. Hashable, so jitted functions can close over it.

    With `int8` the parameters are those of `quantize`: codes and scales to sample from; see `models.int8`.
    """

    config: ModelConfig
    int8: bool = False

    @property
    def base(self) -> "Policy":
        """The policy of all weights: this one."""
        return self

    @property
    def sampled(self) -> "Policy":
        """The policy of the parameters to sample from: this one."""
        return self

    @property
    def quantized(self) -> "Policy":
        """The policy of the parameters that `quantize` returns."""
        return Policy(self.config, int8=True)

    def quantize(self, params: Params) -> Params:
        """Parameters of `quantized`: matrices of layers as codes and scales, all else in the dtype of its use."""
        codes = {**params, "layers": quantize_layers(self.config, params["layers"])}
        return jax.tree.map(lambda leaf, dtype: leaf.astype(dtype), codes, self.quantized.dtypes)

    @cached_property
    def _table(self) -> tuple[Parameter, ...]:
        return quantized_table(self.config) if self.int8 else parameter_table(self.config)

    @property
    def axes(self) -> Params:
        """Logical axes of every parameter, in the parameters' structure."""
        return as_tree(self._table, lambda row: row.axes)

    @property
    def shapes(self) -> Params:
        """Shape structs of every parameter: float32 masters, and int8 codes."""
        struct = lambda row: jax.ShapeDtypeStruct(row.shape, "int8" if row.dtype == "int8" else "float32")
        return as_tree(self._table, struct)

    @property
    def dtypes(self) -> Params:
        """Dtype in which each parameter is used: float32 for norms and scales, int8 for codes, else the config's."""
        return as_tree(self._table, lambda row: jnp.dtype(row.dtype))

    def init(self, key: Array) -> Params:
        """Random float32 parameters from a PRNG key."""
        params = init_parameters(self.config, key)
        return Policy(self.config).quantize(params) if self.int8 else params

    def bind(self, params: Params) -> Decoder:
        """The decoder with these parameters; cheap, to be called under jit."""
        return Decoder(self.config, params, int8=self.int8)

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
        """The head [D, V], in the dtype of its parameter."""
        return params["embed"].T if self.config.tied_head else params["head"]

    def forward(self, params: Params, tokens: Array) -> Array:
        """float32 logits [B,T,V] of unpadded rows i32[B,T], without a cache."""
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        return self.logits(params, self.hidden(params, tokens, positions, jnp.ones_like(tokens)))


@dataclass(frozen=True)
class LoraPolicy:
    """A policy of which only an adapter is trained: the same functions, of `params` (adapter, frozen weights).

    `axes`, `shapes` and `init` are those of the adapter, in float32. `base` is the policy of the frozen weights, and of
    merged ones.
    """

    base: Policy
    lora: LoraConfig

    @property
    def config(self) -> ModelConfig:
        """Sizes and options."""
        return self.base.config

    @property
    def sampled(self) -> "Policy | LoraPolicy":
        """The policy of the parameters to sample from: merged weights, or the pair."""
        return self.base if self.lora.merge else self

    @property
    def axes(self) -> Adapter:
        """Logical axes of the adapter.

        Raises:
            ValueError: the rank exceeds a side of a projection.
        """
        return adapter_axes(self.config, self.lora)

    @property
    def shapes(self) -> Adapter:
        """Shape structs of the adapter."""
        return jax.eval_shape(self.init, jax.random.key(0))

    @property
    def merged_leaves(self) -> tuple[str, ...]:
        """Names in "layers" of the stacked weights that the adapter changes."""
        return merged_leaves(self.config, self.lora)

    def init(self, key: Array) -> Adapter:
        """A float32 adapter without effect (B = 0)."""
        return init_adapter(self.config, self.lora, key)

    def merge(self, adapter: Adapter, layers: Params) -> Params:
        """The `merged_leaves` of the stacked weights, with the adapter merged; see `lora.merge`."""
        return merge(self.config, self.lora, adapter, {name: layers[name] for name in self.merged_leaves})

    def bind(self, params: Any) -> Decoder:
        """The decoder with frozen weights and an adapter; cheap, to be called under jit."""
        adapter, frozen = params
        return Decoder(self.config, frozen, adapter=adapter, lora=self.lora)

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
        return self.base.head(params[1])
