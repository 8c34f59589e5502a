"""What fits: bytes of weights on each device, by shapes alone."""

import math

import jax
import optax
import pytest
from jax.sharding import Mesh

from aem_jax.learner import LearnerConfig, abstract_state, make_optimizer
from aem_jax.models import LoraConfig, LoraPolicy, ModelConfig, Policy
from aem_jax.sharding import DECODE, TRAIN, MeshConfig, make_mesh, shardings

GB = 10**9
QWEN_7B = ModelConfig(  # Qwen2.5-7B
    152_064, 3584, 18_944, 28, 28, 4, 128, tied_head=False, qk_norm=False, qkv_bias=True, dtype="bfloat16"
)
WHOLE = Policy(QWEN_7B)


def weight_bytes(policy: Policy | LoraPolicy, optimizer: optax.GradientTransformation, mesh: Mesh) -> dict[str, int]:
    """Bytes on each device.

    Args:
        policy: what is trained.
        optimizer: from `make_optimizer`.
        mesh: the mesh.

    Returns:
        frozen (weights beside an adapter), trained (float32 masters), optimizer, gradients (the sum over microbatches
        and the next one to add), decode (what is laid out for sampling and shares no buffer with the frozen ones).
    """
    state, whole = abstract_state(policy, optimizer, mesh), policy.whole
    train, decode = (shardings(mesh, whole.axes, rules, whole.shapes) for rules in (TRAIN, DECODE))
    size = lambda shaped, place, dtype: math.prod(place.shard_shape(shaped.shape)) * dtype.itemsize  # noqa: E731
    total = lambda tree: sum(size(leaf, leaf.sharding, leaf.dtype) for leaf in jax.tree.leaves(tree))  # noqa: E731
    weights = lambda where: jax.tree.map(size, whole.shapes, where, whole.dtypes)  # noqa: E731

    copied, frozen, beside = weights(decode), 0, 0
    if isinstance(policy, LoraPolicy):
        frozen = sum(jax.tree.leaves(weights(train)))
        shared = jax.tree.map(lambda a, b, shape: a.is_equivalent_to(b, shape.ndim), train, decode, whole.shapes)
        if policy.lora.merge:
            shared["layers"] |= dict.fromkeys(policy.merged_leaves, False)
        copied = jax.tree.map(lambda count, is_shared: 0 if is_shared else count, copied, shared)
        beside = 0 if policy.lora.merge else total(state.params) // 2
    return {
        "frozen": frozen,
        "trained": total(state.params),
        "optimizer": total(state.opt_state),
        "gradients": 2 * total(state.params),
        "decode": sum(jax.tree.leaves(copied)) + beside,
    }


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
