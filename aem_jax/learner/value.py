"""The value head's loss: one state for each response, at the position that predicts the response's first token.

    L_V = Σ_r w ℓ(V_r, V_r^old, R_r),  w = 1 / responses of the minibatch

Like the policy's loss, it is a sum with weights that are fixed in advance, so it does not depend on packing and
microbatches. Values are computed from the hidden states of the policy's loss.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from aem_jax.learner.config import LearnerConfig
from aem_jax.learner.objective import Stats
from aem_jax.learner.state import TrainablePolicy
from aem_jax.losses import clipped_value_loss
from aem_jax.models import Params


class ValueTokens(NamedTuple):
    """The value loss's inputs for one microbatch, f32[b, T] each, at the first token of each response.

    Attributes:
        weights: weight of each response in the minibatch's loss; 0 elsewhere, where the other fields are ignored.
        values: V before the first optimizer step, in units of reward.
        returns: R, in units of reward.
    """

    weights: jax.Array
    values: jax.Array
    returns: jax.Array


ValueObjective = Callable[[TrainablePolicy, Params, jax.Array, ValueTokens, Stats], tuple[jax.Array, Stats]]
"""(policy, params, hidden [b, T, D] of the positions that predict the tokens, tokens, stats of the policy's loss) ->
(this microbatch's part of the loss, stats with those of values)."""

VALUE_INPUT: Mapping[str, Callable[[jax.Array], jax.Array]] = {
    "head": jax.lax.stop_gradient,
    "all": lambda hidden: hidden,
}
"""`LearnerConfig.value_gradient` → the value head's input, from hidden states."""


def value_objective(config: LearnerConfig) -> ValueObjective:
    """c · Σ_r w ℓ, ℓ of `clipped_value_loss`."""

    def objective(
        policy: TrainablePolicy, params: Params, hidden: jax.Array, tokens: ValueTokens, stats: Stats
    ) -> tuple[jax.Array, Stats]:
        values = policy.values(params, VALUE_INPUT[config.value_gradient](hidden))
        losses = clipped_value_loss(values, tokens.values, tokens.returns, clip=config.value_clip)
        total = lambda x: jnp.sum(tokens.weights * x, where=tokens.weights > 0)
        loss = total(losses.loss)
        means = {"value_loss": loss, "value_clip_fraction": total(losses.clipped.astype(loss.dtype))}
        return config.value_coefficient * loss, stats._replace(means=jax.lax.stop_gradient(means))

    return objective


def first_tokens(response_ids: jax.Array) -> jax.Array:
    """bool[b, T], the first token of each response; the position before it holds the value of its state.

    Args:
        response_ids: i32[b, T]; -1 outside responses. A row never begins with a sampled token.
    """
    return (response_ids >= 0) & (response_ids != jnp.roll(response_ids, 1, axis=1))


def add_values(table: jax.Array, values: jax.Array, response_ids: jax.Array) -> jax.Array:
    """Writes the values of a microbatch's responses into the table of responses.

    Args:
        table: f32[R].
        values: f32[b, T], of positions.
        response_ids: i32[b, T]; -1 outside responses.

    Returns:
        f32[R]; responses of other microbatches are unchanged.
    """
    first = first_tokens(response_ids)
    rows = jnp.where(first, response_ids, table.shape[0])  # outside the table: dropped
    return table.at[rows].set(jnp.roll(values, 1, axis=1), mode="drop")
