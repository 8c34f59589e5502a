"""GRPO, AEM's coefficient and the broadcast to tokens, jitted: what credit costs in a step."""

from functools import partial

import jax
import jax.numpy as jnp

from aem_jax.advantage import aem_coefficients, grpo, over_trajectories, response_entropy, token_advantages
from aem_jax.bench.ceilings import ceilings
from aem_jax.bench.config import BenchConfig
from aem_jax.bench.measure import Measurement, summarise, timed
from aem_jax.bench.roofline import read, roofline
from aem_jax.plan.costs import costs

TOKENS = 64
"""Tokens of a response."""


def run(config: BenchConfig) -> list[Measurement]:
    """Tokens a second, with and without AEM."""
    trajectories, turns = config.trajectories, config.turns
    num_groups, responses = trajectories // 8, trajectories * turns
    returns = jax.random.bernoulli(jax.random.key(0), 0.5, (trajectories,)).astype(jnp.float32)
    entropies = jax.random.uniform(jax.random.key(1), (trajectories, turns * TOKENS))
    ids = jnp.arange(responses).repeat(TOKENS).reshape(trajectories, turns * TOKENS)
    groups = jnp.arange(trajectories) // 8
    of_response = jnp.arange(responses) // turns

    @partial(jax.jit, static_argnames="with_aem")
    def credit(returns, entropies, *, with_aem: bool):
        advantages = over_trajectories(grpo, returns, groups, num_groups, of_response)
        if with_aem:
            surprise = response_entropy(entropies, ids, responses)
            advantages = advantages * aem_coefficients(surprise, groups[of_response], num_groups)
        return token_advantages(advantages, ids)

    def measured(label: str, with_aem: bool) -> Measurement:
        work = responses * TOKENS
        seconds = timed(
            lambda: credit(returns, entropies, with_aem=with_aem).block_until_ready(), repeats=config.repeats
        )
        cost = costs(read(credit.lower(returns, entropies, with_aem=with_aem).compile()))
        line = roofline(cost, ceilings("float32"))
        return summarise("advantage", label, shape, "tokens/s", work, seconds, roofline=line)

    shape = f"{trajectories} episodes × {turns} turns × {TOKENS} tokens"
    return [measured("GRPO", False), measured("GRPO + AEM", True)]
