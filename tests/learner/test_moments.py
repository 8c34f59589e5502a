"""Moments in fewer bytes: how near they come to float32, what they take, and where they lie."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from aem_jax.checkpoint import Checkpoints
from aem_jax.learner import LearnerConfig, abstract_state, init_state, make_optimizer, num_updates
from aem_jax.learner.moments import decode, encode, to_bfloat16
from aem_jax.models import CONFIGS, ModelConfig, Policy
from aem_jax.sharding import MeshConfig, make_mesh

SMALL = ("bfloat16", "int8")
TINY = Policy(ModelConfig(32, 16, 32, 2, 4, 2, 8, rope_theta=10_000.0))
AXES = {"w": ("embed", "mlp")}


def optimizer(moments, **changes):
    config = dataclasses.replace(LearnerConfig(learning_rate=0.02, max_grad_norm=1e9), **changes)
    return make_optimizer(dataclasses.replace(config, moments=moments), AXES)


def test_eight_bits_hold_thirty_octaves_to_nine_percent():
    values = jnp.asarray([[1.0, 0.5, 2.0**-20, 3e-9, 1e-30, 0.0], [0.0] * 6, [7e-12] * 6])
    codes, scales = encode(values, jax.random.key(0))
    found = decode(codes, scales)
    assert codes.dtype == jnp.uint8 and scales.shape == (3, 1)
    np.testing.assert_array_equal(found[1], 0.0)
    np.testing.assert_allclose(found[2], 7e-12, rtol=1e-5)
    np.testing.assert_allclose(found[0, :4], values[0, :4], rtol=2 ** (1 / 8) - 1)
    # what is too small becomes the smallest, 2^(-254/8) of the row's maximum; only 0 is 0
    np.testing.assert_allclose(found[0, 4:], [2.0 ** (-254 / 8), 0.0], rtol=1e-5)


@pytest.mark.parametrize("kind", SMALL)
def test_rounding_is_right_in_the_mean(kind):
    values = jnp.asarray([1.0, 0.93, 0.1234567, 3.3e-5])
    keys = jax.random.split(jax.random.key(1), 4000)
    rounded = {"bfloat16": to_bfloat16, "int8": lambda v, key: decode(*encode(v, key))}[kind]
    found = jax.vmap(lambda key: rounded(values, key).astype(jnp.float32))(keys)
    np.testing.assert_allclose(jnp.mean(found, axis=0), values, rtol=3e-3)
    assert len(np.unique(found[:, 1])) == 2  # up or down to the next, nothing else


@pytest.mark.parametrize("kind", SMALL)
def test_a_second_moment_decays_however_slowly(kind):
    # v ← 0.999 v: to the nearest, 0.1 % is less than half a step of either
    opt = optimizer(kind, beta2=0.999)
    params = {"w": jnp.ones((4, 256))}
    state = opt.init(params)
    _, state = opt.update({"w": jnp.ones((4, 256))}, state, params)
    gradient = {"w": jnp.zeros((4, 256)).at[:, 0].set(1.0)}
    state = jax.jit(lambda state: jax.lax.fori_loop(0, 1000, lambda _, s: opt.update(gradient, s, params)[1], state))(
        state
    )
    nu = optax.tree_utils.tree_get(state, "nu")
    kept = decode(nu.codes["w"], nu.scales["w"]) if kind == "int8" else nu["w"].astype(jnp.float32)
    np.testing.assert_allclose(jnp.mean(kept[:, 1:]), 0.001 * 0.999**1000, rtol=0.05)


@pytest.mark.parametrize(("kind", "tolerance"), [("bfloat16", 0.01), ("int8", 0.06)])
def test_updates_come_near_those_of_float32(kind, tolerance):
    random = np.random.default_rng(0)
    size = 10.0 ** random.uniform(-3, 1, (16, 64)).astype(np.float32)  # in each row, gradients of four digits
    params: Any = {"w": jnp.zeros((16, 64))}
    exact, small = optimizer("float32"), optimizer(kind)
    states = exact.init(params), small.init(params)
    update_exact, update_small = jax.jit(exact.update), jax.jit(small.update)
    for step in range(20):
        gradient = {"w": jnp.asarray(size * (0.5 + random.standard_normal((16, 64))).astype(np.float32))}
        wanted, first = update_exact(gradient, states[0], params)
        found, second = update_small(gradient, states[1], params)
        states = first, second
        error = jnp.abs(found["w"] - wanted["w"]) / 0.02  # in units of the learning rate
        if step == 0:
            assert jnp.max(error) < 1e-4  # nothing was rounded yet
        assert jnp.sqrt(jnp.mean(error**2)) < tolerance, step
    assert num_updates(states[1]) == 20


@pytest.mark.parametrize("kind", SMALL)
def test_a_regression_is_solved_as_by_float32(kind):
    random = np.random.default_rng(1)
    x = jnp.asarray(random.standard_normal((128, 16)), jnp.float32)
    y = x @ jnp.asarray(random.standard_normal((16, 8)), jnp.float32)
    loss = lambda params: jnp.mean(jnp.square(x @ params["w"] - y))

    def fit(moments):
        opt = optimizer(moments)

        def step(carry, _):
            params, state = carry
            updates, state = opt.update(jax.grad(loss)(params), state, params)
            params = optax.apply_updates(params, updates)
            return (params, state), loss(params)

        params = {"w": jnp.zeros((16, 8))}
        return jax.jit(lambda: jax.lax.scan(step, (params, opt.init(params)), length=300)[1])()

    wanted, found = fit("float32"), fit(kind)
    assert found[-1] < 1e-3 * found[0]
    np.testing.assert_allclose(found[:100], wanted[:100], rtol=0.05)


@pytest.mark.parametrize(("kind", "most"), [("float32", 12.0), ("bfloat16", 8.0), ("int8", 7.05)])
def test_bytes_of_a_parameter_with_its_moments(kind, most):
    policy = Policy(CONFIGS["qwen3-1.7b"])
    mesh = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    state = abstract_state(policy, make_optimizer(LearnerConfig(moments=kind), policy.axes), mesh)
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    assert most - 0.05 < size / policy.config.num_parameters <= most + 1e-6


@pytest.mark.parametrize("kind", SMALL)
def test_they_lie_with_their_parameters_and_come_back_to_the_last_bit(kind, tmp_path):
    mesh = make_mesh(MeshConfig(2, 2, 2), jax.devices()[:8])
    opt = make_optimizer(LearnerConfig(learning_rate=0.1, moments=kind), TINY.axes)
    state = init_state(TINY, opt, mesh, jax.random.key(0))
    updates, opt_state = jax.jit(opt.update)(jax.tree.map(jnp.sin, state.params), state.opt_state, state.params)
    params = jax.tree.map(jnp.add, state.params, updates)
    abstract = abstract_state(TINY, opt, mesh)
    where = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    state = jax.device_put(dataclasses.replace(state, params=params, opt_state=opt_state), where)
    gate, nu = state.params["layers"]["gate_up"], optax.tree_utils.tree_get(state.opt_state, "nu")
    codes = nu.codes["layers"]["gate_up"] if kind == "int8" else nu["layers"]["gate_up"]
    assert codes.sharding == gate.sharding
    if kind == "int8":
        # [L, D, 2, 1]: over fsdp along D as the parameter; its last dimension, over tensor, is one number
        assert nu.scales["layers"]["gate_up"].addressable_shards[0].data.size * 2 == 2 * 16 * 2
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state)
        back = checkpoints.restore(abstract)
    jax.tree.map(np.testing.assert_array_equal, back, state)
