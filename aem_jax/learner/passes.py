"""Forward passes over a batch, without gradient: log-probabilities of its tokens, and values of its responses."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from aem_jax.batch import Batch, constrained, packed_sharding
from aem_jax.learner.config import LearnerConfig
from aem_jax.learner.forward import ForwardConfig, Rows, forward_config, row_statistics, row_values
from aem_jax.learner.state import TrainablePolicy
from aem_jax.learner.value import add_values
from aem_jax.models import Params
from aem_jax.sharding import replicated

Array = jax.Array


def make_token_logprobs(policy: TrainablePolicy, config: LearnerConfig, mesh: Mesh) -> Callable[[Params, Batch], Array]:
    """token_logprobs(params, batch) -> f32[M, b, T], jitted, 0 outside responses: the reference policy's pass.

    The reference policy routes tokens by its own router, whatever experts the batch has.
    """
    forward = forward_config(policy, config, mesh)

    def logprobs(params: Params, batch: Batch) -> Array:
        batch = constrained(replace(batch, experts=None), mesh)
        return token_logprobs(policy, forward, params, batch)

    return jax.jit(logprobs, out_shardings=packed_sharding(mesh))


def make_response_values(
    policy: TrainablePolicy, config: LearnerConfig, mesh: Mesh
) -> Callable[[Params, Batch], Array]:
    """response_values(params, batch) -> f32[R], jitted, in units of reward; NaN for responses that are not packed.

    The value of a response is that of the state before it, at the position that predicts the response's first token.
    """
    forward = forward_config(policy, config, mesh)

    def response_values(params: Params, batch: Batch) -> Array:
        batch = constrained(batch, mesh)

        def add_microbatch(m: Array, table: Array) -> Array:
            rows = rows_of(batch, m)
            return add_values(table, row_values(policy, params, rows, forward), rows.response_ids)

        return jax.lax.fori_loop(
            0, batch.num_microbatches, add_microbatch, jnp.full(batch.response_valid.shape, jnp.nan)
        )

    return jax.jit(response_values, out_shardings=replicated(mesh))


def token_logprobs(policy: TrainablePolicy, forward: ForwardConfig, params: Params, batch: Batch) -> Array:
    """Log-probabilities of all sampled tokens of a batch, f32[M, b, T], nats; 0 outside responses."""

    def set_microbatch(m: Array, table: Array) -> Array:
        logprobs, _ = row_statistics(policy, params, rows_of(batch, m), forward)
        return table.at[m].set(logprobs)

    zeros = jnp.zeros(jnp.shape(batch.tokens), jnp.float32)
    return jax.lax.fori_loop(0, batch.num_microbatches, set_microbatch, zeros)


def rows_of(batch: Batch, m: Array) -> Rows:
    """The rows of microbatch m."""
    packed: Any = (getattr(batch, name) for name in Rows._fields)
    rows: Any = (None if array is None else microbatch(array, m) for array in packed)
    return Rows(*rows)


def microbatch(packed: Array, m: Array) -> Array:
    """[M, b, T] → [b, T], that of microbatch m."""
    return jax.lax.dynamic_index_in_dim(packed, m, keepdims=False)
