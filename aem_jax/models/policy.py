"""A policy: pure functions over its parameters, a plain pytree with one entry for each part of the policy.

    {"base": the decoder's weights, "adapter": LoRA's matrices, "value": the value head}

With LoRA the base is frozen; otherwise all parts are trained. The value head estimates the value of a state from the
hidden state that predicts the first token of a response:

    V = w · h / √D + b,  initially w = 0 and b = 0

h is the decoder's last hidden state [D], after the final norm, so that h / √D has about length 1 for any model. The
head is float32. It is not sampled from, exported or frozen.

Left out: a critic with its own decoder, which doubles the memory and time of learning.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from aem_jax.models.attention import RowAttention, row_attention
from aem_jax.models.block import GATED
from aem_jax.models.config import ModelConfig
from aem_jax.models.decoder import Constrain, Decoder
from aem_jax.models.experts import Experts, Load, make_experts
from aem_jax.models.int8 import quantize_layers, quantized_table
from aem_jax.models.lora import LoraConfig, adapter_axes, init_adapter, merge, merged_leaves
from aem_jax.models.parameters import Parameter, as_tree, init_parameters, parameter_table

Array = jax.Array
Params = dict[str, Any]
"""The parts of a policy, by name."""

VALUE_AXES = {"w": (None, "value"), "b": ("value",)}
"""Logical axes of the value head."""


@dataclass(frozen=True)
class Policy:
    """Pure functions over a tree of parameters. Hashable, so jitted functions can close over it.

    The functions read the parts of this policy, and ignore others in the tree.

    Attributes:
        config: sizes and options of the decoder.
        lora: of the adapter; None without one.
        value: whether there is a value head.
        int8: whether the base is that of `quantize`: codes and scales to sample from; see `models.int8`.
    """

    config: ModelConfig
    lora: LoraConfig | None = None
    value: bool = False
    int8: bool = False

    @property
    def base(self) -> "Policy":
        """The policy of the base alone, and of merged weights."""
        return replace(self, lora=None, value=False)

    @property
    def quantized(self) -> "Policy":
        """The policy of the parameters that `quantize` returns."""
        return Policy(self.config, int8=True)

    @property
    def sampled(self) -> "Policy":
        """The policy of the parameters to sample from: the base, with the adapter if it is not merged."""
        return replace(self, value=False) if self.lora and not self.lora.merge else self.base

    @property
    def frozen(self) -> tuple[str, ...]:
        """Names of the parts that are not trained."""
        return ("base",) if self.lora else ()

    @cached_property
    def _table(self) -> tuple[Parameter, ...]:
        return quantized_table(self.config) if self.int8 else parameter_table(self.config)

    @property
    def axes(self) -> Params:
        """Logical axes of every parameter, in the parameters' structure.

        Raises:
            ValueError: the adapter's rank exceeds a side of a projection.
        """
        axes: Params = {"base": as_tree(self._table, lambda row: row.axes)}
        if self.lora:
            axes["adapter"] = adapter_axes(self.config, self.lora)
        if self.value:
            axes["value"] = VALUE_AXES
        return axes

    @property
    def shapes(self) -> Params:
        """Shape structs of what `init` returns."""
        return jax.eval_shape(self.init, jax.random.key(0))

    @property
    def dtypes(self) -> Params:
        """Dtype in which each parameter is used: float32 for norms, scales and the value head, int8 for codes, else the
        config's."""
        dtypes: Params = {"base": as_tree(self._table, lambda row: jnp.dtype(row.dtype))}
        if self.lora:
            dtypes["adapter"] = jax.tree.map(lambda _: jnp.dtype(self.config.dtype), self.shapes["adapter"])
        if self.value:
            dtypes["value"] = dict.fromkeys(VALUE_AXES, jnp.dtype("float32"))
        return dtypes

    def init(self, key: Array) -> Params:
        """Random float32 parameters from a PRNG key; a frozen base is in the dtypes of its use.

        An adapter begins without effect, and a value head with values of 0. Neither changes the draws of the base.
        """
        params: Params = {"base": init_parameters(self.config, key)}
        if self.int8:
            return self.quantize(params)
        if self.lora:
            params = _cast(params, self.base.dtypes)
            params["adapter"] = init_adapter(self.config, self.lora, jax.random.fold_in(key, 1))
        if self.value:
            params["value"] = {"w": jnp.zeros((self.config.hidden_size, 1)), "b": jnp.zeros(1)}
        return params

    def quantize(self, params: Params) -> Params:
        """Parameters of `quantized`: matrices of layers as codes and scales, all else in the dtype of its use."""
        base = params["base"]
        codes = {**base, "layers": quantize_layers(self.config, base["layers"])}
        return _cast({"base": codes}, self.quantized.dtypes)

    def by_layer(self, tree: Params, part: Callable[[Any, int], Any]) -> Params:
        """A tree in the layout of sampling: "layers" is a list with one mapping for each layer.

        Args:
            tree: parameters, shapes or axes; "layers" maps names to leaves of all layers.
            part: (leaf of all layers, index of a layer) -> leaf of that layer.
        """
        layers = tree["base"]["layers"]
        split = [{name: part(leaf, i) for name, leaf in layers.items()} for i in range(self.config.num_layers)]
        return {**tree, "base": {**tree["base"], "layers": split}}

    @property
    def merged_leaves(self) -> tuple[str, ...]:
        """Names in "layers" of the stacked weights that the adapter changes."""
        return merged_leaves(self.config, self.lora) if self.lora else ()

    def merge(self, params: Params) -> Params:
        """Parameters of `base`, with the adapter merged into the weights; see `lora.merge`."""
        base = params["base"]
        if not self.lora:
            return {"base": base}
        changed = {name: base["layers"][name] for name in self.merged_leaves}
        merged = merge(self.config, self.lora, params["adapter"], changed)
        return {"base": {**base, "layers": {**base["layers"], **merged}}}

    def experts(self, mesh: Mesh | None) -> Experts | None:
        """The experts' products on a mesh; None for a policy without experts."""
        return make_experts(GATED[self.config.activation], mesh) if self.config.mixture else None

    def bind(self, params: Params, experts: Experts | None = None) -> Decoder:
        """The decoder with these parameters; cheap, to be called under jit.

        Args:
            params: the parameters.
            experts: from `experts`; by default on one device.
        """
        adapter = params["adapter"] if self.lora else None
        settings: Any = {"int8": self.int8, "adapter": adapter, "lora": self.lora, "experts": experts}
        return Decoder(self.config, params["base"], **settings)

    def hidden(
        self,
        params: Params,
        tokens: Array,
        positions: Array,
        segment_ids: Array,
        remat: Callable | None = None,
        constrain: Constrain | None = None,
        attention: RowAttention = row_attention,
        *,
        experts: Experts | None = None,
        recorded: Array | None = None,
    ) -> tuple[Array, Load | None]:
        """Hidden states, and the load of a mixture's experts; see `Decoder.hidden`. `experts` as in `bind`."""
        decoder = self.bind(params, experts)
        return decoder.hidden(tokens, positions, segment_ids, remat, constrain, attention, recorded)

    def logits(self, params: Params, hidden: Array) -> Array:
        """See `Decoder.logits`."""
        return self.bind(params).logits(hidden)

    def head(self, params: Params) -> Array:
        """The head [D, V], in the dtype of its parameter."""
        return params["base"]["embed"].T if self.config.tied_head else params["base"]["head"]

    def values(self, params: Params, hidden: Array) -> Array:
        """Values of hidden states; see `state_values`."""
        return state_values(params["value"], hidden)

    def forward(self, params: Params, tokens: Array) -> Array:
        """float32 logits [B,T,V] of unpadded rows i32[B,T], without a cache."""
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        return self.logits(params, self.hidden(params, tokens, positions, jnp.ones_like(tokens))[0])


def state_values(head: Params, hidden: Array) -> Array:
    """V = w · h / √D + b of hidden states [..., D]: f32[...], in units of reward.

    Args:
        head: {"w": f32[D, 1], "b": f32[1]}.
        hidden: after the final norm, in any dtype.
    """
    # A sum of products, not a product of matrices: in float32 on any device, and h is never copied in float32.
    w = jnp.broadcast_to(head["w"][:, 0] * hidden.shape[-1] ** -0.5, hidden.shape)
    return jnp.sum(hidden.astype(jnp.float32) * w, axis=-1) + head["b"][0]


def _cast(params: Params, dtypes: Params) -> Params:
    return jax.tree.map(lambda leaf, dtype: leaf.astype(dtype), params, dtypes)
