"""Checkpoints of a run: saving, restoring, checksums, and a lock on their folder."""

from aem_jax.checkpoint.checkpoints import CheckpointConfig, Checkpoints, Choice
from aem_jax.checkpoint.step import CheckpointError

__all__ = ["CheckpointConfig", "CheckpointError", "Checkpoints", "Choice"]
