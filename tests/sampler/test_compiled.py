"""The sampler's compiled programs: no recompilation, the state is donated, the decode loop copies no cache."""

import math
import re
from dataclasses import replace
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conversation import play, script
from small_policies import DEEP, GROUPED_TIED, numpy_params

from aem_jax.models import Policy
from aem_jax.plan.costs import costs
from aem_jax.plan.hlo import read
from aem_jax.sampler import Sampler, SamplingConfig
from aem_jax.sampler.reshard import abstract_sampled
from aem_jax.sharding import MeshConfig, make_mesh

POLICY = Policy(GROUPED_TIED)
PARAMS = numpy_params(GROUPED_TIED)
CACHES = ("model", "int8")
SLOTS, CAPACITY, SLACK, CHUNK = 6, 500, 12, 8


def make(cache: Literal["model", "int8"] = "model", policy: Policy = POLICY) -> Sampler:
    sampling = SamplingConfig(1.0, cache=cache)
    return Sampler(policy, sampling, (5,), capacity=CAPACITY, slack=SLACK, windows=(32, 64))


def decode_program(sampler: Sampler, window: int = CAPACITY, slots: int = SLOTS):
    state = jax.eval_shape(lambda: sampler.init(slots))
    budgets = jax.ShapeDtypeStruct((slots,), jnp.int32)
    shapes = sampler.policy.shapes
    return sampler._decode.lower(shapes, state, budgets, None, num_tokens=CHUNK, window=window).compile()


def extend_program(sampler: Sampler, window: int = CAPACITY):
    state = jax.eval_shape(lambda: sampler.init(SLOTS))
    ids = jax.ShapeDtypeStruct((SLOTS, SLACK), jnp.int32)
    return sampler._extend.lower(
        POLICY.shapes, state, ids, jax.ShapeDtypeStruct((SLOTS,), jnp.int32), None, window=window
    ).compile()


def fork_program(sampler: Sampler, window: int):
    state, prompts = jax.eval_shape(lambda: (sampler.init(SLOTS), sampler.init(2, 64)))
    source, prng = jax.ShapeDtypeStruct((SLOTS,), jnp.int32), jax.ShapeDtypeStruct((SLOTS, 2), jnp.uint32)
    return sampler._fork.lower(state, prompts, source, prng, window=window).compile()


def test_nothing_compiles_after_warm_up():
    sampler = make()
    assert sampler.compilations == 0
    play(sampler, PARAMS, {slot: script(POLICY, slot) for slot in range(3)}, slots=SLOTS, chunks=(SLACK, CHUNK))
    warm = sampler.compilations
    assert warm >= 3
    for seed in (7, 8):
        lengths = np.random.RandomState(seed).randint(1, 30, 4).tolist()
        episodes = {slot: script(POLICY, 10 * seed + slot, lengths, budget=5 + seed) for slot in range(2, SLOTS)}
        play(sampler, PARAMS, episodes, slots=SLOTS, chunks=(SLACK, CHUNK))
    assert sampler.compilations == warm
    play(sampler, PARAMS, {0: script(POLICY, 1)}, slots=SLOTS, chunks=(SLACK, CHUNK - 1))
    assert sampler.compilations == warm + 1  # a new shape is seen


def test_each_sampler_counts_its_own_programs():
    """Compilations of another sampler in the process do not change a new sampler's count."""
    play(make(), PARAMS, {0: script(POLICY, 0)}, slots=SLOTS, chunks=(SLACK, CHUNK))
    assert make().compilations == 0


@pytest.mark.parametrize("cache", CACHES)
def test_donated_state_is_gone(cache):
    sampler = make(cache)
    state = sampler.init(SLOTS)
    after = sampler.extend(PARAMS, state, jnp.ones((SLOTS, 4), jnp.int32), jnp.full(SLOTS, 4, jnp.int32))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.cache))
    sampler.decode(PARAMS, after, jnp.full(SLOTS, 2, jnp.int32), CHUNK)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(after.cache))


