"""The truncated importance weight and its bias, for a sampler whose policy differs from the learner's."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import ONE_DEVICE, Bigram, random_trajectories

from aem_jax.batch import BatchLayout, collate, place
from aem_jax.learner import LearnerConfig, init_state, make_token_logprobs, make_update
from aem_jax.learner.objective import Tokens, policy_objective

TOY = Bigram()
LAYOUT = BatchLayout(num_microbatches=8, rows=2, row_length=40, max_responses=64, max_trajectories=16)
CONFIG = LearnerConfig(learning_rate=0.01, max_grad_norm=1e9, head_chunk=7)


def expected_gradient(config: LearnerConfig, logits: np.ndarray, sampler: np.ndarray, advantages: np.ndarray):
    """The exact d/dlogits of the mean loss over tokens of `sampler`: all tokens, weighted by their probability."""
    with jax.enable_x64(True):
        wide = lambda x: jnp.asarray(x, jnp.float64)[None]
        mask = jnp.ones((1, len(logits)), bool)
        tokens = Tokens(mask, wide(sampler), wide(np.log(sampler)), wide(advantages), None)

        def loss(logits):
            return policy_objective(config)(jax.nn.log_softmax(logits), jnp.zeros_like(logits), tokens)[0]

        return np.asarray(jax.grad(loss)(wide(logits)))[0]


def true_gradient(odds: np.ndarray, policy: np.ndarray, advantages: np.ndarray) -> np.ndarray:
    """−Σ_a odds(a) A(a) ∇log π(a), by hand: ∇log π(a) = e_a − π."""
    return -np.sum([w * a * (e - policy) for w, a, e in zip(odds, advantages, np.eye(len(policy)))], axis=0)


def test_the_expected_gradient_is_that_of_the_learners_policy():
    rng = np.random.default_rng(0)
    logits, advantages = rng.normal(size=6), rng.normal(size=6)
    policy = np.exp(logits) / np.exp(logits).sum()
    sampler = np.exp(logits + 0.5 * rng.normal(size=6))
    sampler /= sampler.sum()
    ratio = policy / sampler
    assert ratio.max() > 1.3 and ratio.min() < 0.8  # the clip would cut some of them
    wanted = true_gradient(policy, policy, advantages)

    free = expected_gradient(dataclasses.replace(CONFIG, importance_cap=100.0), logits, sampler, advantages)
    np.testing.assert_allclose(free, wanted, atol=1e-12)
    cap = 1.2
    capped = expected_gradient(dataclasses.replace(CONFIG, importance_cap=cap), logits, sampler, advantages)
    np.testing.assert_allclose(capped, true_gradient(np.minimum(policy, cap * sampler), policy, advantages), atol=1e-12)
    # Without it some tokens are clipped away; and the error of the capped one is smaller.
    clipped = expected_gradient(CONFIG, logits, sampler, advantages)
    assert np.linalg.norm(clipped - wanted) > 2 * np.linalg.norm(capped - wanted) > 0


def stepped(config: LearnerConfig):
    batch = collate(random_trajectories(0, 8, TOY.vocab_size), dataclasses.replace(LAYOUT))
    advantages = np.random.default_rng(1).standard_normal(batch.tokens.shape).astype(np.float32)
    state = init_state(TOY, config, ONE_DEVICE, jax.random.key(0))
    placed = place(batch, ONE_DEVICE)
    before = make_token_logprobs(TOY, config, ONE_DEVICE)(state.params, placed)
    gap = np.asarray(before - batch.logprobs)[np.asarray(batch.response_ids) >= 0]
    state, stats = make_update(TOY, config, ONE_DEVICE)(state, placed, advantages)
    return state, {name: float(value) for name, value in stats.items()}, gap


def test_a_cap_out_of_reach_is_the_ratio_without_a_clip():
    """The gradient is ρ A ∇logp in both cases."""
    weighted, stats, gap = stepped(dataclasses.replace(CONFIG, importance_cap=1e6))
    plain, _, _ = stepped(dataclasses.replace(CONFIG, clip_low=1.0, clip_high=1e6))
    for one, other in zip(jax.tree.leaves(weighted.params), jax.tree.leaves(plain.params), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    assert stats["ratio_mean"] == pytest.approx(1) and stats["clip_fraction"] == 0 == stats["importance_capped"]
    assert stats["importance_mean"] == pytest.approx(np.exp(gap).mean(), rel=1e-5)
    assert stats["parity_max"] == pytest.approx(np.abs(gap).max(), rel=1e-5)


def test_over_several_steps_the_weight_is_that_of_the_policy_before_the_first():
    config = dataclasses.replace(CONFIG, importance_cap=1.5, num_epochs=3, learning_rate=0.05)
    _, stats, gap = stepped(config)
    assert stats["importance_mean"] == pytest.approx(np.minimum(np.exp(gap), 1.5).mean(), rel=1e-5)
    assert stats["importance_capped"] == pytest.approx((np.exp(gap) >= 1.5).mean(), rel=1e-5)
    assert stats["ratio_max"] > 1.01  # the later steps move away from the initial policy


def test_a_cap_below_one_is_refused():
    with pytest.raises(ValueError, match=r"expected importance_cap of 0 \(off\) or at least 1, got 0.5"):
        LearnerConfig(importance_cap=0.5)
