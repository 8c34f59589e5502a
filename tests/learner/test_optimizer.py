"""Schedules by hand, weight decay on matrices only, and contradictory settings."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from aem_jax.learner import LearnerConfig, make_optimizer, make_schedule, num_updates

AXES = {
    "embed": ("vocab", "embed"),
    "norm": ("norm",),
    "layers": {"gate": ("layers", "embed", "mlp"), "scale": ("layers", "norm")},
}
PARAMS: Any = {
    "embed": jnp.ones((4, 2)),
    "norm": jnp.ones(2),
    "layers": {"gate": jnp.ones((3, 2, 5)), "scale": jnp.ones((3, 2))},
}


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        # Two steps up to 8, then from step 2 to step 10: stay; a line 8 → 0; 8 · (1 + cos(π x)) / 2.
        ("constant", {0: 4, 1: 8, 2: 8, 6: 8, 10: 8, 50: 8}),
        ("linear", {0: 4, 1: 8, 2: 8, 6: 4, 10: 0, 50: 0}),
        ("cosine", {0: 4, 1: 8, 2: 8, 4: 8 * (1 + np.cos(np.pi / 4)) / 2, 6: 4, 10: 0, 50: 0}),
    ],
)
def test_schedules_by_hand(schedule, expected):
    config = LearnerConfig(learning_rate=8.0, schedule=schedule, warmup_steps=2, total_steps=10)
    rate = make_schedule(config)
    for step, value in expected.items():
        np.testing.assert_allclose(rate(step), value, atol=1e-5, err_msg=f"step {step}")


@pytest.mark.parametrize("warmup_steps", [0, 1])
def test_a_short_warm_up_starts_at_the_peak(warmup_steps):
    rate = make_schedule(LearnerConfig(learning_rate=8.0, schedule="linear", warmup_steps=warmup_steps, total_steps=9))
    np.testing.assert_allclose(rate(warmup_steps), 8.0)
    np.testing.assert_allclose(rate(0), 8.0)


def test_only_matrices_decay():
    config = LearnerConfig(learning_rate=0.5, weight_decay=0.1)
    optimizer = make_optimizer(config, AXES)
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    updates, state = optimizer.update(zeros, optimizer.init(PARAMS), PARAMS)
    wanted = {"embed": -0.05, "norm": 0.0, "layers": {"gate": -0.05, "scale": 0.0}}  # −lr · decay · 1 for matrices
    jax.tree.map(lambda update, value: np.testing.assert_allclose(update, value, rtol=1e-6), updates, wanted)
    assert num_updates(state) == 1


def test_gradients_are_clipped_by_their_global_norm():
    config = LearnerConfig(max_grad_norm=2.0)
    optimizer = make_optimizer(config, AXES)
    gradient = jax.tree.map(jnp.ones_like, PARAMS)
    norm = np.sqrt(8 + 2 + 30 + 6)
    _, state = optimizer.update(gradient, optimizer.init(PARAMS), PARAMS)
    mean = optax.tree_utils.tree_get(state, "mu")
    np.testing.assert_allclose(mean["embed"], (1 - config.beta1) * 2.0 / norm, rtol=1e-5)
    np.testing.assert_allclose(optax.tree_utils.tree_norm(mean), (1 - config.beta1) * 2.0, rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 0.0}, "expected learning_rate > 0, got 0.0"),
        ({"temperature": -1.0}, "expected temperature > 0, got -1.0"),
        ({"num_epochs": 0}, "expected num_epochs > 0, got 0"),
        ({"clip_low": 1.5}, r"expected clip_low in \[0, 1\]"),
        ({"beta2": 1.0}, r"expected beta2 in \[0, 1\), got 1.0"),
        ({"kl_coefficient": -0.1}, "expected kl_coefficient ≥ 0, got -0.1"),
        ({"schedule": "cosine", "warmup_steps": 5, "total_steps": 5}, "expected total_steps above warmup_steps = 5"),
    ],
)
def test_settings_that_make_no_sense_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(LearnerConfig(), **changes)
