"""Slots over a mesh of 8 simulated devices sample the same as on one."""

import math
import re
from dataclasses import replace
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conversation import extend_slots, play, script
from small_policies import numpy_params, numpy_tokens

from aem_jax.models import ModelConfig, Policy
from aem_jax.models.decode_attention import CHUNKED
from aem_jax.models.kv_cache import KVChunk
from aem_jax.sampler import Sampler, SamplingConfig
from aem_jax.sampler.programs import Programs
from aem_jax.sampler.reshard import make_reshard
from aem_jax.sampler.sampling import make_sample_token
from aem_jax.sampler.state import state_axes
from aem_jax.sharding import DECODE, TRAIN, MeshConfig, make_mesh, shardings

CONFIG = ModelConfig(64, 48, 80, 3, 4, 2, 16)  # every split dimension divides by 2
POLICY = Policy(CONFIG)
POST_NORM = Policy(replace(CONFIG, norm_placement="post", qk_norm="projection"))  # its norms reduce over all heads


@pytest.mark.parametrize(
    ("sizes", "cache", "policy"),
    [
        ((8, 1, 1), "model", POLICY),
        ((2, 2, 2), "model", POLICY),
        ((1, 8, 1), "model", POLICY),
        ((2, 2, 2), "int8", POLICY),
        ((2, 2, 2), "model", POST_NORM),
    ],
)
def test_eight_devices_equal_one(sizes: tuple[int, int, int], cache: Literal["model", "int8"], policy: Policy):
    params = numpy_params(policy.config)
    make = partial(Sampler, policy, SamplingConfig(1.0, cache=cache), (5,), capacity=64, slack=16, windows=(32,))
    plain = make()
    wanted = {slot: script(policy, slot) for slot in range(6)}
    play(plain, params, wanted, slots=8)

    mesh = make_mesh(MeshConfig(*sizes))
    sampler = make(mesh=mesh)
    placed = jax.device_put(params, shardings(mesh, policy.axes, DECODE))
    episodes = {slot: script(policy, slot) for slot in range(6)}
    state = sampler.init(8)
    where = jax.tree.map(lambda leaf: leaf.sharding, state)
    for leaf in jax.tree.leaves(state.cache):
        assert leaf.addressable_shards[0].data.size * 8 == leaf.size
    state = play(sampler, placed, episodes, slots=8, state=state)
    assert jax.tree.map(lambda leaf: leaf.sharding, state) == where  # so the next call reuses its compiled program
    for slot in wanted:
        assert [row.tolist() for row in episodes[slot].responses] == [row.tolist() for row in wanted[slot].responses]
        for one, other in zip(episodes[slot].logprobs, wanted[slot].logprobs, strict=True):
            # In 8 bits, another order of summation may give the neighbouring code.
            np.testing.assert_allclose(one, other, atol=1e-5 if cache == "model" else 1e-2)
    with pytest.raises(ValueError, match=r"dimension .slots. divisible by"):
        sampler.init(3)
    warm = sampler.compilations
    play(sampler, placed, {3: script(policy, 9)}, slots=8, state=state)
    assert sampler.compilations == warm


@pytest.mark.parametrize("cache", ["model", "int8"])
def test_a_prefix_is_copied_within_a_shard(cache: Literal["model", "int8"]):
    """Slot 1 copies a part of slot 0, and slot 6 all of slot 7, without communication."""
    mesh = make_mesh(MeshConfig(2, 2, 2))
    make = partial(Sampler, POLICY, SamplingConfig(1.0, cache=cache), (5,), capacity=64, slack=16, windows=(32,))
    source, keep = np.asarray([-1, 0, -1, -1, -1, -1, 7, -1]), np.asarray([64, 3, 2, 64, 64, 64, 9, 64], np.int32)
    copied = []
    for sampler in (make(), make(mesh=mesh)):
        ids = {slot: numpy_tokens(CONFIG, (9,), slot) for slot in range(8)}
        state = extend_slots(sampler, numpy_params(CONFIG), sampler.init(8), ids, 16)
        before = jax.device_get(state)
        state = jax.device_get(sampler.copy_prefix(state, source, keep, window=32))
        for slot, at in ((1, 0), (6, 7)):
            of_slots = lambda state, slot: [leaf[slot] for leaf in jax.tree.leaves(state.cache)]
            for old, new in zip(of_slots(before, at), of_slots(state, slot), strict=True):
                axis = old.shape.index(64 + 16)
                np.testing.assert_array_equal(new.take(range(32), axis), old.take(range(32), axis))
            np.testing.assert_array_equal(state.hidden[slot], before.hidden[at])
        assert state.lengths.tolist() == np.where(source < 0, np.minimum(before.lengths, keep), keep).tolist()
        copied.append(state.lengths.tolist())
    assert copied[0] == copied[1]
    program = sampler._copy_prefix.lower(sampler.abstract(8), source, keep, window=32).compile()
    assert not re.search("all-gather|all-reduce|collective-permute|all-to-all", program.as_text() or "")
    with pytest.raises(ValueError, match="own shard of 2 slots"):
        sampler.copy_prefix(sampler.init(8), np.asarray([-1, -1, 1, -1, -1, -1, -1, -1]), keep)


