"""Decoder families in Flax NNX. Parameters are plain pytrees; a `Policy` has the pure functions over them."""

from aem_jax.models.config import CONFIGS, ModelConfig
from aem_jax.models.lora import LoraConfig
from aem_jax.models.parameters import Mixture
from aem_jax.models.policy import Params, Policy
from aem_jax.models.pretrained import Pretrained, from_pretrained, save_pretrained
from aem_jax.models.rotary import LinearScaling, Llama3Scaling, RopeScaling, YarnScaling

__all__ = [
    "CONFIGS",
    "LinearScaling",
    "Llama3Scaling",
    "LoraConfig",
    "Mixture",
    "ModelConfig",
    "Params",
    "Policy",
    "Pretrained",
    "RopeScaling",
    "YarnScaling",
    "from_pretrained",
    "save_pretrained",
]
