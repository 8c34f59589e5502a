"""Bytes of the KV caches before allocation, against those allocated; and the number of slots that fit."""

import dataclasses

import jax
import pytest
from small_policies import GROUPED_TIED

from aem_jax.models import Policy
from aem_jax.rollout import RolloutConfig
from aem_jax.rollout.prompt_cache import PromptCache
from aem_jax.rollout.rollout import GIB, cache_bytes, check_cache_memory
from aem_jax.sampler import Sampler, SamplingConfig
from aem_jax.sharding import MeshConfig, make_mesh

CONFIG = RolloutConfig(
    group_size=4,
    num_slots=16,
    num_cohorts=2,
    response_tokens=8,
    context_tokens=64,
    prompt_tokens=16,
    decode_chunk=8,
    extend_buckets=(8,),
)


def make_sampler(mesh=None):
    return Sampler(Policy(GROUPED_TIED), SamplingConfig(), [0], capacity=64, slack=CONFIG.slack, mesh=mesh)


@pytest.mark.parametrize("config", [None, MeshConfig(data=2, fsdp=1, tensor=2)])
def test_predicted_bytes_equal_the_allocated_ones(config):
    mesh = config and make_mesh(config, jax.devices()[:4])
    sampler = make_sampler(mesh)
    states = [sampler.init(8), sampler.init(8), PromptCache(sampler, CONFIG, 8)._state]
    one = lambda leaf: leaf.addressable_shards[0].data.nbytes
    assert cache_bytes(sampler, CONFIG, 16) == sum(map(one, jax.tree.leaves(states)))


def test_too_many_slots_are_refused_with_the_number_that_fits():
    sampler = make_sampler()
    fits = dataclasses.replace(CONFIG, cache_gib=cache_bytes(sampler, CONFIG, 10) / GIB)
    with pytest.raises(
        ValueError, match=r"--rollout.num-slots: expected at most 10 with KV caches .*cache_gib.* got 16"
    ):
        check_cache_memory(sampler, fits, None)
    assert "16 slots of 64 tokens" in check_cache_memory(sampler, CONFIG, None)
    with pytest.raises(ValueError, match="expected at most 10 .*the device's memory"):
        check_cache_memory(sampler, CONFIG, cache_bytes(sampler, CONFIG, 10))
    with pytest.raises(ValueError, match="expected none: even 2 do not fit"):
        check_cache_memory(sampler, CONFIG, 1)
