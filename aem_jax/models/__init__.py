"""Decoder families in Flax NNX. Parameters are plain pytrees; a `Policy` has the pure functions over them."""

from aem_jax.models.config import CONFIGS, ModelConfig, RopeScaling
from aem_jax.models.lora import LoraConfig
from aem_jax.models.policy import LoraPolicy, Params, Policy
from aem_jax.models.pretrained import Pretrained, from_pretrained, save_pretrained
from aem_jax.models.value import ValuePolicy, policy_params

__all__ = [
    "CONFIGS",
    "LoraConfig",
    "LoraPolicy",
    "ModelConfig",
    "Params",
    "Policy",
    "Pretrained",
    "RopeScaling",
    "ValuePolicy",
    "from_pretrained",
    "policy_params",
    "save_pretrained",
]
