"""REINFORCE++ and its baseline form: rewards to go, whitened over the batch. arXiv 2501.03262; METHOD §5.

Other estimators normalise by task group; these normalise over the batch, so that a group with close returns is not
amplified. Implementations differ in the unit of the batch's mean, so it is an argument: every response (`by_response`),
or every token with the value of its response (`by_token`, as in the published implementations).
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from aem_jax.advantage._checks import id_array, mask_array, not_negative, one_axis, real_array, same_shape, take
from aem_jax.advantage._segments import centred, over_deviation
from aem_jax.advantage.experience import Experience, response_groups

Weighing = Callable[[Experience], jax.Array]
"""experience -> float[R], the weight of each response in a mean."""


def by_response(experience: Experience) -> jax.Array:
    """Every response counts once: w_r = 1."""
    return jnp.ones(jnp.shape(experience.response_rewards), jnp.float32)


def by_token(experience: Experience) -> jax.Array:
    """Every token counts once, with its response's value: w_r = n_r."""
    return jnp.asarray(experience.response_tokens).astype(jnp.float32)


def by_trajectory(experience: Experience) -> jax.Array:
    """Every trajectory counts once, its responses share: w_r = 1 / (responses of r's trajectory)."""
    response_valid = mask_array("response_valid", experience.response_valid)
    trajectory = jnp.asarray(experience.response_trajectory)
    counts = jax.ops.segment_sum(response_valid.astype(jnp.float32), trajectory, jnp.shape(experience.returns)[0])
    return 1.0 / jnp.maximum(take(counts, trajectory, 1.0), 1.0)


def rewards_to_go(
    rewards: ArrayLike, trajectory: ArrayLike, turn: ArrayLike, num_trajectories: int, *, gamma: float
) -> jax.Array:
    """Discounted sum of rewards from each response on.

        G_r = Σ_{r' of the same trajectory, turn_r' ≥ turn_r} γ^(turn_r' − turn_r) · reward_r'

    Computed from the last turn to the first, one turn of all trajectories at a time, so that equal endings give bitwise
    equal returns (a group of equal returns must have no advantage).

    Args:
        rewards: float[R].
        trajectory: int[R], in any order; -1 for none.
        turn: int[R], from 0, each at most once in a trajectory.
        num_trajectories: static.
        gamma: γ, in [0, 1].

    Returns:
        float[R], in units of reward; 0 where there is no trajectory.

    Raises:
        ValueError: on wrong shapes or dtypes, ids known to lie outside [-1, num_trajectories), or γ outside [0, 1].
    """
    if not 0 <= gamma <= 1:
        raise ValueError(f"expected gamma in [0, 1], got {gamma}")
    rewards = real_array("rewards", rewards)
    one_axis("rewards", rewards)
    trajectory, turn = id_array("trajectory", trajectory, num_trajectories), jnp.asarray(turn)
    same_shape(rewards=rewards, trajectory=trajectory, turn=turn)
    return _discounted(rewards, trajectory, turn, num_trajectories, gamma)


