"""A value head on a policy: the value of a state, from the hidden state that predicts the first token of a response.

    V = w · h / √D + b,  initially w = 0 and b = 0

h is the decoder's last hidden state [D], after the final norm, so that h / √D has about length 1 for any model. The
head is a float32 leaf beside the policy's parameters. It is not sampled from, exported or frozen.

Left out: a critic with its own decoder, which doubles the memory and time of learning.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from aem_jax.models.attention import RowAttention, row_attention
from aem_jax.models.policy import LoraPolicy, Params, Policy

Array = jax.Array


@dataclass(frozen=True)
class ValuePolicy:
    """A policy with a value head: the same functions, of {"policy": …, "value": {"w", "b"}}.

    Where `policy` takes a pair (adapter, frozen weights), these functions do too; the head is in the first.
    """

    policy: Policy | LoraPolicy

    @property
    def axes(self) -> Params:
        """Logical axes of every trained parameter."""
        return {"policy": self.policy.axes, "value": {"w": (None, "value"), "b": ("value",)}}

    def init(self, key: Array) -> Params:
        """The policy's own parameters from a PRNG key, and a head whose values are 0."""
        return self.attach(self.policy.init(key))

    def attach(self, params: Params) -> Params:
        """These parameters of the policy with a new head."""
        width = self.policy.config.hidden_size
        return {"policy": params, "value": {"w": jnp.zeros((width, 1)), "b": jnp.zeros(1)}}

    def hidden(
        self,
        params: Any,
        tokens: Array,
        positions: Array,
        segment_ids: Array,
        remat: Any = None,
        constrain: Any = None,
        attention: RowAttention = row_attention,
    ) -> Array:
        """See `Decoder.hidden`."""
        return self.policy.hidden(_of_policy(params), tokens, positions, segment_ids, remat, constrain, attention)

    def head(self, params: Any) -> Array:
        """See `Policy.head`."""
        return self.policy.head(_of_policy(params))

    def values(self, params: Any, hidden: Array) -> Array:
        """V = w · h / √D + b of hidden states [..., D]: f32[...], in units of reward."""
        head = (params[0] if isinstance(params, tuple) else params)["value"]
        # A sum of products, not a product of matrices: in float32 on any device, and h is never copied in float32.
        w = jnp.broadcast_to(head["w"][:, 0] * hidden.shape[-1] ** -0.5, hidden.shape)
        return jnp.sum(hidden.astype(jnp.float32) * w, axis=-1) + head["b"][0]


def policy_params(policy: Any, params: Params) -> Params:
    """The trained parameters that are sampled from and exported: all but a value head."""
    return params["policy"] if isinstance(policy, ValuePolicy) else params


def _of_policy(params: Any) -> Any:
    if isinstance(params, tuple):
        trained, frozen = params
        return trained["policy"], frozen
    return params["policy"]
