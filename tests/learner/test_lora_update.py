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
    make_supervised_update,
    make_token_logprobs,
    make_update,
)
from aem_jax.models import LoraConfig, ModelConfig, Params, Policy
from aem_jax.models.lora import projections
from aem_jax.sampler.reshard import make_reshard
from aem_jax.sharding import TRAIN, MeshConfig, make_mesh, shardings

WHOLE = Policy(ModelConfig(32, 16, 32, 2, 4, 2, 8, rope_theta=10_000.0))
POLICY = Policy(WHOLE.config, LoraConfig(rank=2, alpha=6.0))
LAYOUT = BatchLayout(num_microbatches=8, rows=4, row_length=40, max_responses=64, max_trajectories=16)
CONFIG = LearnerConfig(learning_rate=0.01, max_grad_norm=1e9, head_chunk=7)


def frozen_on(mesh) -> Any:
    return jax.device_put(WHOLE.init(jax.random.key(0)), shardings(mesh, WHOLE.axes, TRAIN))


def adapter_on(mesh) -> Any:
    """An adapter in the middle of training: B is not zero."""
    adapter = {"adapter": POLICY.init(jax.random.key(1))["adapter"]}
    adapter = jax.tree.map(lambda leaf: leaf + 0.05 * jnp.sin(jnp.arange(leaf.size)).reshape(leaf.shape), adapter)
    return jax.device_put(adapter, {"adapter": shardings(mesh, POLICY.axes, TRAIN)["adapter"]})


def batch_and_advantages():
    batch = collate(random_trajectories(3, 8, WHOLE.config.vocab_size), LAYOUT)
    return batch, np.random.default_rng(0).standard_normal(batch.tokens.shape).astype(np.float32)


def stepped(mesh, config=CONFIG):
    batch, advantages = batch_and_advantages()
    frozen = frozen_on(mesh)
    state = init_state(POLICY, config, mesh, jax.random.key(0), {**frozen, **adapter_on(mesh)})
    state, stats = make_update(POLICY, config, mesh)(state, place(batch, mesh), advantages)
    return state, stats, frozen


def test_the_gradient_is_that_of_the_weights_projected():
    """dA = s · dW Bᵀ, dB = s · Aᵀ dW, with dW the gradient of full fine-tuning at W + s · A B."""
    state, stats, frozen = stepped(ONE_DEVICE)
    adapter = adapter_on(ONE_DEVICE)
    merged = POLICY.merge({**frozen, **adapter})
    full = init_state(WHOLE, CONFIG, ONE_DEVICE, jax.random.key(0), merged)
    batch, advantages = batch_and_advantages()
    full, wanted = make_update(WHOLE, CONFIG, ONE_DEVICE)(full, batch, advantages)
    np.testing.assert_allclose(stats["loss"], wanted["loss"], rtol=1e-4)

    # Adam's mean after one step is (1 − β1) · gradient
    dw, mean = full.opt_state[1][0].mu["base"]["layers"], state.opt_state[1][0].mu["adapter"]
    adapter = adapter["adapter"]
    for name, p in projections(WHOLE.config).items():
        for layer in range(WHOLE.config.num_layers):
            full_part = dw[p.parameter][layer]
            part = full_part if p.first is None else full_part[..., p.first : p.first + p.outputs[-2], :]
            part = np.asarray(part).reshape(np.prod(p.inputs), -1)
            a, b = np.asarray(adapter[name]["a"][layer]), np.asarray(adapter[name]["b"][layer])
            a, b = a.reshape(-1, 2), b.reshape(2, -1)
            for matrix, value in (("a", 3.0 * part @ b.T), ("b", 3.0 * a.T @ part)):
                got = np.asarray(mean[name][matrix][layer]).reshape(value.shape)
                np.testing.assert_allclose(got, value, rtol=2e-3, atol=1e-6, err_msg=f"{name} {matrix}")


def test_only_the_adapter_changes_and_only_its_state_is_donated():
    state, _, frozen = stepped(ONE_DEVICE)
    jax.tree.map(np.testing.assert_array_equal, frozen, WHOLE.init(jax.random.key(0)))
    assert state.params["base"] is state.frozen["base"] and state.frozen["base"]["embed"] is frozen["base"]["embed"]
    assert jax.tree.structure(state.params) == jax.tree.structure(POLICY.shapes)
    before = adapter_on(ONE_DEVICE)
    assert all(jax.tree.leaves(jax.tree.map(lambda new, old: bool((new != old).all()), state.trainable, before)))


def stacked(params: Params) -> Params:
    """Parameters to sample from in the learner's layout, with a leading axis of layers."""
    base = params["base"]
    layers = jax.tree.map(lambda *leaves: jnp.stack(leaves), *base["layers"])
    return {**params, "base": {**base, "layers": layers}}


