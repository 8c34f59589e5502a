"""Decoder families in Flax NNX. Parameters are plain pytrees; a `Policy` has the pure functions over them."""

from aem_jax.models.config import CONFIGS, ModelConfig, RopeScaling
from aem_jax.models.lora import LoraConfig
from aem_jax.models.policy import Params, Policy
from aem_jax.models.pretrained import Pretrained, from_pretrained, save_pretrained

__all__ = [
    "CONFIGS",
    "LoraConfig",
    "ModelConfig",
    "Params",
    "Policy",
    "Pretrained",
    "RopeScaling",
    "from_pretrained",
    "save_pretrained",
]
