"""One step's experience as tables: the input of estimators that use more than returns."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from aem_jax.advantage._checks import (
    id_array,
    mask_array,
    members,
    one_axis,
    real_array,
    same_shape,
    static_count,
    take,
)
from aem_jax.advantage.estimators import Estimator, Scope

Array: TypeAlias = Any
"""np.ndarray or jax.Array."""


class Experience(NamedTuple):
    """N trajectories and their R responses. Both tables may have unused rows.

    A row that takes no part does not influence the advantages of other rows, with two exceptions. In a valid
    trajectory, the reward of an empty response (`response_valid` False) is credited to earlier responses, and its
    observation is part of the history of later ones (`hgpo`). Padding has reward 0 and an arbitrary trajectory.
    """

    returns: Array
    """float[N], undiscounted sum of the trajectory's rewards."""
    group_ids: Array
    """int[N], rollout group; -1 for none."""
    valid: Array
    """bool[N], which trajectories take part."""
    response_trajectory: Array
    """int[R], the trajectory that a response belongs to; -1 for none."""
    response_turn: Array
    """int[R], its turn, from 0."""
    response_rewards: Array
    """float[R], its reward."""
    response_tokens: Array
    """int[R], its length in tokens."""
    response_anchor: Array
    """int[R], in [0, R): equal for responses of one group to equal observations; -1 for none."""
    response_valid: Array
    """bool[R], which responses take part, if their trajectory does."""
    response_values: Array | None = None
    """float[R], value of the state before the response, in units of reward; NaN where there is no value. None for
    estimators that need none."""
    response_entropies: Array | None = None
    """float[R], mean token entropy of the response, nats; NaN where it has no token in the loss. None for estimators
    that need none."""


ResponseAdvantages = Callable[[Experience, int], jax.Array]
"""(experience, num_groups) -> float[R], the base advantage of each response; 0 where it takes no part. `num_groups` is
static."""


def of_returns(scope: Scope, estimator: Estimator) -> ResponseAdvantages:
    """Advantages that follow from trajectories' returns alone.

        A = scope(estimator, returns, …)

    Args:
        scope: `over_trajectories` or `over_turns`.
        estimator: `grpo`, `dr_grpo`, `rloo`, `maxrl`, a partial of them, or your own.

    Returns:
        A function of an `Experience`.
    """

    def advantages(experience: Experience, num_groups: int) -> jax.Array:
        response_valid = mask_array("response_valid", experience.response_valid)
        trajectory = jnp.where(response_valid, experience.response_trajectory, -1)
        return scope(
            estimator, experience.returns, experience.group_ids, num_groups, trajectory, valid=experience.valid
        )

    return advantages


def response_groups(experience: Experience, num_groups: int) -> jax.Array:
    """int[R], the rollout group of each response; -1 where it takes no part.

    Raises:
        ValueError: on wrong shapes or dtypes, or ids known to lie outside their tables.
    """
    num_groups = static_count("num_groups", num_groups)
    group_ids = id_array("group_ids", experience.group_ids, num_groups)
    returns, rewards = (real_array(name, getattr(experience, name)) for name in ("returns", "response_rewards"))
    one_axis("returns", returns)
    one_axis("response_rewards", rewards)
    valid, response_valid = (mask_array(name, getattr(experience, name)) for name in ("valid", "response_valid"))
    trajectory = id_array("response_trajectory", experience.response_trajectory, returns.shape[0])
    anchors = id_array("response_anchor", experience.response_anchor, rewards.shape[0])
    turns, tokens = (jnp.asarray(getattr(experience, name)) for name in ("response_turn", "response_tokens"))
    same_shape(returns=returns, group_ids=group_ids, valid=valid)
    same_shape(
        response_rewards=rewards,
        response_trajectory=trajectory,
        response_turn=turns,
        response_tokens=tokens,
        response_anchor=anchors,
        response_valid=response_valid,
    )
    taking_part = jnp.where(members(group_ids, num_groups, valid), group_ids, -1)
    return jnp.where(response_valid, take(taking_part, trajectory, -1), -1)


def adjacent_rows(trajectory: jax.Array, turn: jax.Array, used: jax.Array, offset: int) -> jax.Array:
    """int[R], the row of the same trajectory's turn `turn + offset`; -1 where there is none.

    Args:
        trajectory: int[R].
        turn: int[R], each at most once among the used rows of a trajectory.
        used: bool[R], rows that count. Padding can share a trajectory and a turn with a true row.
        offset: 1 for the next turn, -1 for the previous one.
    """
    # Unused rows are sorted behind all trajectories, so the rows of a trajectory are neighbours, in order of turns.
    order = jnp.lexsort((turn, trajectory, ~used))
    here, there = order, jnp.roll(order, -offset)
    follows = used[here] & used[there] & (trajectory[here] == trajectory[there]) & (turn[there] - turn[here] == offset)
    return jnp.full(order.shape, -1, order.dtype).at[here].set(jnp.where(follows, there, -1))