@pytest.mark.slow
def test_eight_devices_take_the_same_step_as_one():
    results = []
    for mesh in (ONE_DEVICE, make_mesh(MeshConfig(2, 2, 2), jax.devices()[:8])):
        state, stats, _ = stepped(mesh)
        for merge in (True, False):
            policy = dataclasses.replace(POLICY, lora=LoraConfig(rank=2, alpha=6.0, merge=merge))
            params = make_reshard(policy, mesh)(state.params)
            tokens = jnp.asarray(np.arange(16).reshape(2, 8) % 32)
            run = partial(policy.sampled.hidden, positions=tokens % 8, segment_ids=jnp.ones_like(tokens))
            hidden = np.asarray(jax.jit(run)(stacked(params) if merge else params, tokens)[0])
            results.append((jax.device_get(state.trainable), jax.device_get(stats), hidden))
    b = state.params["adapter"]["gate_proj"]["b"]
    assert b.addressable_shards[0].data.size * 2 == b.size
    for other in results[1:]:
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=2e-5), other, results[0])


@pytest.mark.parametrize("merge", [True, False])
def test_what_the_adapter_leaves_alone_is_not_copied_on_one_device(merge):
    policy = dataclasses.replace(POLICY, lora=LoraConfig(2, targets=("q_proj", "up_proj"), merge=merge))
    frozen = frozen_on(ONE_DEVICE)
    params = init_state(policy, CONFIG, ONE_DEVICE, jax.random.key(2), frozen).params
    weights = make_reshard(policy, ONE_DEVICE)(params)["base"]
    at = lambda tree: jax.tree.map(lambda leaf: leaf.unsafe_buffer_pointer(), tree)
    for name in ("embed", "norm"):
        assert at(weights[name]) == at(frozen["base"][name])
    if not merge:  # merged layers have arrays of their own, in the layout of sampling
        assert at(weights["layers"]) == at(frozen["base"]["layers"])


def test_a_supervised_step_and_the_reference_take_frozen_weights_too():
    batch, _ = batch_and_advantages()
    params = {**frozen_on(ONE_DEVICE), **adapter_on(ONE_DEVICE)}
    state = init_state(POLICY, CONFIG, ONE_DEVICE, jax.random.key(0), jax.tree.map(jnp.copy, params))
    _, stats = make_supervised_update(POLICY, CONFIG, ONE_DEVICE)(state, batch)
    logprobs = make_token_logprobs(POLICY, CONFIG, ONE_DEVICE)(params, batch)
    np.testing.assert_allclose(stats["loss"], -logprobs[batch.response_ids >= 0].mean(), rtol=1e-5)


def test_no_copy_of_the_frozen_weights_is_made_for_an_update():
    """An update needs little memory beyond its arguments: no gradient of the frozen weights, no second copy of them."""
    base = Policy(ModelConfig(64, 256, 1024, 6, 4, 2, 64))
    policy = Policy(base.config, LoraConfig(rank=4))
    config = dataclasses.replace(CONFIG, remat="layers")
    layout = BatchLayout(num_microbatches=1, rows=1, row_length=40, max_responses=8, max_trajectories=2)
    batch = collate(random_trajectories(0, 2, 64)[:1], layout)
    state = jax.eval_shape(partial(init_state, policy, config, ONE_DEVICE), jax.random.key(0))
    advantages = np.zeros(batch.tokens.shape, np.float32)
    compiled: Any = make_update(policy, config, ONE_DEVICE).lower(state, batch, advantages).compile()
    size = base.config.num_parameters * 4
    assert compiled.memory_analysis().temp_size_in_bytes < 0.5 * size


def test_in_int8_the_merged_weights_are_sampled_from():
    """The codes of the merged weights that are sampled without int8, projections without an adapter included."""
    policy = dataclasses.replace(POLICY, lora=LoraConfig(2, targets=("q_proj", "up_proj")))
    frozen = frozen_on(ONE_DEVICE)
    params = init_state(policy, CONFIG, ONE_DEVICE, jax.random.key(2), frozen).params
    codes = make_reshard(policy, ONE_DEVICE, int8=True)(params)
    merged = stacked(make_reshard(policy, ONE_DEVICE)(params))
    wanted = WHOLE.by_layer(WHOLE.quantize(merged), lambda leaf, layer: leaf[layer])
    assert jax.tree.structure(codes) == jax.tree.structure(wanted)
    jax.tree.map(np.testing.assert_array_equal, codes, wanted)
    apart = dataclasses.replace(policy, lora=LoraConfig(2, merge=False))
    with pytest.raises(ValueError, match=r"expected lora.merge with int8 weights, got False"):
        make_reshard(apart, ONE_DEVICE, int8=True)