@partial(jax.jit, static_argnums=3)  # a loop outside jit would be compiled at every call
def _discounted(
    rewards: jax.Array, trajectory: jax.Array, turn: jax.Array, num_trajectories: int, gamma: float
) -> jax.Array:
    inside = (trajectory >= 0) & (trajectory < num_trajectories)
    last = jnp.max(turn, where=inside, initial=-1)

    def one_turn(count: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        running, to_go = carry
        now = inside & (turn == last - count)
        running = jax.ops.segment_sum(jnp.where(now, rewards, 0.0), trajectory, num_trajectories) + gamma * running
        return running, jnp.where(now, take(running, trajectory, 0.0), to_go)

    start = jnp.zeros(num_trajectories, rewards.dtype), jnp.zeros_like(rewards)
    return jax.lax.fori_loop(0, last + 1, one_turn, start)[1]


def whiten(values: ArrayLike, weights: ArrayLike, *, ddof: int = 0, eps: float = 1e-6) -> jax.Array:
    """Values of weighted mean 0 and weighted standard deviation 1.

        A_r = (x_r − μ) / (σ + eps)    μ = Σ w x / Σ w    σ² = Σ w (x − μ)² / (Σ w − ddof)

    Equal values get exactly 0. Where Σ w is not above ddof, σ is 0.

    Args:
        values: float[R].
        weights: float[R], >= 0; a row of weight 0 takes no part.
        ddof: 0 for the population's standard deviation, 1 for the sample's, with weights as counts.
        eps: added to σ, in units of the values.

    Returns:
        float[R], no unit; 0 for rows that take no part.

    Raises:
        ValueError: on wrong shapes or dtypes, ddof not 0 or 1, eps < 0.
    """
    if ddof not in (0, 1):
        raise ValueError(f"expected ddof 0 or 1, got {ddof!r}")
    not_negative("eps", eps)
    values, weights = real_array("values", values), real_array("weights", weights)
    one_axis("values", values)
    same_shape(values=values, weights=weights)
    deviations = centred(values, weights, jnp.zeros(weights.shape, jnp.int32), 1)
    total, count = jnp.sum(weights * deviations**2), jnp.sum(weights) - ddof
    variance = jnp.where(count > 0, total / jnp.where(count > 0, count, 1.0), 0.0)
    return over_deviation(deviations, variance, eps)


def reinforce_plus_plus(
    experience: Experience,
    num_groups: int,
    *,
    gamma: float = 1.0,
    whiten_by: Weighing = by_token,
    ddof: int = 0,
    eps: float = 1e-6,
) -> jax.Array:
    """REINFORCE++: the discounted reward to go of each response, whitened over the batch (arXiv 2501.03262).

        A_r = (G_r − μ_batch) / (σ_batch + eps)

    The KL penalty is in the loss (`k3`), not in the reward.

    Args:
        experience: one step's.
        num_groups: number of rollout groups, static.
        gamma: γ of `rewards_to_go`; it discounts turns, not tokens.
        whiten_by: the unit of μ and σ: `by_token` or `by_response`.
        ddof: of σ.
        eps: added to σ.

    Returns:
        float[R], no unit; 0 for responses that take no part.

    Raises:
        ValueError: on wrong shapes or dtypes, or numbers out of range.
    """
    groups, to_go = _to_go(experience, num_groups, gamma)
    return whiten(to_go, jnp.where(groups >= 0, whiten_by(experience), 0.0), ddof=ddof, eps=eps)


def reinforce_plus_plus_baseline(
    experience: Experience,
    num_groups: int,
    *,
    gamma: float = 1.0,
    centre_by: Weighing = by_trajectory,
    whiten_by: Weighing = by_token,
    ddof: int = 0,
    eps: float = 1e-6,
) -> jax.Array:
    """REINFORCE++-baseline: rewards to go, centred in their rollout group, then whitened over the batch.

        B_r = G_r − μ_group        A_r = (B_r − μ_batch) / (σ_batch + eps)

    (arXiv 2501.03262.) With γ = 1 and all reward in the last turn, B is `dr_grpo` over the scope of `centre_by`.

    Args:
        experience: one step's.
        num_groups: number of rollout groups, static.
        gamma: γ of `rewards_to_go`; it discounts turns, not tokens.
        centre_by: scope of μ_group: `by_trajectory` (each counts once) or `by_response` (long episodes weigh more).
        whiten_by: the unit of the batch's μ and σ: `by_token` or `by_response`.
        ddof: of σ.
        eps: added to σ.

    Returns:
        float[R], no unit; 0 for responses that take no part.

    Raises:
        ValueError: on wrong shapes or dtypes, or numbers out of range.
    """
    groups, to_go = _to_go(experience, num_groups, gamma)
    part = lambda weigh: jnp.where(groups >= 0, weigh(experience), 0.0)
    return whiten(centred(to_go, part(centre_by), groups, num_groups), part(whiten_by), ddof=ddof, eps=eps)


def _to_go(experience: Experience, num_groups: int, gamma: float) -> tuple[jax.Array, jax.Array]:
    """(group of each response, −1 where it takes no part; rewards to go)."""
    groups = response_groups(experience, num_groups)
    count = jnp.shape(experience.returns)[0]
    table = experience.response_rewards, experience.response_trajectory, experience.response_turn
    return groups, rewards_to_go(*table, count, gamma=gamma)