def test_a_chunk_of_all_slots_is_merged_on_two_devices_without_a_scatter():
    """jax 0.11.2 crashes on a scatter over a whole array inside shard_map; `x.at[:].set(y)` is one in every version."""
    rng, slots, chunk = np.random.default_rng(0), 4, 2
    shape, layers = (slots, CONFIG.num_kv_heads), range(CONFIG.num_layers)
    draw = lambda *tail: jnp.float32(rng.normal(size=(*shape, *tail)))
    chunks = tuple(KVChunk(draw(CONFIG.head_dim, chunk), draw(chunk, CONFIG.head_dim)) for _ in layers)
    hidden = rng.normal(size=(slots, CONFIG.hidden_size))
    counts, sampled, remaining = np.asarray([[2, 0, 1, 2], [1, 0, 0, 2], [7, 0, 3, 2]], np.int32)
    arguments = (None, chunks, np.float32(hidden), counts, sampled, remaining)
    make = partial(Sampler, POLICY, SamplingConfig(), (5,), capacity=16, slack=4)
    state = replace(make().init(slots), lengths=np.asarray([0, 3, 5, 1], np.int32))
    merged = []
    for mesh in (None, make_mesh(MeshConfig(1, 2, 1), jax.devices()[:2])):
        axes = state_axes([False] * CONFIG.num_layers, int8=False)
        program = jax.jit(
            Programs(POLICY, make_sample_token(SamplingConfig()), (5,), mesh, CHUNKED, axes)._append_chunk
        )
        assert "scatter" not in program.lower(state, *arguments).as_text()
        merged.append(program(state, *arguments))
    jax.tree.map(np.testing.assert_array_equal, *merged)
    assert merged[1].lengths.tolist() == [2, 3, 6, 3]
    assert merged[1].sampled.tolist() == sampled.tolist() and merged[1].remaining.tolist() == remaining.tolist()


@pytest.mark.parametrize("int8", [False, True])
def test_a_decode_step_gathers_no_weights(int8: bool):
    """In the compiled program, devices exchange only activations of their slots, never weights."""
    policy = Policy(ModelConfig(512, 64, 192, 2, 4, 2, 24))
    mesh = make_mesh(MeshConfig(2, 2, 2))
    sampled = policy.quantized if int8 else policy
    sampler = Sampler(sampled, SamplingConfig(), (5,), capacity=96, slack=16, mesh=mesh)
    params, state = make_reshard(policy, mesh, int8=int8)(numpy_params(policy.config)), sampler.init(8)
    program = sampler._decode.lower(params, state, np.zeros(8, np.int32), None, num_tokens=8, window=96).compile()
    kinds = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
    moved = re.findall(rf"= (\(?\w+\[.*?) ({kinds})(?:-start)?\(", program.as_text() or "")
    assert {"all-gather", "all-reduce"} <= {kind for _, kind in moved}  # the draw's, and the split matrices' sums
    largest = max(
        math.prod(map(int, size.split(","))) for shape, _ in moved for size in re.findall(r"\w\[([\d,]+)\]", shape)
    )
    smallest = min(leaf.size // 2 for leaf in jax.tree.leaves(policy.shapes) if leaf.ndim > 2)
    assert largest <= 8 * 64 < smallest, moved


def test_codes_are_made_where_the_masters_lie():
    """Each device quantises its part with common scales. Codes are gathered, not float32 masters."""
    mesh = make_mesh(MeshConfig(1, 4, 2))
    masters = jax.device_put(numpy_params(CONFIG), shardings(mesh, POLICY.axes, TRAIN))
    reshard = make_reshard(POLICY, mesh, int8=True)
    actual = reshard(masters)
    wanted = POLICY.by_layer(POLICY.quantize(numpy_params(CONFIG)), lambda leaf, layer: leaf[layer])
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(one, other)
    where = jax.tree.map(lambda leaf: leaf.sharding, actual)
    assert where == shardings(mesh, POLICY.by_layer(POLICY.quantized.axes, lambda names, _: names[1:]), DECODE)
    text = reshard.lower(masters).compile().as_text() or ""  # pyright: ignore[reportFunctionMemberAccess]
    gathered = re.findall(r"= \(?(\w+)\[([\d,]*)\][^=]* all-gather(?:-start)?\(", text)
    assert {"s8"} <= {dtype for dtype, _ in gathered}
    for dtype, dims in gathered:
        assert dtype == "s8" or math.prod(map(int, dims.split(","))) <= CONFIG.vocab_size * CONFIG.hidden_size, gathered


def test_eight_devices_in_int8_equal_one():
    params, sampled = numpy_params(CONFIG), POLICY.quantized
    make = partial(Sampler, sampled, SamplingConfig(1.0), (5,), capacity=64, slack=16, windows=(32,))
    wanted, actual = ({slot: script(sampled, slot) for slot in range(4)} for _ in range(2))
    play(make(), POLICY.quantize(params), wanted, slots=8)
    mesh = make_mesh(MeshConfig(2, 2, 2))
    play(make(mesh=mesh), make_reshard(POLICY, mesh, int8=True)(params), actual, slots=8)
    for slot in wanted:
        assert [row.tolist() for row in actual[slot].responses] == [row.tolist() for row in wanted[slot].responses]
