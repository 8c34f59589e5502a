"""Gradients as vectors: against plain autodiff over all tokens, in Adam's geometry, and projected."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_policies import MOE
from toys import ONE_DEVICE, Bigram, random_trajectories

from aem_jax.advantage import token_advantages
from aem_jax.batch import BatchLayout, collate, place
from aem_jax.learner import LearnerConfig, init_state, make_token_logprobs, make_update
from aem_jax.learner.gradients import (
    flattened,
    make_gradient,
    make_vectors,
    projected,
    second_moments,
    weighted_entropies,
    weighted_logprobs,
)
from aem_jax.models import Policy

TOY = Bigram()
CONFIG = LearnerConfig(learning_rate=0.01, temperature=0.7, head_chunk=7, max_grad_norm=1e9)
LAYOUT = BatchLayout(num_microbatches=8, rows=2, row_length=40, max_responses=64, max_trajectories=16)
TRAJECTORIES = random_trajectories(0, 8, TOY.vocab_size)
BATCH = place(collate(TRAJECTORIES, LAYOUT), ONE_DEVICE)
NUMBERS = np.random.default_rng(1).standard_normal(64).astype(np.float32)
WEIGHTS = token_advantages(NUMBERS, jnp.asarray(BATCH.response_ids))


def state(seed=0):
    return init_state(TOY, CONFIG, ONE_DEVICE, jax.random.key(seed))


def slow_sum(params, of_distribution):
    """Σ over sampled tokens of a number of the token's distribution, times its response's weight."""
    total, response = 0.0, 0
    for trajectory in TRAJECTORIES:
        before = None
        for turn in trajectory.turns:
            for token in turn.observation_ids:
                before = int(token)
            for token in turn.response_ids:
                logits = jnp.tanh(params["base"]["embed"][before]) @ params["base"]["head"] / CONFIG.temperature
                total += NUMBERS[response] * of_distribution(jax.nn.log_softmax(logits), int(token))
                before = int(token)
            response += 1
    return total


@pytest.mark.parametrize(
    ("objective", "slow"),
    [
        (weighted_logprobs, lambda logp, token: logp[token]),
        (weighted_entropies, lambda logp, token: -jnp.sum(jnp.exp(logp) * logp)),
    ],
    ids=["logprobs", "entropies"],
)
def test_gradients_are_those_of_the_sum_over_tokens(objective, slow):
    start = state()
    gradient = jax.jit(make_gradient(TOY, CONFIG, ONE_DEVICE, objective))(start.trainable, {}, BATCH, WEIGHTS)
    expected = jax.grad(slow_sum)(start.trainable, slow)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), gradient, expected)
    assert float(jnp.abs(flattened(expected)).max()) > 0.1


def test_the_score_gradient_is_minus_that_of_the_policy_loss_on_policy():
    """With the learner's own log-probabilities and equal weights, the update's gradient is −g / number of tokens."""
    start = state()
    logprobs = make_token_logprobs(TOY, CONFIG, ONE_DEVICE)(start.params, BATCH)
    batch = replace(BATCH, logprobs=logprobs)
    gradient = jax.jit(make_gradient(TOY, CONFIG, ONE_DEVICE, weighted_logprobs))(start.trainable, {}, batch, WEIGHTS)
    updated, metrics = make_update(TOY, CONFIG, ONE_DEVICE)(state(), batch, WEIGHTS)
    mu = updated.opt_state[1][0].mu
    jax.tree.map(
        lambda g, m: np.testing.assert_allclose(-g / float(metrics["tokens"]), m / (1 - CONFIG.beta1), atol=1e-6),
        gradient,
        mu,
    )


def test_second_moments_are_adams_with_bias_correction():
    assert second_moments(state().opt_state, CONFIG) is None
    updated, _ = make_update(TOY, CONFIG, ONE_DEVICE)(state(), BATCH, WEIGHTS)
    adam = updated.opt_state[1][0]
    first = jax.tree.map(lambda m: jnp.square(m / (1 - CONFIG.beta1)), adam.mu)  # after one step v̂ = g²
    moments = second_moments(updated.opt_state, CONFIG)
    jax.tree.map(lambda v, g: np.testing.assert_allclose(v, g, rtol=1e-3, atol=1e-12), moments, first)


@pytest.mark.parametrize("together", [1, 2, 3])
def test_inner_products_of_vectors_are_weighted_by_the_preconditioner(together):
    start = state()
    gradient = make_gradient(TOY, CONFIG, ONE_DEVICE, weighted_logprobs)
    vectors = make_vectors(gradient, ONE_DEVICE, together=together)
    scale = jax.tree.map(lambda x: 0.5 + jnp.abs(x), start.trainable)
    other = token_advantages(NUMBERS[::-1].copy(), jnp.asarray(BATCH.response_ids))
    x, y = (jax.jit(gradient)(start.trainable, {}, BATCH, weights) for weights in (WEIGHTS, other))
    expected = sum(jax.tree.leaves(jax.tree.map(lambda a, b, p: jnp.sum(a * b * p), x, y, scale)))
    left, zero, right = vectors(start.trainable, {}, BATCH, jnp.stack([WEIGHTS, 0 * WEIGHTS, other]), scale)
    assert float(left @ right) == pytest.approx(float(expected), rel=1e-4)
    assert left.shape == flattened(start.trainable).shape and not np.any(zero)


def test_gradients_of_experts_are_computed_one_by_one():
    """The products of experts have no batching rule."""
    policy = Policy(MOE)
    trajectories = random_trajectories(0, 2, MOE.vocab_size)
    batch = place(collate(trajectories, replace(LAYOUT, max_trajectories=2)), ONE_DEVICE)
    start = init_state(policy, CONFIG, ONE_DEVICE, jax.random.key(0))
    gradient = make_gradient(policy, CONFIG, ONE_DEVICE, weighted_logprobs)
    weights = token_advantages(NUMBERS, jnp.asarray(batch.response_ids))
    ones = jax.tree.map(jnp.ones_like, start.trainable)
    found = make_vectors(gradient, ONE_DEVICE)(start.trainable, {}, batch, jnp.stack([weights, 2 * weights]), ones)
    expected = flattened(jax.jit(gradient)(start.trainable, {}, batch, weights))
    np.testing.assert_allclose(found, [expected, 2 * expected], rtol=1e-3, atol=1e-6)


def test_projections_preserve_inner_products_with_the_stated_error():
    keys = jax.random.split(jax.random.key(3), 400)
    shape = {"a": (37, 11), "b": (500,)}  # blocks that do not divide the leaves
    x = {name: jax.random.normal(jax.random.key(i), s) for i, (name, s) in enumerate(shape.items())}
    y = jax.tree.map(lambda v: 0.5 * v + jax.random.normal(jax.random.key(9), v.shape), x)
    size = 128
    product = jax.jit(jax.vmap(lambda key: projected(x, size, key) @ projected(y, size, key)))(keys)
    a, b = flattened(x), flattened(y)
    expected, error = float(a @ b), float(jnp.sqrt((a @ a * (b @ b) + (a @ b) ** 2) / size))
    assert abs(float(product.mean()) - expected) < 4 * error / np.sqrt(len(keys))
    assert 0.7 * error < float(product.std()) < 1.3 * error
