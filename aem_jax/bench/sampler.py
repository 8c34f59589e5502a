"""Decoding with the slot sampler: every slot says `new_tokens` tokens after a prompt that is in the cache."""

import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from aem_jax.bench.ceilings import ceilings
from aem_jax.bench.config import BenchConfig
from aem_jax.bench.measure import Measurement, summarise, timed
from aem_jax.bench.roofline import read, roofline
from aem_jax.bench.trace import profile
from aem_jax.config.components import known_model
from aem_jax.models import Policy
from aem_jax.plan.costs import costs
from aem_jax.sampler import Sampler, SamplingConfig

NEVER = -1
"""A stop id that no token is: every slot says all of its tokens."""


def run(config: BenchConfig) -> list[Measurement]:
    """Prompt tokens and sampled tokens a second."""
    slots, prompt, new = config.slots, config.prompt_tokens, config.new_tokens
    policy = Policy(known_model(config.model))
    dtype = jnp.dtype(policy.config.dtype)
    params = jax.jit(lambda key: jax.tree.map(lambda leaf: leaf.astype(dtype), policy.init(key)))(jax.random.key(0))
    sampler = Sampler(policy, SamplingConfig(), [NEVER], capacity=prompt + new, slack=max(prompt, new))
    tokens = jax.random.randint(jax.random.key(1), (slots, prompt), 0, policy.config.vocab_size, jnp.int32)
    whole, budgets = jnp.full(slots, prompt, jnp.int32), jnp.full(slots, new, jnp.int32)
    state = sampler.init(slots)

    def extend() -> None:
        nonlocal state
        state = sampler.rewind(state, jnp.zeros(slots, jnp.int32))
        state = sampler.extend(params, state, tokens, whole)
        state.lengths.block_until_ready()

    def decode() -> None:
        nonlocal state
        state = sampler.rewind(state, whole)
        state, said = sampler.decode(params, state, budgets, new)
        said.tokens.block_until_ready()

    def measured(
        what: str, shape: str, each: int, call: Callable[[], None], program: Callable[..., Any]
    ) -> Measurement:
        seconds = timed(call, repeats=config.repeats)
        if config.trace:
            print(profile(call, config.trace, f"sampler-{what}"), file=sys.stderr, flush=True)
        cost = costs(
            read(program(params, sampler.abstract(slots), each).compile()), each
        )  # decoding is a loop over its tokens
        line = roofline(cost, ceilings(policy.config.dtype))
        whole = f"{config.model}, {slots} slots, {shape}"
        return summarise("sampler", what, whole, "tokens/s", slots * each, seconds, roofline=line)

    return [
        measured("extend", f"{prompt} tokens", prompt, extend, sampler.lower_extend),
        measured("decode", f"{new} tokens after {prompt}", new, decode, sampler.lower_decode),
    ]
