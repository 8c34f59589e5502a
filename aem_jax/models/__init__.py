"""Decoder families in Flax NNX. Parameters are plain pytrees; `Policy` holds the structure and the pure functions."""

from aem_jax.models.config import CONFIGS, ModelConfig
from aem_jax.models.policy import Params, Policy

__all__ = ["CONFIGS", "ModelConfig", "Params", "Policy"]
