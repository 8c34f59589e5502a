"""Moments in bfloat16: their error against float32, their bytes and their shardings."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from aem_jax.checkpoint import Checkpoints
from aem_jax.learner import LearnerConfig, abstract_state, init_state, make_optimizer, num_updates
from aem_jax.learner.optimizer import round_stochastically
from aem_jax.models import CONFIGS, ModelConfig, Policy
from aem_jax.sharding import MeshConfig, make_mesh

TINY = Policy(ModelConfig(32, 16, 32, 2, 4, 2, 8, rope_theta=10_000.0))
AXES = {"w": ("embed", "mlp")}


def optimizer(moments, **changes):
    config = dataclasses.replace(LearnerConfig(learning_rate=0.02, max_grad_norm=1e9), **changes)
    return make_optimizer(dataclasses.replace(config, moments=moments), AXES)


def test_rounding_is_right_in_the_mean():
    values = jnp.asarray([1.0, 0.93, 0.1234567, 3.3e-5])
    keys = jax.random.split(jax.random.key(1), 4000)
    rounded = jax.vmap(lambda key: round_stochastically(values, key).astype(jnp.float32))(keys)
    np.testing.assert_allclose(jnp.mean(rounded, axis=0), values, rtol=3e-3)
    assert len(np.unique(rounded[:, 1])) == 2  # rounded up or down to the neighbour, nothing else


def test_a_second_moment_decays_however_slowly():
    # v ← 0.999 v: to the nearest, 0.1 % is less than half a step
    opt = optimizer("bfloat16", beta2=0.999)
    params = {"w": jnp.ones((4, 256))}
    state = opt.init(params)
    _, state = opt.update({"w": jnp.ones((4, 256))}, state, params)
    gradient = {"w": jnp.zeros((4, 256)).at[:, 0].set(1.0)}
    state = jax.jit(lambda state: jax.lax.fori_loop(0, 1000, lambda _, s: opt.update(gradient, s, params)[1], state))(
        state
    )
    nu = optax.tree_utils.tree_get(state, "nu")
    kept = nu["w"].astype(jnp.float32)
    np.testing.assert_allclose(jnp.mean(kept[:, 1:]), 0.001 * 0.999**1000, rtol=0.05)


def test_updates_come_near_those_of_float32():
    random = np.random.default_rng(0)
    size = 10.0 ** random.uniform(-3, 1, (16, 64)).astype(np.float32)  # in each row, gradients of four digits
    params: Any = {"w": jnp.zeros((16, 64))}
    exact, small = optimizer("float32"), optimizer("bfloat16")
    states = exact.init(params), small.init(params)
    update_exact, update_small = jax.jit(exact.update), jax.jit(small.update)
    for step in range(20):
        gradient = {"w": jnp.asarray(size * (0.5 + random.standard_normal((16, 64))).astype(np.float32))}
        wanted, first = update_exact(gradient, states[0], params)
        approximate, second = update_small(gradient, states[1], params)
        states = first, second
        error = jnp.abs(approximate["w"] - wanted["w"]) / 0.02  # in units of the learning rate
        if step == 0:
            assert jnp.max(error) < 1e-4  # nothing was rounded yet
        assert jnp.sqrt(jnp.mean(error**2)) < 0.01, step
    assert num_updates(states[1]) == 20


def test_a_regression_is_solved_as_by_float32():
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

    wanted, losses = fit("float32"), fit("bfloat16")
    assert losses[-1] < 1e-3 * losses[0]
    np.testing.assert_allclose(losses[:100], wanted[:100], rtol=0.05)


@pytest.mark.parametrize(("moments", "most"), [("float32", 12.0), ("bfloat16", 8.0)])
def test_bytes_of_a_parameter_with_its_moments(moments, most):
    policy = Policy(CONFIGS["qwen3-1.7b"])
    mesh = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    state = abstract_state(policy, LearnerConfig(moments=moments), mesh)
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    assert most - 0.05 < size / policy.config.num_parameters <= most + 1e-6


def test_they_lie_with_their_parameters_and_come_back_to_the_last_bit(tmp_path):
    mesh = make_mesh(MeshConfig(2, 2, 2), jax.devices()[:8])
    config = LearnerConfig(learning_rate=0.1, moments="bfloat16")
    opt, state = make_optimizer(config, TINY.axes), init_state(TINY, config, mesh, jax.random.key(0))
    updates, opt_state = jax.jit(opt.update)(jax.tree.map(jnp.sin, state.params), state.opt_state, state.params)
    params = jax.tree.map(jnp.add, state.params, updates)
    abstract = abstract_state(TINY, config, mesh)
    where = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    state = jax.device_put(dataclasses.replace(state, trainable=params, opt_state=opt_state), where)
    gate, nu = state.params["base"]["layers"]["gate_up"], optax.tree_utils.tree_get(state.opt_state, "nu")
    assert nu["base"]["layers"]["gate_up"].sharding == gate.sharding
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state)
        back = checkpoints.restore(abstract)
    jax.tree.map(np.testing.assert_array_equal, back, state)
