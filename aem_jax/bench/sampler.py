"""Decoding and prefill with the slot sampler, and decoding after contexts of growing length.

`context` shows that the cost of decoding grows with the context, not with the capacity of the cache. Its cache holds
zeros, because the speed does not depend on the values.
"""

import sys
from collections.abc import Callable
from dataclasses import replace
from statistics import median
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from aem_jax.bench.config import BenchConfig
from aem_jax.bench.measure import Measurement, summarise, timed
from aem_jax.bench.trace import profile
from aem_jax.config.components import known_model
from aem_jax.models import Params, Policy
from aem_jax.plan.costs import costs
from aem_jax.plan.hlo import read
from aem_jax.sampler import Sampler
from aem_jax.sampler.reshard import make_reshard
from aem_jax.sharding import TRAIN, MeshConfig, make_mesh, replicated, shardings

NEVER = -1
"""A stop id that equals no token: every slot samples all of its tokens."""


class Random(NamedTuple):
    """A policy to sample from, with random parameters, on one device.

    Attributes:
        policy: the policy of the parameters.
        params: in the layout of sampling.
        mesh: of the first device.
    """

    policy: Policy
    params: Params
    mesh: Mesh


def random_policy(model: str, *, int8: bool = False) -> Random:
    """A known model; `int8` is of its weights."""
    policy, mesh = Policy(known_model(model)), make_mesh(MeshConfig(), jax.devices()[:1])
    masters = jax.jit(policy.init, out_shardings=shardings(mesh, policy.axes, TRAIN))(jax.random.key(0))
    return Random(policy.quantized if int8 else policy, make_reshard(policy, mesh, int8=int8)(masters), mesh)


def measure_sampler(config: BenchConfig) -> list[Measurement]:
    """Prompt tokens and sampled tokens per second; each slot samples `new_tokens` tokens after its prompt."""
    slots, prompt, new = config.slots, config.prompt_tokens, config.new_tokens
    policy, params, mesh = random_policy(config.model, int8=config.sampling.weights == "int8")
    sampler = Sampler(policy, config.sampling, [NEVER], capacity=prompt + new, slack=max(prompt, new), mesh=mesh)
    # On the mesh, as the lowered program has them: otherwise the roofline's program is compiled a second time.
    put = lambda array: jax.device_put(array, replicated(mesh))
    tokens = put(jax.random.randint(jax.random.key(1), (slots, prompt), 0, policy.config.vocab_size, jnp.int32))
    lengths, budgets, none = (put(jnp.full(slots, count, jnp.int32)) for count in (prompt, new, 0))
    # The sampler adds its slack: no room beyond prompt and new tokens, which the roofline would count as read.
    capacity = prompt + new - sampler.slack
    state = sampler.init(slots, capacity)

    def extend() -> None:
        nonlocal state
        state = sampler.rewind(state, none)
        state = sampler.extend(params, state, tokens, lengths)
        state.lengths.block_until_ready()

    def decode() -> None:
        nonlocal state
        state = sampler.rewind(state, lengths)
        state, sampled = sampler.decode(params, state, budgets, new)
        sampled.tokens.block_until_ready()

    def measure(what: str, sizes: str, count: int, call: Callable[[], None], lower: Callable[..., Any]) -> Measurement:
        seconds = timed(call, repeats=config.repeats)
        if config.trace:
            print(profile(call, config.trace, f"sampler-{what}"), file=sys.stderr, flush=True)
        program = lower(params, sampler.abstract(slots, capacity), count).compile()
        cost = costs(read(program), count)  # a loop of unknown length is decode's, over tokens
        shape = f"{config.model}, {slots} slots, {sizes}"
        work, dtype = slots * count, policy.config.dtype
        return summarise("sampler", what, shape, "tokens/s", work, seconds, cost=cost, dtype=dtype)

    return [
        measure("extend", f"{prompt} tokens", prompt, extend, sampler.lower_extend),
        measure("decode", f"{new} tokens after {prompt}", new, decode, sampler.lower_decode),
    ]


def measure_context(config: BenchConfig) -> list[Measurement]:
    """Tokens per second: each context in one cache that holds the longest, then the shortest in larger caches."""
    model = random_policy(config.model, int8=config.sampling.weights == "int8")
    contexts = sorted(config.contexts)
    largest = contexts[-1]
    pairs = [(context, largest) for context in contexts] + [(contexts[0], capacity) for capacity in contexts[:-1]]
    return [_decode_after(config, model, context, capacity, contexts) for context, capacity in pairs]


def _decode_after(config: BenchConfig, model: Random, context: int, capacity: int, windows: list[int]) -> Measurement:
    policy, params, mesh = model
    slots, new = config.slots, config.context_chunk
    sampler = Sampler(policy, config.sampling, [NEVER], capacity=capacity + new, slack=new, windows=windows, mesh=mesh)
    state, window = sampler.init(slots), sampler.window_for(context)
    budgets, lengths = jnp.full(slots, new, jnp.int32), jnp.full(slots, context, jnp.int32)

    def decode() -> None:
        nonlocal state
        # + 0: a copy, because the state is donated
        state, sampled = sampler.decode(params, replace(state, lengths=lengths + 0), budgets, new, window=window)
        sampled.tokens.block_until_ready()

    decode()
    before = sampler.compilations
    seconds = timed(decode, repeats=config.repeats)
    facts = {
        "recompiles": float(sampler.compilations - before),
        "cache_mb": state.cache.num_bytes / 1e6,
        "ms_a_token": 1e3 * median(seconds) / new,
    }
    program = sampler.lower_decode(params, sampler.abstract(slots), new, window=window).compile()
    cost, dtype = costs(read(program), new), policy.config.dtype
    what = f"decode after {context:,} of {capacity:,}"
    shape = f"{config.model}, {slots} slots, {new} tokens, capacity {capacity:,}"
    return summarise("context", what, shape, "tokens/s", slots * new, seconds, cost=cost, dtype=dtype, facts=facts)
