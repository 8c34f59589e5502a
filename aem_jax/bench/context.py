"""Decoding after contexts of growing length, and in caches of growing capacity: cost should follow the first alone.

What lies in the cache is zeros: nothing that is measured depends on it.
"""

from dataclasses import replace
from statistics import median

import jax
import jax.numpy as jnp

from aem_jax.bench.ceilings import ceilings
from aem_jax.bench.config import BenchConfig
from aem_jax.bench.measure import Measurement, summarise, timed
from aem_jax.bench.roofline import read, roofline
from aem_jax.bench.sampler import NEVER
from aem_jax.config.components import known_model
from aem_jax.models import Params, Policy
from aem_jax.plan.costs import costs
from aem_jax.sampler import Sampler, SamplingConfig


def run(config: BenchConfig) -> list[Measurement]:
    """Tokens a second: at each context in one cache that holds the longest, then at the shortest in larger caches."""
    policy = Policy(known_model(config.model))
    dtype = jnp.dtype(policy.config.dtype)
    params = jax.jit(lambda key: jax.tree.map(lambda leaf: leaf.astype(dtype), policy.init(key)))(jax.random.key(0))
    contexts = sorted(config.contexts)
    most = contexts[-1]
    pairs = [(context, most) for context in contexts] + [(contexts[0], capacity) for capacity in contexts[:-1]]
    return [_measure(config, policy, params, context, capacity, contexts) for context, capacity in pairs]


def _measure(
    config: BenchConfig, policy: Policy, params: Params, context: int, capacity: int, windows: list[int]
) -> Measurement:
    slots, new = config.slots, config.context_chunk
    sampler = Sampler(policy, SamplingConfig(), [NEVER], capacity=capacity + new, slack=new, windows=windows)
    state, window = sampler.init(slots), sampler.window_for(context)
    budgets, lengths = jnp.full(slots, new, jnp.int32), jnp.full(slots, context, jnp.int32)

    def decode() -> None:
        nonlocal state
        state, said = sampler.decode(params, replace(state, lengths=lengths + 0), budgets, new, window=window)
        said.tokens.block_until_ready()

    decode()
    before = sampler.compilations
    seconds = timed(decode, repeats=config.repeats)
    facts = {
        "recompiles": float(sampler.compilations - before),
        "cache_mb": state.cache.num_bytes / 1e6,
        "ms_a_token": 1e3 * median(seconds) / new,
    }
    program = sampler.lower_decode(params, sampler.abstract(slots), new, window=window).compile()
    line = roofline(costs(read(program), new), ceilings(policy.config.dtype))
    what = f"decode after {context:,} of {capacity:,}"
    shape = f"{config.model}, {slots} slots, {new} tokens, capacity {capacity:,}"
    return summarise("context", what, shape, "tokens/s", slots * new, seconds, roofline=line, facts=facts)