@pytest.mark.parametrize("cache", CACHES)
def test_cache_is_aliased_not_copied(cache):
    """Keys and values are returned in their input buffers; other memory does not grow with capacity."""
    # Codes take a quarter of float32. With four times the capacity, a copy of them would still be visible.
    capacity = CAPACITY if cache == "model" else 4 * CAPACITY
    sampler = Sampler(POLICY, SamplingConfig(1.0, cache=cache), (5,), capacity=capacity, slack=SLACK, windows=(32,))
    cached = sampler.abstract(SLOTS).cache.num_bytes
    for make_program in (decode_program, extend_program, fork_program):
        memory = make_program(sampler, window=32).memory_analysis()
        assert memory is not None
        assert memory.alias_size_in_bytes >= cached
        assert memory.temp_size_in_bytes < 0.25 * cached, make_program


def while_bodies(text: str | None) -> str:
    """The instructions of all loop bodies of a compiled program and of the computations that they call."""
    assert text is not None
    computations = dict(re.findall(r"^(?:ENTRY )?%?([\w.\-]+) \(.*?\) -> .*? \{\n(.*?)^\}", text, re.M | re.S))
    todo = re.findall(r"body=%?([\w.\-]+)", text)
    seen: dict[str, str] = {}
    while todo:
        name = todo.pop()
        if name not in seen:
            seen[name] = computations[name]
            todo += re.findall(r"(?:calls|to_apply|body)=%?([\w.\-]+)", seen[name])
    assert seen
    return "\n".join(seen.values())


@pytest.mark.parametrize("cache", CACHES)
def test_a_prefix_is_copied_in_place(cache):
    """The program needs the memory of one slot's prefix, not of another cache."""
    sampler, window = make(cache), 64
    state = jax.eval_shape(lambda: sampler.init(SLOTS))
    slots = jax.ShapeDtypeStruct((SLOTS,), jnp.int32)
    memory = sampler._copy_prefix.lower(state, slots, slots, window=window).compile().memory_analysis()
    assert memory is not None
    prefix = state.cache.token_bytes * window
    assert memory.temp_size_in_bytes < 2 * prefix + 10_000 < state.cache.num_bytes / 2
    assert memory.alias_size_in_bytes > state.cache.num_bytes


def test_the_decode_loop_copies_no_cache():
    """No step makes an array of the window's size, for one layer or all: the cache is read in place."""
    window = 64
    body = while_bodies(decode_program(make(), window=window).as_text())
    made = re.findall(r"= f32\[([\d,]+)\]\S* (?!parameter|get-tuple-element|bitcast)[\w\-]+\(", body)
    sizes = {int(np.prod([int(n) for n in shape.split(",")])) for shape in made}
    c = GROUPED_TIED
    assert SLOTS * c.vocab_size in sizes  # the logits: proof that the decode loop was inspected
    of_a_layer = SLOTS * c.num_kv_heads * c.head_dim * window
    assert not sizes & {of_a_layer, c.num_layers * of_a_layer}


def test_no_layer_of_codes_is_widened_for_longer_than_it_is_used():
    """In 8 bits, a step widens the codes of a layer in the loop (a TPU does so inside the product), not before it."""
    window, c = 32, DEEP
    text = decode_program(make("int8", Policy(DEEP)), window=window).as_text() or ""
    of_a_layer = SLOTS * c.num_kv_heads * c.head_dim * window
    widened = re.compile(r"= f32\[([\d,]+)\]\S* (?!parameter|get-tuple-element|bitcast)[\w\-]+\(")
    sizes = lambda text: [math.prod(map(int, dims.split(","))) for dims in widened.findall(text)]
    body = while_bodies(text)
    assert of_a_layer in sizes(body)
    before = set(text.splitlines()) - set(body.splitlines())
    assert not {of_a_layer, c.num_layers * of_a_layer} & set(sizes("\n".join(before)))


def test_a_step_reads_weights_and_cache_once_at_any_depth():
    """24 layers: the bytes of a decode step, from the compiled program, are those of the weights and of the cache."""
    policy = Policy(replace(DEEP, num_layers=24, hidden_size=512, intermediate_size=2048, num_kv_heads=2))
    mesh, chunk = make_mesh(MeshConfig(), jax.devices()[:1]), 64
    sampler = Sampler(policy, SamplingConfig(1.0), (5,), capacity=CAPACITY, slack=chunk, mesh=mesh)
    params, state = abstract_sampled(policy.sampled, mesh), sampler.abstract(SLOTS)
    program = read(sampler.lower_decode(params, state, chunk).compile())
    floor = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params)) + state.cache.num_bytes
    assert floor < costs(program, chunk).bytes / chunk <= 1.15 * floor
