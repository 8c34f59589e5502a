"""Credit for multi-turn agents: AEM coefficients and the base advantages they scale. Imports jax alone.

    base = over_trajectories(grpo, returns, groups, G, response_trajectory)
    alpha = aem_coefficients(response_entropy(entropies, response_ids, R), groups[response_trajectory], G)
    advantages = token_advantages(alpha * base, response_ids)

Every function takes and returns arrays of static shape, so it runs under `jit`, `vmap` and on sharded batches.
Method: *AEM: Adaptive Entropy Modulation for Multi-Turn Agentic Reinforcement Learning*, arXiv 2605.00425.
"""

from aem_jax.advantage.aem import (
    CoefficientStatistics,
    aem_coefficients,
    aem_scale,
    coefficient_statistics,
    relative_entropy,
    token_advantages,
)
from aem_jax.advantage.empg import empg
from aem_jax.advantage.estimators import Estimator, Scope, dr_grpo, grpo, maxrl, over_trajectories, over_turns, rloo
from aem_jax.advantage.experience import Experience, ResponseAdvantages, of_returns
from aem_jax.advantage.gae import ValueTargets, explained_variance, gae, gae_advantages, value_returns
from aem_jax.advantage.gagpo import gagpo
from aem_jax.advantage.gigpo import gigpo
from aem_jax.advantage.hgpo import hgpo
from aem_jax.advantage.reinforce import (
    by_response,
    by_token,
    by_trajectory,
    reinforce_plus_plus,
    reinforce_plus_plus_baseline,
    rewards_to_go,
    whiten,
)
from aem_jax.advantage.surprisal import response_entropy, token_statistics

__all__ = [
    "CoefficientStatistics",
    "Estimator",
    "Experience",
    "ResponseAdvantages",
    "Scope",
    "ValueTargets",
    "aem_coefficients",
    "aem_scale",
    "by_response",
    "by_token",
    "by_trajectory",
    "coefficient_statistics",
    "dr_grpo",
    "empg",
    "explained_variance",
    "gae",
    "gae_advantages",
    "gagpo",
    "gigpo",
    "grpo",
    "hgpo",
    "maxrl",
    "of_returns",
    "over_trajectories",
    "over_turns",
    "reinforce_plus_plus",
    "reinforce_plus_plus_baseline",
    "relative_entropy",
    "response_entropy",
    "rewards_to_go",
    "rloo",
    "token_advantages",
    "token_statistics",
    "value_returns",
    "whiten",
]
