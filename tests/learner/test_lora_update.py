"""Training an adapter: against the gradient of full fine-tuning, over devices, and in bytes."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import ONE_DEVICE, random_trajectories

from aem_jax.batch import BatchLayout, collate, place
from aem_jax.learner import (
    LearnerConfig,
    init_state,
    make_optimizer,
    make_supervised_update,
    make_token_logprobs,
    make_update,
)
from aem_jax.models import LoraConfig, LoraPolicy, ModelConfig, Policy
from aem_jax.models.lora import projections
from aem_jax.sampler.reshard import make_lora_reshard
from aem_jax.sharding import TRAIN, MeshConfig, make_mesh, shardings

WHOLE = Policy(ModelConfig(32, 16, 32, 2, 4, 2, 8, rope_theta=10_000.0))
POLICY = LoraPolicy(WHOLE, LoraConfig(rank=2, alpha=6.0))
LAYOUT = BatchLayout(num_microbatches=8, rows=4, row_length=40, max_responses=64, max_trajectories=16)
CONFIG = LearnerConfig(learning_rate=0.01, max_grad_norm=1e9, head_chunk=7)


def frozen_on(mesh) -> Any:
    return jax.device_put(WHOLE.init(jax.random.key(0)), shardings(mesh, WHOLE.axes, TRAIN))


def adapter_on(mesh) -> Any:
    """An adapter in the middle of training: B is not zero."""
    adapter = jax.tree.map(
        lambda leaf: leaf + 0.05 * jnp.sin(jnp.arange(leaf.size)).reshape(leaf.shape), POLICY.init(jax.random.key(1))
    )
    return jax.device_put(adapter, shardings(mesh, POLICY.axes, TRAIN))


def batch_and_advantages():
    batch = collate(random_trajectories(3, 8, WHOLE.config.vocab_size), LAYOUT)
    return batch, np.random.default_rng(0).standard_normal(batch.tokens.shape).astype(np.float32)


def stepped(mesh, config=CONFIG):
    batch, advantages = batch_and_advantages()
    frozen = frozen_on(mesh)
    state = init_state(POLICY, make_optimizer(config, POLICY.axes), mesh, adapter_on(mesh))
    state, stats = make_update(POLICY, config, mesh)(state, place(batch, mesh), advantages, frozen=frozen)
    return state, stats, frozen


def test_the_gradient_is_that_of_the_weights_projected():
    """dA = s · dW Bᵀ, dB = s · Aᵀ dW, with dW the gradient of full fine-tuning at W + s · A B."""
    state, stats, frozen = stepped(ONE_DEVICE)
    adapter = adapter_on(ONE_DEVICE)
    merged = {**frozen, "layers": {**frozen["layers"], **POLICY.merge(adapter, frozen["layers"])}}
    full = init_state(WHOLE, make_optimizer(CONFIG, WHOLE.axes), ONE_DEVICE, merged)
    batch, advantages = batch_and_advantages()
    full, wanted = make_update(WHOLE, CONFIG, ONE_DEVICE)(full, batch, advantages)
    np.testing.assert_allclose(stats["loss"], wanted["loss"], rtol=1e-4)

    # Adam's mean after one step is (1 − β1) · gradient
    dw, found = full.opt_state[1][0].mu["layers"], state.opt_state[1][0].mu
    for name, p in projections(WHOLE.config).items():
        for layer in range(WHOLE.config.num_layers):
            whole = dw[p.parameter][layer]
            part = whole if p.first is None else whole[..., p.first : p.first + p.outputs[-2], :]
            part = np.asarray(part).reshape(np.prod(p.inputs), -1)
            a, b = np.asarray(adapter[name]["a"][layer]), np.asarray(adapter[name]["b"][layer])
            a, b = a.reshape(-1, 2), b.reshape(2, -1)
            for each, value in (("a", 3.0 * part @ b.T), ("b", 3.0 * a.T @ part)):
                got = np.asarray(found[name][each][layer]).reshape(value.shape)
                np.testing.assert_allclose(got, value, rtol=2e-3, atol=1e-6, err_msg=f"{name} {each}")


def test_only_the_adapter_changes_and_only_its_state_is_donated():
    state, _, frozen = stepped(ONE_DEVICE)
    jax.tree.map(np.testing.assert_array_equal, frozen, WHOLE.init(jax.random.key(0)))
    assert jax.tree.structure(state.params) == jax.tree.structure(POLICY.shapes)
    before = adapter_on(ONE_DEVICE)
    assert all(jax.tree.leaves(jax.tree.map(lambda new, old: bool((new != old).all()), state.params, before)))


@pytest.mark.slow
def test_eight_devices_take_the_same_step_as_one():
    results = []
    for mesh in (ONE_DEVICE, make_mesh(MeshConfig(2, 2, 2), jax.devices()[:8])):
        state, stats, frozen = stepped(mesh)
        for merge in (True, False):
            policy = dataclasses.replace(POLICY, lora=dataclasses.replace(POLICY.lora, merge=merge))
            params = make_lora_reshard(policy, mesh)(state.params, frozen)
            tokens = jnp.asarray(np.arange(16).reshape(2, 8) % 32)
            run = partial(policy.sampled.hidden, positions=tokens % 8, segment_ids=jnp.ones_like(tokens))
            results.append(
                (jax.device_get(state.params), jax.device_get(stats), np.asarray(jax.jit(run)(params, tokens)))
            )
    assert state.params["gate_proj"]["b"].addressable_shards[0].data.size * 2 == state.params["gate_proj"]["b"].size
    for other in results[1:]:
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=2e-5), other, results[0])


@pytest.mark.parametrize("merge", [True, False])
def test_what_the_adapter_leaves_alone_is_not_copied_on_one_device(merge):
    policy = dataclasses.replace(POLICY, lora=LoraConfig(2, targets=("q_proj", "up_proj"), merge=merge))
    frozen = frozen_on(ONE_DEVICE)
    adapter = init_state(policy, make_optimizer(CONFIG, policy.axes), ONE_DEVICE, jax.random.key(2)).params
    params = make_lora_reshard(policy, ONE_DEVICE)(adapter, frozen)
    weights = params if merge else params[1]
    at = lambda tree: jax.tree.map(lambda leaf: leaf.unsafe_buffer_pointer(), tree)
    same = jax.tree.map(lambda one, other: one == other, at(weights), at(frozen))
    moved = {name for name, is_same in same["layers"].items() if not is_same}
    assert moved == ({"qkv", "gate_up"} if merge else set()) and same["embed"] and same["norm"]


def test_a_supervised_step_and_the_reference_take_frozen_weights_too():
    batch, _ = batch_and_advantages()
    frozen, adapter = frozen_on(ONE_DEVICE), adapter_on(ONE_DEVICE)
    state = init_state(POLICY, make_optimizer(CONFIG, POLICY.axes), ONE_DEVICE, jax.tree.map(jnp.copy, adapter))
    _, stats = make_supervised_update(POLICY, CONFIG, ONE_DEVICE)(state, batch, frozen)
    logprobs = make_token_logprobs(POLICY, CONFIG, ONE_DEVICE)((adapter, frozen), batch)
    np.testing.assert_allclose(stats["loss"], -logprobs[batch.response_ids >= 0].mean(), rtol=1e-5)


def test_no_copy_of_the_frozen_weights_is_made_for_an_update():
    """An update needs little memory beyond its arguments: no gradient of the frozen weights, no second copy of them."""
    whole = Policy(ModelConfig(64, 256, 1024, 6, 4, 2, 64))
    policy = LoraPolicy(whole, LoraConfig(rank=4))
    config = dataclasses.replace(CONFIG, remat="layers")
    layout = BatchLayout(num_microbatches=1, rows=1, row_length=40, max_responses=8, max_trajectories=2)
    batch = collate(random_trajectories(0, 2, 64)[:1], layout)
    state = jax.eval_shape(
        partial(init_state, policy, make_optimizer(config, policy.axes), ONE_DEVICE), jax.random.key(0)
    )
    advantages = np.zeros(batch.tokens.shape, np.float32)
    compiled = make_update(policy, config, ONE_DEVICE).lower(state, batch, advantages, frozen=whole.shapes).compile()
    size = whole.config.num_parameters * 4
    assert compiled.memory_analysis().temp_size_in_bytes < 0.5 * size


def test_in_int8_the_merged_weights_are_sampled_from():
    """The codes of the merged weights that are sampled without int8, projections without an adapter included."""
    policy = dataclasses.replace(POLICY, lora=LoraConfig(2, targets=("q_proj", "up_proj")))
    frozen = frozen_on(ONE_DEVICE)
    adapter = init_state(policy, make_optimizer(CONFIG, policy.axes), ONE_DEVICE, jax.random.key(2)).params
    found = make_lora_reshard(policy, ONE_DEVICE, int8=True)(adapter, frozen)
    wanted = WHOLE.quantize(make_lora_reshard(policy, ONE_DEVICE)(adapter, frozen))
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    jax.tree.map(np.testing.assert_array_equal, found, wanted)
    apart = dataclasses.replace(policy, lora=LoraConfig(2, merge=False))
    with pytest.raises(ValueError, match=r"expected lora.merge with int8 weights, got False"):
        make_lora_reshard(apart, ONE_DEVICE, int8=True)
