"""A sampler whose decode follows each slot's length: the same tokens, one program, all slots in every call."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conversation import play, script
from small_policies import numpy_params

from aem_jax.models import ModelConfig, Policy
from aem_jax.models.decode_attention import DecodeAttention, attend_in_place, on_mesh
from aem_jax.models.ragged import attend_ragged
from aem_jax.sampler import Sampler, SamplingConfig
from aem_jax.sampler.sampler import KERNEL_POSITIONS
from aem_jax.sharding import DECODE, MeshConfig, make_mesh, shardings

POLICY = Policy(ModelConfig(64, 48, 80, 3, 4, 2, 16))
PARAMS = numpy_params(POLICY.config)
KERNELS = {
    "tpu": DecodeAttention(partial(attend_ragged, interpret=True), follows_lengths=True),
    "gpu": DecodeAttention(partial(attend_in_place, implementation="xla"), follows_lengths=True, in_place=True),
}
make = partial(Sampler, POLICY, SamplingConfig(1.0), (5,), capacity=64, slack=16, windows=(16, 32))


def sampler_on(sizes: tuple[int, int, int], kernel: str) -> tuple[Sampler, dict]:
    devices = jax.devices()[: int(np.prod(sizes))]
    mesh = make_mesh(MeshConfig(*sizes), devices)
    params = jax.device_put(PARAMS, shardings(mesh, POLICY.axes, DECODE))
    return make(mesh=mesh, attention=on_mesh(KERNELS[kernel], mesh)), params


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2)])
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_sample_what_xla_samples(sizes: tuple[int, int, int], kernel: str):
    wanted = {slot: script(POLICY, slot, (9, 4, 6)[: 1 + slot % 3]) for slot in range(6)}
    play(make(), PARAMS, wanted, slots=8)
    sampler, params = sampler_on(sizes, kernel)
    episodes = {slot: script(POLICY, slot, (9, 4, 6)[: 1 + slot % 3]) for slot in range(6)}
    state = play(sampler, params, episodes, slots=8)
    for slot, episode in wanted.items():
        assert [row.tolist() for row in episodes[slot].responses] == [row.tolist() for row in episode.responses]
        for one, other in zip(episodes[slot].logprobs, episode.logprobs, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-5)
    warm = sampler.compilations
    play(sampler, params, {3: script(POLICY, 9)}, slots=8, state=state)
    assert sampler.compilations == warm


@pytest.mark.parametrize("kernel", KERNELS)
def test_one_program_serves_all_windows(kernel: str):
    sampler, params = sampler_on((1, 1, 1), kernel)
    assert sampler.is_ragged and not make().is_ragged
    state, zeros = sampler.init(4), np.zeros(4, np.int32)
    assert state.cache.length % KERNEL_POSITIONS == 0
    before = sampler.compilations
    for window in sampler.windows:
        state, _ = sampler.decode(params, state, zeros, 8, window=window)
    assert sampler.compilations == before + 1
    with pytest.raises(ValueError, match="expected decode on all slots, since its cost follows their lengths, got 2"):
        sampler.decode(params, state, zeros[:2], 8, np.asarray([0, 1]))


def test_a_cache_that_is_written_in_place_is_donated_and_not_copied():
    sampler, params = sampler_on((1, 1, 1), "gpu")
    state = sampler.abstract(4)
    memory = sampler.lower_decode(params, state, 8).compile().memory_analysis()
    assert memory is not None and memory.alias_size_in_bytes >= state.cache.num_bytes
    real = sampler.init(4)
    after, _ = sampler.decode(params, real, jnp.full(4, 2, jnp.int32), 8)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(real.cache))
    assert after.lengths.tolist() == [2] * 4
