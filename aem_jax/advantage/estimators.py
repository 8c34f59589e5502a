"""Base advantages from returns and groups, and the two scopes of their statistics. METHOD §5.

An estimator takes *rows*, each with a return and a group. The scope decides what a row is: `over_trajectories` has one
row for each trajectory, `over_turns` one for each response, so that long episodes weigh more in their group's mean. A
choice of estimator and scope is thus two functions:

    over_turns(functools.partial(grpo, ddof=1), returns, group_ids, num_groups, response_trajectory)
"""

from typing import Protocol

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from aem_jax.advantage._checks import (
    id_array,
    members,
    not_negative,
    one_axis,
    real_array,
    same_shape,
    static_count,
    take,
)
from aem_jax.advantage._segments import centred, over_deviation


class Estimator(Protocol):
    """The signature of `grpo`, `dr_grpo`, `rloo`, `maxrl` and partials of them."""

    def __call__(
        self, returns: ArrayLike, group_ids: ArrayLike, num_groups: int, *, valid: ArrayLike | None = None
    ) -> jax.Array:
        """Advantage of each row, [N]; 0 for rows that are not valid."""
        ...


class Scope(Protocol):
    """The signature of `over_trajectories` and `over_turns`."""

    def __call__(
        self,
        estimator: Estimator,
        returns: ArrayLike,
        group_ids: ArrayLike,
        num_groups: int,
        response_trajectory: ArrayLike,
        *,
        valid: ArrayLike | None = None,
    ) -> jax.Array:
        """Advantage of each response, [R]; 0 for those that take no part."""
        ...


def grpo(
    returns: ArrayLike,
    group_ids: ArrayLike,
    num_groups: int,
    *,
    ddof: int = 0,
    eps: float = 1e-6,
    valid: ArrayLike | None = None,
) -> jax.Array:
    """GRPO: returns centred and scaled inside their group (arXiv 2402.03300).

        A_i = (R_i − μ) / (σ + eps),    σ² = Σ (R_i − μ)² / (n − ddof)

    A group of one, or of equal returns, gets exactly 0.

    Args:
        returns: float[N], one a row, in units of reward.
        group_ids: int[N], group of each row, in any order; -1 for none.
        num_groups: number of groups, static.
        ddof: 0 for the population's standard deviation, 1 for the sample's. Implementations differ.
        eps: added to σ, in units of reward.
        valid: bool[N], which rows take part; all by default.

    Returns:
        float[N], no unit; 0 for rows that take no part.

    Raises:
        ValueError: on wrong shapes or dtypes, ids known to lie outside [-1, num_groups), ddof not 0 or 1, eps < 0.
    """
    if ddof not in (0, 1):
        raise ValueError(f"expected ddof 0 or 1, got {ddof!r}")
    not_negative("eps", eps)
    deviations, count, group_ids = _centre(returns, group_ids, num_groups, valid)
    squares = jax.ops.segment_sum(deviations**2, group_ids, num_groups)
    return over_deviation(deviations, take(squares / jnp.maximum(count - ddof, 1.0), group_ids, 0.0), eps)


def dr_grpo(returns: ArrayLike, group_ids: ArrayLike, num_groups: int, *, valid: ArrayLike | None = None) -> jax.Array:
    """Dr.GRPO: returns centred inside their group, without a scale that favours easy and hard tasks (arXiv 2503.20783).

        A_i = R_i − μ

    Its other half, a loss divided by a constant length, belongs to the loss.

    Args:
        returns: float[N], one a row, in units of reward.
        group_ids: int[N], group of each row, in any order; -1 for none.
        num_groups: number of groups, static.
        valid: bool[N], which rows take part; all by default.

    Returns:
        float[N], in units of reward; 0 for rows that take no part.

    Raises:
        ValueError: on wrong shapes or dtypes, or ids known to lie outside [-1, num_groups).
    """
    return _centre(returns, group_ids, num_groups, valid)[0]


def rloo(returns: ArrayLike, group_ids: ArrayLike, num_groups: int, *, valid: ArrayLike | None = None) -> jax.Array:
    """RLOO: each return against the mean of the *others* of its group (arXiv 2402.14740).

        A_i = R_i − Σ_{j≠i} R_j / (n − 1) = n/(n − 1) · (R_i − μ)

    A group of one has no others and gets 0.

    Args:
        returns: float[N], one a row, in units of reward.
        group_ids: int[N], group of each row, in any order; -1 for none.
        num_groups: number of groups, static.
        valid: bool[N], which rows take part; all by default.

    Returns:
        float[N], in units of reward; 0 for rows that take no part.

    Raises:
        ValueError: on wrong shapes or dtypes, or ids known to lie outside [-1, num_groups).
    """
    deviations, count, group_ids = _centre(returns, group_ids, num_groups, valid)
    return deviations * take(count / jnp.maximum(count - 1.0, 1.0), group_ids, 0.0)


