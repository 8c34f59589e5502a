"""GiGPO: groups inside the rollout group, of turns in the same state. arXiv 2505.10978; METHOD §5."""

import jax
import jax.numpy as jnp

from aem_jax.advantage._checks import id_array
from aem_jax.advantage.estimators import Estimator, Scope, grpo, over_trajectories
from aem_jax.advantage.experience import Experience, of_returns, response_groups
from aem_jax.advantage.reinforce import rewards_to_go


def gigpo(
    experience: Experience,
    num_groups: int,
    *,
    scope: Scope = over_trajectories,
    estimator: Estimator = grpo,
    gamma: float = 0.95,
    weight: float = 1.0,
) -> jax.Array:
    """GiGPO: the episode's advantage, plus the step's advantage among all steps from the same state.

        A = A_E + w · A_S
        A_E = estimator(returns)                          among trajectories of one rollout group
        A_S = estimator(G), G_r = Σ_k γ^k r_{turn + k}    among responses of one group to one anchor observation

    A state that was visited once has A_S = 0. A trajectory that returns to a state is in that state's group once for
    each visit.

    Args:
        experience: one step's; `response_anchor` is equal for responses to the same observation.
        num_groups: number of rollout groups, static.
        scope: of A_E: `over_trajectories` or `over_turns`.
        estimator: `grpo` divides by the standard deviation, `dr_grpo` only centres; of both parts.
        gamma: γ, in [0, 1].
        weight: w.

    Returns:
        float[R]; 0 for responses that take no part.

    Raises:
        ValueError: on wrong shapes or dtypes, ids known to lie outside their tables, or γ outside [0, 1].
    """
    _, anchors, step_returns = visits(experience, num_groups, gamma)
    episode = of_returns(scope, estimator)(experience, num_groups)
    return episode + weight * estimator(step_returns, anchors, anchors.shape[0])


def visits(experience: Experience, num_groups: int, gamma: float) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Responses as visits of states: (rollout group int[R], anchor int[R], discounted reward to go float[R]).

    Group and anchor are -1 where a response takes no part; an anchor is an id in [0, R).

    Raises:
        ValueError: on wrong shapes or dtypes, ids known to lie outside their tables, or γ outside [0, 1].
    """
    groups = response_groups(experience, num_groups)
    trajectory, turn = experience.response_trajectory, experience.response_turn
    step_returns = rewards_to_go(
        experience.response_rewards, trajectory, turn, jnp.shape(experience.returns)[0], gamma=gamma
    )
    anchors = jnp.where(groups >= 0, id_array("response_anchor", experience.response_anchor, groups.shape[0]), -1)
    return groups, anchors, step_returns
