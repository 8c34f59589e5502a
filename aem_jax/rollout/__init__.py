"""Plays episodes between a sampler and environments. The only room that sees both text and tokens."""

from aem_jax.rollout.config import RolloutConfig
from aem_jax.rollout.rollout import Rollout, check_cache_memory
from aem_jax.rollout.stats import RolloutStats, check_some_played

__all__ = ["Rollout", "RolloutConfig", "RolloutStats", "check_cache_memory", "check_some_played"]
