"""KV caches' bytes before they are allocated, against those that are; and how many slots would fit."""

import dataclasses

import jax
import pytest
from small_policies import GROUPED_TIED

from aem_jax.models import Policy
from aem_jax.rollout import RolloutConfig
from aem_jax.rollout.caches import GIB, cache_bytes, check_caches
from aem_jax.rollout.prompts import Prompts
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
def test_bytes_are_those_that_are_allocated(config):
    mesh = config and make_mesh(config, jax.devices()[:4])
    sampler = make_sampler(mesh)
    states = [sampler.init(8), sampler.init(8), Prompts(sampler, CONFIG, 8)._state]
    one = lambda leaf: leaf.addressable_shards[0].data.nbytes
    assert cache_bytes(sampler, CONFIG, 16) == sum(map(one, jax.tree.leaves(states)))


def test_too_many_slots_are_refused_and_those_that_fit_are_named():
    sampler = make_sampler()
    fits = dataclasses.replace(CONFIG, cache_gib=cache_bytes(sampler, CONFIG, 10) / GIB)
    with pytest.raises(
        ValueError, match=r"--rollout.num-slots: expected at most 10 with KV caches .*cache_gib.* got 16"
    ):
        check_caches(sampler, fits, None)
    assert "16 slots of 64 tokens" in check_caches(sampler, CONFIG, None)
    with pytest.raises(ValueError, match="expected at most 10 .*the device's memory"):
        check_caches(sampler, CONFIG, cache_bytes(sampler, CONFIG, 10))
    with pytest.raises(ValueError, match="expected none: even 2 do not fit"):
        check_caches(sampler, CONFIG, 1)
