"""The value head's loss: one state a response, at the position that its first token is predicted from.

    L_V = Σ_r w ℓ(V_r, V_r before, R_r),  w = 1 / responses of the minibatch

Like the policy's it is a sum with weights fixed beforehand, so packing and microbatches change nothing. Values come out
of the hidden states that the policy's loss has anyway.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from aem_jax.learner.config import LearnerConfig
from aem_jax.learner.objective import Measures
from aem_jax.learner.state import Params
from aem_jax.losses import clipped_value_loss
from aem_jax.models import ValuePolicy


class ValueTokens(NamedTuple):
    """One microbatch as the value loss sees it, f32[b, T] each, at the first token of each response.

    Attributes:
        weights: share of each response in the minibatch's loss; 0 elsewhere, where nothing else is looked at.
        values: V before the first optimizer step, in units of reward.
        returns: R, in units of reward.
    """

    weights: jax.Array
    values: jax.Array
    returns: jax.Array


ValueObjective = Callable[[ValuePolicy, Params, jax.Array, ValueTokens, Measures], tuple[jax.Array, Measures]]
"""(policy, params, hidden [b, T, D] of the positions that predict the tokens, tokens, measures of the policy's loss) ->
(this microbatch's part of the loss, measures with those of values)."""

SEEN: Mapping[str, Callable[[jax.Array], jax.Array]] = {"head": jax.lax.stop_gradient, "all": lambda hidden: hidden}
"""`LearnerConfig.value_gradient` → hidden states as the value head sees them."""


def value_objective(config: LearnerConfig) -> ValueObjective:
    """c · Σ_r w ℓ, ℓ of `clipped_value_loss`."""

    def objective(
        policy: ValuePolicy, params: Params, hidden: jax.Array, tokens: ValueTokens, measures: Measures
    ) -> tuple[jax.Array, Measures]:
        found = policy.values(params, SEEN[config.value_gradient](hidden))
        each = clipped_value_loss(found, tokens.values, tokens.returns, clip=config.value_clip)
        total = lambda x: jnp.sum(tokens.weights * x, where=tokens.weights > 0)
        loss = total(each.loss)
        means = {"value_loss": loss, "value_clip_fraction": total(each.clipped.astype(loss.dtype))}
        return config.value_coefficient * loss, measures._replace(means=jax.lax.stop_gradient(means))

    return objective


def first_tokens(response_ids: jax.Array) -> jax.Array:
    """bool[b, T], where a response begins; the value of its state is that of the position before.

    Args:
        response_ids: i32[b, T]; -1 outside responses. A row never begins with a sampled token.
    """
    return (response_ids >= 0) & (response_ids != jnp.roll(response_ids, 1, axis=1))


def add_values(found: jax.Array, values: jax.Array, response_ids: jax.Array) -> jax.Array:
    """Puts the values of a microbatch's responses into the table.

    Args:
        found: f32[R].
        values: f32[b, T], of positions.
        response_ids: i32[b, T]; -1 outside responses.

    Returns:
        f32[R], with those of responses that lie elsewhere as they were.
    """
    first = first_tokens(response_ids)
    places = jnp.where(first, response_ids, found.shape[0])  # outside the table: dropped
    return found.at[places].set(jnp.roll(values, 1, axis=1), mode="drop")
