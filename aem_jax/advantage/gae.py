"""PPO's advantages: rewards against the values of responses' states. arXiv 1506.02438; METHOD §5.

An action is a response, so V_k is the value of the state before the k-th response of a trajectory, and time runs over
responses, not over tokens: rewards belong to responses.

After the last response V = 0, for terminated and for truncated episodes: the limit is part of the task, and the state
after it was never observed.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from aem_jax.advantage._checks import float_array, same_shape, take
from aem_jax.advantage._segments import centred
from aem_jax.advantage.experience import Experience, response_groups
from aem_jax.advantage.reinforce import Weighing, by_token, whiten


class ValueTargets(NamedTuple):
    """Targets of a value head."""

    values: jax.Array
    """float[R], V before the update, in units of reward; NaN where there is none."""
    returns: jax.Array
    """float[R], the regression target of V, in units of reward; 0 where there is none."""


def gae_advantages(
    experience: Experience, num_groups: int, *, gamma: float = 1.0, gae_lambda: float = 1.0
) -> jax.Array:
    """Generalised advantage estimation over the responses of each trajectory (arXiv 1506.02438).

        δ_k = r_k + γ V_{k+1} − V_k        Â_k = Σ_l (γλ)^l δ_{k+l}        V = 0 after the last response

    A response without a value (NaN: it has no token, so no state in the batch) is skipped: with V_k = r_k + γ V_{k+1}
    its δ_k is 0, and its reward is credited to earlier responses. With γ = λ = 1, Â_k = Σ_{l ≥ k} r_l − V_k.

    Args:
        experience: one step's, with `response_values`.
        num_groups: number of rollout groups, static; groups only decide which trajectories take part.
        gamma: γ, in [0, 1]; it discounts responses, not tokens.
        gae_lambda: λ, in [0, 1]: 0 uses the next value alone, 1 the rewards alone.

    Returns:
        float[R], in units of reward; 0 for responses that take no part or have no value.

    Raises:
        ValueError: no values, wrong shapes or dtypes, or numbers out of range.
    """
    return _estimates(experience, num_groups, gamma, gae_lambda)[0]


def _estimates(experience: Experience, num_groups: int, gamma: float, gae_lambda: float) -> tuple[jax.Array, jax.Array]:
    """(Â, R) of each response; 0 where it takes no part or has no value."""
    for name, value in (("gamma", gamma), ("gae_lambda", gae_lambda)):
        if not 0 <= value <= 1:
            raise ValueError(f"expected {name} in [0, 1], got {value}")
    values, known = _values(experience, num_groups)
    rewards = jnp.asarray(experience.response_rewards).astype(values.dtype)
    trajectory, turn = (jnp.asarray(x) for x in (experience.response_trajectory, experience.response_turn))
    count = jnp.shape(experience.returns)[0]
    advantages, returns = _backwards(rewards, values, known, trajectory, turn, count, gamma, gae_lambda)
    return jnp.where(known, advantages, 0.0), jnp.where(known, returns, 0.0)


@partial(jax.jit, static_argnums=5)  # a loop outside jit would be compiled at every call
def _backwards(
    rewards: jax.Array,
    values: jax.Array,
    known: jax.Array,
    trajectory: jax.Array,
    turn: jax.Array,
    num_trajectories: int,
    gamma: float,
    gae_lambda: float,
) -> tuple[jax.Array, jax.Array]:
    """(Â, R) of each response, from the last turn of all trajectories to the first."""
    inside = (trajectory >= 0) & (trajectory < num_trajectories)
    last = jnp.max(turn, where=inside, initial=-1)
    total = lambda x, rows: jax.ops.segment_sum(jnp.where(rows, x, 0.0), trajectory, num_trajectories)

    def one_turn(count: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        value_after, advantage_after, return_after, advantages, returns = carry
        now = inside & (turn == last - count)
        reward, has_value = total(rewards, now), total(jnp.ones_like(rewards), now & known) > 0
        # Rows of padding share a trajectory and a turn with true ones; they have no reward and no value.
        ahead = reward + gamma * value_after
        value = jnp.where(has_value, total(values, now & known), ahead)
        advantage = (ahead - value) + gamma * gae_lambda * advantage_after
        total_return = reward + gamma * ((1 - gae_lambda) * value_after + gae_lambda * return_after)
        advantages = jnp.where(now, take(advantage, trajectory, 0.0), advantages)
        returns = jnp.where(now, take(total_return, trajectory, 0.0), returns)
        return value, advantage, total_return, advantages, returns

    start = (jnp.zeros(num_trajectories, rewards.dtype),) * 3
    return jax.lax.fori_loop(0, last + 1, one_turn, (*start, *(jnp.zeros_like(rewards),) * 2))[3:]


def gae(
    experience: Experience,
    num_groups: int,
    *,
    gamma: float = 1.0,
    gae_lambda: float = 1.0,
    whiten_by: Weighing = by_token,
    ddof: int = 0,
    eps: float = 1e-6,
) -> jax.Array:
    """PPO's base advantage: `gae_advantages`, whitened over the batch.

        A_r = (Â_r − μ_batch) / (σ_batch + eps)

    Args:
        experience: one step's, with `response_values`.
        num_groups: number of rollout groups, static.
        gamma: γ of `gae_advantages`.
        gae_lambda: λ of `gae_advantages`.
        whiten_by: the unit of μ and σ: `by_token` (as in published implementations) or `by_response`.
        ddof: of σ.
        eps: added to σ, in units of reward.

    Returns:
        float[R], no unit; 0 for responses that take no part or have no value.

    Raises:
        ValueError: no values, wrong shapes or dtypes, or numbers out of range.
    """
    advantages = gae_advantages(experience, num_groups, gamma=gamma, gae_lambda=gae_lambda)
    _, known = _values(experience, num_groups)
    return whiten(advantages, jnp.where(known, whiten_by(experience), 0.0), ddof=ddof, eps=eps)


def value_returns(experience: Experience, num_groups: int, *, gamma: float = 1.0, gae_lambda: float = 1.0) -> jax.Array:
    """The regression targets of values, λ-returns; neither whitened nor scaled by AEM.

        R_k = Â_k + V_k = r_k + γ ((1 − λ) V_{k+1} + λ R_{k+1})

    Computed in the second form. With λ = 1 no value is rounded into it, so equal rewards to go are bitwise equal, and
    `explained_variance` knows that there is no variance to explain.

    Args, Returns and Raises as `gae_advantages`.
    """
    return _estimates(experience, num_groups, gamma, gae_lambda)[1]


def explained_variance(values: ArrayLike, returns: ArrayLike, valid: ArrayLike) -> jax.Array:
    """Share of the returns' variance that the values explain.

        1 − Var(R − V) / Var(R)

    Args:
        values: float[R], V.
        returns: float[R], in the same unit.
        valid: bool[R], which rows count.

    Returns:
        float[], at most 1; 0 for any constant V, negative where V does worse; NaN where all returns are equal.

    Raises:
        ValueError: on wrong shapes or dtypes.
    """
    values, returns, valid = float_array("values", values), float_array("returns", returns), jnp.asarray(valid)
    same_shape(values=values, returns=returns, valid=valid)
    weights, everywhere = valid.astype(returns.dtype), jnp.zeros(valid.shape, jnp.int32)
    # Not jnp.var: the mean of equal numbers is rounded, and their variance would not be 0.
    square = lambda x: jnp.sum(centred(x, weights, everywhere, 1) ** 2)
    total = square(returns)
    return jnp.where(total > 0, 1 - square(returns - values) / jnp.where(total > 0, total, 1.0), jnp.nan)


def _values(experience: Experience, num_groups: int) -> tuple[jax.Array, jax.Array]:
    """(values, 0 where there is none; which responses take part and have one), checked."""
    groups = response_groups(experience, num_groups)
    if experience.response_values is None:
        raise ValueError("expected response_values, got none; fill Experience.response_values in from a value head")
    values = float_array("response_values", experience.response_values)
    same_shape(response_rewards=groups, response_values=values)
    known = (groups >= 0) & ~jnp.isnan(values)
    return jnp.where(known, values, 0.0), known
