"""GAGPO: generalised advantages against values that are means over visits of a state. arXiv 2605.13217."""

import jax
import jax.numpy as jnp

from aem_jax.advantage.estimators import Estimator, dr_grpo, grpo
from aem_jax.advantage.experience import Experience
from aem_jax.advantage.gae import gae_advantages
from aem_jax.advantage.gigpo import visits


def gagpo(
    experience: Experience,
    num_groups: int,
    *,
    estimator: Estimator = grpo,
    gamma: float = 0.95,
    gae_lambda: float = 0.95,
) -> jax.Array:
    """GAGPO: GAE without a value head; the value of a state is the mean return of its visits in the rollout group.

        V(s) = mean of G over the responses of the group to observation s,    G_r = Σ_j γ^j r_{turn + j}
        δ_k = r_k + γ V(s_{k+1}) − V(s_k)        Â_k = Σ_l (γλ)^l δ_{k+l}        V = 0 after the last response
        A = estimator(Â)                          among all responses of one rollout group

    With λ = 1, Â_k = G_k − V(s_k), the centred step part of `gigpo`; with λ = 0, Â_k = δ_k. A state that was visited
    once has V = G. An empty response is skipped, and its reward is credited to earlier responses, as in
    `gae_advantages`. Its authors use it with one ratio for a response (`learner.ratio` response).

    Args:
        experience: one step's; `response_anchor` is equal for responses to the same observation.
        num_groups: number of rollout groups, static.
        estimator: `grpo` divides by the standard deviation of the group's responses, `dr_grpo` only centres.
        gamma: γ, in [0, 1]; it discounts responses, not tokens.
        gae_lambda: λ, in [0, 1]: 0 uses the next value alone, 1 the rewards alone.

    Returns:
        float[R], no unit; 0 for responses that take no part.

    Raises:
        ValueError: on wrong shapes or dtypes, ids known to lie outside their tables, or γ or λ outside [0, 1].
    """
    groups, anchors, step_returns = visits(experience, num_groups, gamma)
    deviations = dr_grpo(step_returns, anchors, anchors.shape[0])  # G − V(s)
    # With r = G − γ G', δ is (G − V) − γ (G' − V'): GAE of rewards 0 and values V − G. In this form equal returns have
    # an advantage of exactly 0, where V − G is rounded otherwise than r + γ V' − V, and σ is close to 0.
    relative = experience._replace(
        response_rewards=jnp.zeros_like(step_returns), response_values=jnp.where(groups >= 0, -deviations, jnp.nan)
    )
    advantages = gae_advantages(relative, num_groups, gamma=gamma, gae_lambda=gae_lambda)
    return estimator(advantages, groups, num_groups)
