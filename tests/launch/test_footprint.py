"""What fits: bytes of weights on each device, by shapes alone."""

import jax
import pytest

from aem_jax.launch.footprint import weight_bytes
from aem_jax.learner import LearnerConfig, make_optimizer
from aem_jax.models import LoraConfig, LoraPolicy, ModelConfig, Policy
from aem_jax.sharding import MeshConfig, make_mesh

GB = 10**9
QWEN_7B = ModelConfig(  # Qwen2.5-7B
    152_064, 3584, 18_944, 28, 28, 4, 128, tied_head=False, qk_norm=False, qkv_bias=True, dtype="bfloat16"
)
WHOLE = Policy(QWEN_7B)


def bytes_of(policy, fsdp=1, tensor=1, **learner):
    mesh = make_mesh(MeshConfig(1, fsdp, tensor), jax.devices()[: fsdp * tensor])
    return weight_bytes(policy, make_optimizer(LearnerConfig(**learner), policy.axes), mesh)


def test_a_7b_policy_fits_on_one_card_of_80_gb():
    assert QWEN_7B.num_parameters == 7_615_616_512
    found = bytes_of(LoraPolicy(WHOLE, LoraConfig(rank=32)))
    assert found["frozen"] == pytest.approx(2 * QWEN_7B.num_parameters, rel=1e-3)  # bfloat16, once; no masters
    # 2 x 32 numbers for each side of each projection: PEFT counts 80,740,352 as well
    assert found["trained"] == 4 * 80_740_352 and found["optimizer"] == 2 * found["trained"] + 8
    # merged projections; embedding, head and norms are the frozen ones' own buffers
    tables = 2 * 152_064 * 3584
    assert found["decode"] == pytest.approx(2 * (QWEN_7B.num_parameters - tables), rel=1e-3)
    assert sum(found.values()) < 32 * GB  # which leaves 48 GB for the cache and activations
    beside = bytes_of(LoraPolicy(WHOLE, LoraConfig(rank=32, merge=False)))
    assert beside["decode"] == 2 * 80_740_352 and sum(beside.values()) < 18 * GB


def test_all_weights_of_it_do_not():
    found = bytes_of(WHOLE, moments="int8")
    assert found["frozen"] == 0 and found["trained"] == 4 * QWEN_7B.num_parameters
    assert found["decode"] == pytest.approx(2 * QWEN_7B.num_parameters, rel=1e-3)
    assert sum(found.values()) > 100 * GB


def test_frozen_weights_that_are_split_for_learning_are_gathered_for_sampling():
    policy = LoraPolicy(WHOLE, LoraConfig(rank=32, merge=False))
    split, whole = bytes_of(policy, fsdp=4), bytes_of(policy)
    assert split["frozen"] < 0.26 * whole["frozen"]
    assert split["decode"] > 0.99 * whole["frozen"]  # all but norms and biases, which lie alike
    tensor = bytes_of(policy, tensor=4)
    assert tensor["decode"] < 0.02 * whole["frozen"]  # split alike for both: nothing is copied
