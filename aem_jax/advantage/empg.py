"""EMPG: advantages of episodes, scaled by the entropy of each step, with a bonus for a certain next step.
arXiv 2509.09265."""

import jax
import jax.numpy as jnp

from aem_jax.advantage._checks import float_array, same_shape, take
from aem_jax.advantage._segments import centred
from aem_jax.advantage.aem import aem_coefficients, relative_entropy
from aem_jax.advantage.estimators import Estimator, Scope, grpo, over_trajectories
from aem_jax.advantage.experience import Experience, adjacent_rows, of_returns, response_groups


def empg(
    experience: Experience,
    num_groups: int,
    *,
    scope: Scope = over_trajectories,
    estimator: Estimator = grpo,
    strength: float = 1.0,
    bonus_strength: float = 1.0,
    bonus_weight: float = 0.05,
) -> jax.Array:
    """EMPG: the episode's advantage times a coefficient of the step's entropy, plus a bonus of the next step's.

        H̃ = (H̄ − min H̄) / (max H̄ − min H̄)          over all responses of the batch
        g = exp(−k H̃) / mean exp(−k H̃)               "self-calibrating gradient scaling"
        f = exp(−k′ H̃ of the next turn)               "future clarity"; 0 after the last turn of a trajectory
        B = g · A_E + ζ · f
        A = B − mean B                                 over all responses of the batch

    g is AEM's coefficient with the batch as its scope and no least range, so without the bonus A is AEM's, centred.
    AEM's own coefficient would scale by entropy twice: train EMPG with `aem.strength` 0. A next turn whose response is
    empty or out of the loss has no entropy, and gives no bonus. No gradient flows through entropies.

    Args:
        experience: one step's, with `response_entropies`.
        num_groups: number of rollout groups, static.
        scope: of A_E: `over_trajectories` or `over_turns`.
        estimator: of A_E, e.g. `grpo`, or `dr_grpo` to only centre.
        strength: k, no unit.
        bonus_strength: k′, no unit.
        bonus_weight: ζ, in units of A_E.

    Returns:
        float[R], of mean 0; 0 for responses that take no part or have no entropy.

    Raises:
        ValueError: no entropies, wrong shapes or dtypes, or ids known to lie outside their tables.
    """
    groups = response_groups(experience, num_groups)
    if experience.response_entropies is None:
        raise ValueError(
            "expected response_entropies, got none; fill Experience.response_entropies in, e.g. by response_entropy"
        )
    entropy = float_array("response_entropies", experience.response_entropies)
    same_shape(response_rewards=groups, response_entropies=entropy)
    part = (groups >= 0) & jnp.isfinite(entropy)
    batch = jnp.where(part, 0, -1)
    scaling = aem_coefficients(entropy, batch, 1, strength=strength, min_range=0.0)
    trajectory, turn = (jnp.asarray(x) for x in (experience.response_trajectory, experience.response_turn))
    clarity = jnp.exp(-bonus_strength * relative_entropy(entropy, batch, 1))
    following = adjacent_rows(trajectory, turn, part, 1)
    bonus = jax.lax.stop_gradient(take(clarity, following, 0.0))
    modulated = scaling * of_returns(scope, estimator)(experience, num_groups) + bonus_weight * bonus
    return centred(modulated, part.astype(modulated.dtype), batch, 1)
