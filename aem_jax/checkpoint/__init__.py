"""Checkpoints of a run: what is saved, by whom, and whether it is still what was saved."""

from aem_jax.checkpoint.checkpoints import CheckpointConfig, Checkpoints
from aem_jax.checkpoint.step import CheckpointError

__all__ = ["CheckpointConfig", "CheckpointError", "Checkpoints"]