def maxrl(
    returns: ArrayLike,
    group_ids: ArrayLike,
    num_groups: int,
    *,
    eps: float = 1e-6,
    valid: ArrayLike | None = None,
) -> jax.Array:
    """MaxRL: returns centred, and divided by their mean, so that rare successes weigh most (arXiv 2602.02710).

        A_i = (R_i − μ) / (μ + eps)    where μ > 0,    0 for the whole group elsewhere

    For returns of 0 and 1, μ estimates the success rate p, and the gradient is that of log p, up to the order in
    1 − p that the size of the group allows. Returns must be >= 0: they stand for a likelihood. A group without a
    success has μ = 0 and no gradient. Nor has a group whose penalties bring its mean to 0 or below; where penalties
    bring it close to 0 from above, its advantages grow without a bound. Equal returns get exactly 0.

    Args:
        returns: float[N], one a row, in units of reward, >= 0.
        group_ids: int[N], group of each row, in any order; -1 for none.
        num_groups: number of groups, static.
        eps: added to μ, in units of reward.
        valid: bool[N], which rows take part; all by default.

    Returns:
        float[N], no unit, >= −1 for returns >= 0; 0 for rows that take no part.

    Raises:
        ValueError: on wrong shapes or dtypes, ids known to lie outside [-1, num_groups), or eps < 0. Negative returns
            are not refused: under jit they cannot be seen.
    """
    not_negative("eps", eps)
    deviations, count, group_ids = _centre(returns, group_ids, num_groups, valid)
    weights = members(group_ids, num_groups, valid)
    total = jax.ops.segment_sum(jnp.where(weights, real_array("returns", returns), 0.0), group_ids, num_groups)
    mean = take(total / jnp.maximum(count, 1.0), group_ids, 0.0)
    return jnp.where(mean > 0, deviations / jnp.where(mean > 0, mean + eps, 1.0), 0.0)


def over_trajectories(
    estimator: Estimator,
    returns: ArrayLike,
    group_ids: ArrayLike,
    num_groups: int,
    response_trajectory: ArrayLike,
    *,
    valid: ArrayLike | None = None,
) -> jax.Array:
    """Trajectory scope: every trajectory counts once in its group's statistics, whatever its number of turns.

        A_r = estimator(R)[trajectory of r]

    Args:
        estimator: rows of returns → advantages, e.g. `grpo` or `functools.partial(grpo, ddof=1)`.
        returns: float[N], return of each trajectory.
        group_ids: int[N], group of each trajectory; -1 for none.
        num_groups: number of groups, static.
        response_trajectory: int[R], trajectory of each response; -1 for padding.
        valid: bool[N], which trajectories take part; all by default.

    Returns:
        float[R], advantage of each response; 0 for padding and for responses of trajectories that take no part.

    Raises:
        ValueError: as the estimator, and on response_trajectory known to lie outside [-1, N).
    """
    rows = estimator(returns, group_ids, num_groups, valid=valid)
    return take(rows, id_array("response_trajectory", response_trajectory, rows.shape[0]), 0.0)


def over_turns(
    estimator: Estimator,
    returns: ArrayLike,
    group_ids: ArrayLike,
    num_groups: int,
    response_trajectory: ArrayLike,
    *,
    valid: ArrayLike | None = None,
) -> jax.Array:
    """Turn scope: every response is a row that repeats its trajectory's return, so long episodes weigh more.

        A = estimator(R[trajectory of each response])

    Args:
        estimator: rows of returns → advantages; common implementations of this scope use ddof = 1.
        returns: float[N], return of each trajectory.
        group_ids: int[N], group of each trajectory; -1 for none.
        num_groups: number of groups, static.
        response_trajectory: int[R], trajectory of each response; -1 for padding.
        valid: bool[N], which trajectories take part; all by default.

    Returns:
        float[R], advantage of each response; 0 for padding and for responses of trajectories that take no part.

    Raises:
        ValueError: as the estimator, and on response_trajectory known to lie outside [-1, N).
    """
    returns, group_ids = real_array("returns", returns), id_array("group_ids", group_ids, num_groups)
    one_axis("returns", returns)
    same_shape(returns=returns, group_ids=group_ids)
    taking_part = members(group_ids, num_groups, valid)
    trajectory = id_array("response_trajectory", response_trajectory, returns.shape[0])
    return estimator(
        take(returns, trajectory, 0.0),
        take(group_ids, trajectory, -1),
        num_groups,
        valid=take(taking_part, trajectory, False),
    )


def _centre(
    returns: ArrayLike, group_ids: ArrayLike, num_groups: int, valid: ArrayLike | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Checks the arguments; returns R − μ of its group (f32[N], 0 where not valid), valid rows per group [G], ids."""
    num_groups = static_count("num_groups", num_groups)
    returns = real_array("returns", returns)
    group_ids = id_array("group_ids", group_ids, num_groups)
    one_axis("returns", returns)
    same_shape(returns=returns, group_ids=group_ids)
    weights = members(group_ids, num_groups, valid).astype(returns.dtype)
    count = jax.ops.segment_sum(weights, group_ids, num_groups)
    return centred(returns, weights, group_ids, num_groups), count, group_ids
