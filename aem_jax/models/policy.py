"""A policy: a decoder's structure, apart from its parameters, so that parameters travel as a plain pytree."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from aem_jax.models.config import ModelConfig
from aem_jax.models.decoder import Constrain, Decoder

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
    """Pure functions over a parameter tree; hashable, so it can be closed over by jitted functions."""

    config: ModelConfig

    @cached_property
    def _structure(self) -> tuple[Any, Any]:
        graphdef, state = nnx.split(nnx.eval_shape(lambda: Decoder(self.config, rngs=nnx.Rngs(0))))
        return graphdef, state

    @property
    def axes(self) -> Params:
        """Logical axes of every parameter, in the parameters' structure."""
        config = self.config
        absent = {name for names, there in _OPTIONAL.items() if not getattr(config, there) for name in names}
        layers = {name: axes for name, axes in _BLOCK_AXES.items() if name not in absent}
        axes: Params = {"embed": ("vocab", "embed"), "layers": layers, "norm": ("norm",)}
        return axes if config.tied_head else {**axes, "head": ("embed", "vocab")}

    @property
    def shapes(self) -> Params:
        """Shape structs of every parameter (float32 masters)."""
        return jax.eval_shape(self.init, jax.random.key(0))

    def init(self, key: Array) -> Params:
        """Random float32 parameters from a PRNG key."""
        return nnx.to_pure_dict(nnx.state(Decoder(self.config, rngs=nnx.Rngs(params=key)), nnx.Param))

    def bind(self, params: Params) -> Decoder:
        """The decoder with these parameters; cheap, meant to be called under jit."""
        graphdef, state = self._structure
        state = jax.tree.map(lambda leaf: leaf, state)  # a fresh tree: the abstract one stays as it is
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(graphdef, state)

    def hidden(
        self,
        params: Params,
        tokens: Array,
        positions: Array,
        segment_ids: Array,
        remat: Callable | None = None,
        constrain: Constrain | None = None,
    ) -> Array:
        """See `Decoder.hidden`."""
        return self.bind(params).hidden(tokens, positions, segment_ids, remat, constrain)

    def logits(self, params: Params, hidden: Array) -> Array:
        """See `Decoder.logits`."""
        return self.bind(params).logits(hidden)

    def forward(self, params: Params, tokens: Array) -> Array:
        """float32 logits [B,T,V] of unpadded rows i32[B,T]: the plain, cache-less pass."""
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        return self.logits(params, self.hidden(params, tokens, positions, jnp.ones_like(tokens)))
