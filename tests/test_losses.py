"""Losses by hand and against float64. Aggregation weights equal the definitions for any packing of tokens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aem_jax.losses import (
    clipped_policy_loss,
    clipped_value_loss,
    constant_length,
    k1,
    k3,
    response_log_ratios,
    response_mean,
    sequence_policy_loss,
    token_mean,
    trajectory_log_ratios,
    trajectory_mean,
    truncated_importance,
)

clipped_at_a_fifth = functools.partial(clipped_policy_loss, clip_low=0.2, clip_high=0.2)


def test_clipped_loss_golden():
    # ρ = 1, 1.5, 1.5, 0.5, 0.5, 1.1 with A = 2, 2, −2, 2, −2, −1; bounds 0.8 and 1.28.
    # −min(ρA, clip(ρ)A):  −2;  −min(3, 2.56) = −2.56 (clipped);  −min(−3, −2.56) = 3;  −min(1, 1.6) = −1;
    # −min(−1, −1.6) = 1.6 (clipped);  1.1.
    ratio = jnp.array([1.0, 1.5, 1.5, 0.5, 0.5, 1.1])
    old = jnp.array([-1.0, -2.0, -0.5, -3.0, 0.0, -1.0])
    token = clipped_policy_loss(
        old + jnp.log(ratio), old, jnp.array([2.0, 2, -2, 2, -2, -1]), clip_low=0.2, clip_high=0.28
    )
    np.testing.assert_allclose(token.loss, [-2, -2.56, 3, -1, 1.6, 1.1], rtol=1e-6)
    np.testing.assert_allclose(token.ratio, ratio, rtol=1e-6)
    np.testing.assert_array_equal(token.clipped, [False, True, False, False, True, False])


def test_no_gradient_flows_where_the_clip_is_active():
    old = jnp.zeros(4)
    logprobs, advantages = jnp.log(jnp.array([1.5, 1.5, 0.5, 0.5])), jnp.array([1.0, -1.0, 1.0, -1.0])
    gradient = jax.grad(lambda x: clipped_at_a_fifth(x, old, advantages).loss.sum())(logprobs)
    # Elsewhere d(−ρA)/dlogp = −ρA.
    np.testing.assert_allclose(gradient, [0.0, 1.5, -0.5, 0.0], rtol=1e-6)


def test_value_loss_golden():
    # R = 10 and V_old = 4, ε = 2, so V counts as at most 6. V = 5: inside, ½ · 5². V = 8: max(2², 4²)/2, clipped.
    # V = 3: inside, ½ · 7². V = 1: away from R, max(9², 8²)/2: a worse value is never clipped.
    values, old, returns = jnp.array([5.0, 8.0, 3.0, 1.0]), jnp.full(4, 4.0), jnp.full(4, 10.0)
    bounded = clipped_value_loss(values, old, returns, clip=2.0)
    np.testing.assert_array_equal(bounded.loss, [12.5, 8.0, 24.5, 40.5])
    np.testing.assert_array_equal(bounded.clipped, [False, True, False, False])
    gradient = jax.grad(lambda v, o, r: clipped_value_loss(v, o, r, clip=2.0).loss.sum(), argnums=(0, 1, 2))
    # dℓ/dV = V − R where the clip is not active; no gradient flows into the return and the old value
    for gradients, wanted in zip(gradient(values, old, returns), ([-5, 0, -7, -9], np.zeros(4), np.zeros(4))):
        np.testing.assert_array_equal(gradients, wanted)
    free = clipped_value_loss(values, old, returns, clip=0.0)
    np.testing.assert_array_equal(free.loss, [12.5, 2.0, 24.5, 40.5])
    assert not free.clipped.any()
    with pytest.raises(ValueError, match=r"expected clip of 0 \(off\) or above, got -1.0"):
        clipped_value_loss(values, old, returns, clip=-1.0)


def test_rounding_is_no_clip_of_a_value():
    rng = np.random.default_rng(0)
    old = rng.normal(0, 0.2, 1000)
    values = (old + rng.uniform(-0.4, 0.4, 1000)).astype(np.float32)
    assert not clipped_value_loss(values, old.astype(np.float32), jnp.zeros(1000), clip=0.5).clipped.any()


def test_on_policy_gradient_is_the_policy_gradient():
    logprobs, advantages = jnp.array([-0.1, -2.0, -7.0]), jnp.array([1.0, -2.0, 0.0])
    gradient = jax.grad(lambda x: clipped_at_a_fifth(x, logprobs, advantages).loss.sum())(logprobs)
    np.testing.assert_allclose(gradient, -advantages)
    bounds = {"clip_low": 3e-4, "clip_high": 4e-4}
    gradient = jax.grad(lambda x: sequence_policy_loss(x, jnp.zeros(3), advantages, **bounds).loss.sum())(logprobs)
    np.testing.assert_allclose(gradient, -advantages)


def test_dual_clip_golden():
    # ρ = 4, 2, 4, ½ with A = −1, −1, 2, −1; bounds 0.8 and 1.2, c = 3. Without c: 4, 2, −min(8, 2.4), max(0.5, 0.8).
    # c bounds the first at 3, whose gradient is then 0; where A > 0 it has no effect.
    old, ratio = jnp.full(4, -2.0), jnp.array([4.0, 2.0, 4.0, 0.5])
    loss = functools.partial(clipped_at_a_fifth, dual_clip=3.0)
    advantages = jnp.array([-1.0, -1, 2, -1])
    token = loss(old + jnp.log(ratio), old, advantages)
    np.testing.assert_allclose(token.loss, [3, 2, -2.4, 0.8], rtol=1e-6)
    np.testing.assert_array_equal(token.clipped, [True, False, True, True])
    gradient = jax.grad(lambda x: loss(x, old, advantages).loss.sum())(old + jnp.log(ratio))
    np.testing.assert_allclose(gradient, [0, 2, 0, 0], rtol=1e-6)


def test_sequence_loss_golden():
    # log-ratios ln 2 and 0 in one sequence: s = √2 for both tokens, above 1.2; A = 1 is clipped, A = −1 is not.
    # The other sequence has one token of ratio 1.1, inside the bounds.
    logprobs, old = jnp.log(jnp.array([0.5, 0.25, 0.22])), jnp.log(jnp.array([0.25, 0.25, 0.2]))
    s = response_log_ratios(jnp.array([np.log(2), np.log(1.1)]), np.array([2, 1]), np.array([0, 1]), 2)
    sequence = s[jnp.array([0, 0, 1])]
    loss = functools.partial(sequence_policy_loss, clip_low=0.2, clip_high=0.2)
    for sign, expected in ((1.0, [-1.2, -1.2, -1.1]), (-1.0, [2**0.5, 2**0.5, 1.1])):
        token = loss(logprobs, sequence, jnp.full(3, sign))
        np.testing.assert_allclose(token.loss, expected, rtol=1e-6)
        np.testing.assert_array_equal(token.clipped, [sign > 0, sign > 0, False])
    # Advantages that differ inside a sequence (AEM over a trajectory): to each token its own, −s A.
    free = functools.partial(sequence_policy_loss, clip_low=1.0, clip_high=9.0)
    gradient = jax.grad(lambda x: free(x, sequence, jnp.array([1.0, 2, -1])).loss.sum())(logprobs)
    np.testing.assert_allclose(gradient, [-(2**0.5), -2 * 2**0.5, 1.1], rtol=1e-6)
    # One token a sequence: the token's own ratio.
    np.testing.assert_allclose(token.ratio[2], clipped_at_a_fifth(logprobs, old, logprobs).ratio[2], rtol=1e-6)


def test_log_ratios_of_sequences_golden():
    # Sums 1, 2, −4 of 2, 1, 4 tokens; responses 0 and 2 are of one trajectory; response 3 is outside the minibatch.
    sums, tokens, trajectory = np.array([1.0, 2, -4, 9], np.float32), np.array([2, 1, 4, 0]), np.array([0, 1, 0, 0])
    np.testing.assert_allclose(response_log_ratios(sums, tokens, trajectory, 2), [0.5, 2, -1, 0])
    np.testing.assert_allclose(trajectory_log_ratios(sums, tokens, trajectory, 2), [-0.5, 2, -0.5, 0])


@pytest.mark.parametrize("dual_clip", [0.0, 1.2])
@pytest.mark.parametrize("over_trajectory", [False, True])
def test_the_gradient_flows_through_the_sequence_s_ratio(over_trajectory, dual_clip):
    """Against float64 differences of Σ w n · −min(s A, clip(s) A), s a function of the log-probabilities."""
    rng, step = np.random.default_rng(5), 1e-6
    tokens, trajectory = rng.integers(1, 5, 9).astype(np.int32), np.sort(rng.integers(0, 4, 9)).astype(np.int32)
    response = np.repeat(np.arange(9), tokens)
    sequence = trajectory[response] if over_trajectory else response
    old = -rng.exponential(size=len(response))
    logprobs = old + rng.normal(0, 0.4, len(response))
    advantages, weights = (rng.normal(size=9)[sequence], rng.uniform(size=9)[sequence])

    def slow(x):
        total = 0.0
        for q in set(sequence):
            s, a = np.exp(np.mean((x - old)[sequence == q])), advantages[sequence == q][0]
            loss = max(-s * a, -min(max(s, 0.95), 1.08) * a)
            loss = min(loss, -dual_clip * a) if dual_clip and a < 0 else loss
            total += weights[sequence == q].sum() * loss
        return total

    def ours(x):
        f32 = functools.partial(jnp.asarray, dtype=jnp.float32)
        sums = jax.ops.segment_sum(x - f32(old), response, 9)
        level = trajectory_log_ratios if over_trajectory else response_log_ratios
        s = level(sums, tokens, trajectory, 4)[response]
        bounds = {"clip_low": 0.05, "clip_high": 0.08, "dual_clip": dual_clip}
        return jnp.sum(f32(weights) * sequence_policy_loss(x, s, f32(advantages), **bounds).loss)

    value, gradient = jax.value_and_grad(ours)(jnp.asarray(logprobs, jnp.float32))
    assert float(value) == pytest.approx(slow(logprobs), rel=1e-5)
    numeric = [(slow(logprobs + step * e) - slow(logprobs - step * e)) / (2 * step) for e in np.eye(len(old))]
    np.testing.assert_allclose(gradient, numeric, rtol=1e-4, atol=1e-5)
    assert 0 < np.sum(np.asarray(gradient) == 0) < len(old)


def test_kl_estimators_golden():
    # d = ln 2: k3 = 2 − 1 − 0.6931472 = 0.3068528, k1 = −0.6931472.  d = −ln 2: k3 = ½ − 1 + ln 2 = 0.1931472.
    logprobs, reference = jnp.array([-2.0, -1.0, -3.0]), jnp.array([-2.0 + np.log(2), -1.0 - np.log(2), -3.0])
    np.testing.assert_allclose(k3(logprobs, reference), [0.3068528, 0.1931472, 0.0], rtol=1e-6)
    np.testing.assert_allclose(k1(logprobs, reference), [-0.6931472, 0.6931472, 0.0], rtol=1e-6)


def test_k3_is_precise_near_zero():
    # k3 ≈ d²/2 for small d; e^d − 1 − d in float32 would round to 0 here.
    difference = jnp.array([2.0**-12])
    np.testing.assert_allclose(k3(-difference, jnp.zeros(1)), 2.0**-25, rtol=1e-3)


def test_k1_and_k3_are_unbiased_estimates_of_the_kl():
    # Σ_v π(v) k(v) over the whole vocabulary is the KL, for both, exactly.
    rng = np.random.default_rng(0)
    policy, reference = (jax.nn.log_softmax(jnp.asarray(rng.normal(size=50), jnp.float32)) for _ in range(2))
    kl = float(jnp.sum(jnp.exp(policy) * (policy - reference)))
    for estimator in (k1, k3):
        assert float(jnp.sum(jnp.exp(policy) * estimator(policy, reference))) == pytest.approx(kl, rel=1e-5)


def test_gradients_flow_through_the_policy_alone():
    x = jnp.array([0.1, -0.2])
    for loss in (
        lambda p, q, a: clipped_at_a_fifth(p, q, a).loss.sum(),
        lambda p, q, a: k1(p, q).sum() + 0 * a.sum(),
        lambda p, q, a: k3(p, q).sum() + 0 * a.sum(),
    ):
        by_old, by_advantage = jax.grad(loss, argnums=(1, 2))(x - 1.0, x - 1.1, x)
        np.testing.assert_array_equal(by_old, 0.0)
        np.testing.assert_array_equal(by_advantage, 0.0)


@given(st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=25)
def test_values_and_gradients_equal_float64(seed):
    rng = np.random.default_rng(seed)
    old, logprobs, reference = (-rng.exponential(size=32) for _ in range(3))
    advantages, weights, beta, step = rng.normal(size=32), rng.uniform(size=32), 0.05, 1e-6
    old = logprobs + rng.normal(0, 0.3, 32)

    def slow(x):
        """Σ w (ℓ + β k3), by loops in float64."""
        total = 0.0
        for t in range(32):
            ratio = np.exp(x[t] - old[t])
            policy = max(-ratio * advantages[t], -min(max(ratio, 0.8), 1.28) * advantages[t])
            total += weights[t] * (policy + beta * (np.exp(reference[t] - x[t]) - 1 - (reference[t] - x[t])))
        return total

    def ours(x):
        f32 = functools.partial(jnp.asarray, dtype=jnp.float32)
        token = clipped_policy_loss(x, f32(old), f32(advantages), clip_low=0.2, clip_high=0.28)
        return jnp.sum(f32(weights) * (token.loss + beta * k3(x, f32(reference))))

    value, gradient = jax.value_and_grad(ours)(jnp.asarray(logprobs, jnp.float32))
    assert float(value) == pytest.approx(slow(logprobs), rel=1e-5, abs=1e-5)
    numeric = [(slow(logprobs + step * e) - slow(logprobs - step * e)) / (2 * step) for e in np.eye(32)]
    away = np.min(np.abs(np.exp(logprobs - old)[:, None] - [0.8, 1.28]), axis=1) > 1e-4  # from the kinks
    np.testing.assert_allclose(np.asarray(gradient)[away], np.asarray(numeric)[away], rtol=1e-4, atol=1e-5)


def test_extreme_log_ratios_give_finite_losses():
    token = clipped_at_a_fifth(jnp.array([0.0, 0.0, -500.0]), jnp.array([-500.0, -500.0, 0.0]), jnp.array([0.0, 1, 1]))
    assert np.isfinite(token.loss).all() and np.isfinite(token.ratio).all()
    assert np.isfinite(k3(jnp.array([-500.0]), jnp.array([0.0]))).all()


def test_bfloat16_is_cast_to_float32_first():
    x = jnp.array([-1.0, -2.0], jnp.bfloat16)
    assert clipped_at_a_fifth(x, x, x).loss.dtype == k1(x, x).dtype == k3(x, x).dtype == jnp.float32


# Trajectory 0: responses 0 (2 tokens) and 2 (4). Trajectory 1: response 1 (3). Trajectory 2: outside the minibatch.
TOKENS, TRAJECTORY = np.array([2, 3, 4, 0], np.int32), np.array([0, 1, 0, 2], np.int32)


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [
        (token_mean, [1 / 9, 1 / 9, 1 / 9, 0]),
        (response_mean, [1 / 6, 1 / 9, 1 / 12, 0]),  # three responses
        (trajectory_mean, [1 / 12, 1 / 6, 1 / 12, 0]),  # two trajectories, of 6 and 3 tokens
        (constant_length(10), [1 / 20, 1 / 20, 1 / 20, 0]),
    ],
)
def test_weights_golden(aggregation, expected):
    np.testing.assert_allclose(aggregation(TOKENS, TRAJECTORY, 3), expected, rtol=1e-6)
    np.testing.assert_array_equal(aggregation(0 * TOKENS, TRAJECTORY, 3), 0.0)


def by_definition(losses, trajectory, name):
    """The aggregations by definition: means of means over lists. `losses`: one list per response."""
    used = [index for index, tokens in enumerate(losses) if len(tokens)]
    episodes = {t: np.concatenate([losses[i] for i in used if trajectory[i] == t]) for t in trajectory[used]}
    return {
        "token_mean": lambda: np.mean(np.concatenate([losses[i] for i in used])),
        "response_mean": lambda: np.mean([np.mean(losses[i]) for i in used]),
        "trajectory_mean": lambda: np.mean([np.mean(tokens) for tokens in episodes.values()]),
        "constant_length": lambda: np.mean([np.sum(tokens) / 7 for tokens in episodes.values()]),
    }[name]()


@pytest.mark.parametrize("aggregation", [token_mean, response_mean, trajectory_mean, constant_length(7)])
@given(st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=30)
def test_weighted_sums_are_the_means_however_tokens_are_packed(aggregation, seed):
    rng = np.random.default_rng(seed)
    lengths, trajectory = rng.integers(0, 6, 12).astype(np.int32), rng.integers(0, 5, 12).astype(np.int32)
    lengths[0] = 1
    losses = [rng.normal(size=n) for n in lengths]
    weights = np.asarray(aggregation(lengths, trajectory, 5), np.float64)
    # Tokens are assigned to four microbatches at random: the parts add up to the total.
    token_weights, token_losses = np.repeat(weights, lengths), np.concatenate(losses)
    microbatch = rng.integers(0, 4, len(token_losses))
    parts = [np.sum((token_weights * token_losses)[microbatch == m]) for m in range(4)]
    name = getattr(aggregation, "__name__", "constant_length")
    assert sum(parts) == pytest.approx(by_definition(losses, trajectory, name), rel=1e-5, abs=1e-6)


def test_weights_under_jit():
    for aggregation in (token_mean, response_mean, trajectory_mean, constant_length(10)):
        jitted = jax.jit(aggregation, static_argnums=2)(TOKENS, TRAJECTORY, 3)
        np.testing.assert_allclose(jitted, aggregation(TOKENS, TRAJECTORY, 3), rtol=1e-6)


ONES = jnp.ones(3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: clipped_at_a_fifth(ONES, ONES, ONES[:2]), r"expected equal shapes, got .*advantages \(2,\)"),
        (lambda: clipped_at_a_fifth(ONES, ONES > 0, ONES), "expected old_logprobs of a floating dtype, got bool"),
        (
            lambda: clipped_policy_loss(ONES, ONES, ONES, clip_low=1.2, clip_high=0.2),
            r"clip_low in \[0, 1\] .* got 1.2",
        ),
        (lambda: clipped_policy_loss(ONES, ONES, ONES, clip_low=0.2, clip_high=-1), "clip_high >= 0, got 0.2 and -1"),
        (lambda: k1(ONES, ONES[:1]), "expected equal shapes"),
        (lambda: k3(ONES, ONES.astype(int)), "expected reference_logprobs of a floating dtype, got int32"),
        (lambda: sequence_policy_loss(ONES, ONES[:2], ONES, clip_low=0.2, clip_high=0.2), "expected equal shapes"),
        (
            lambda: clipped_at_a_fifth(ONES, ONES, ONES, dual_clip=0.9),
            r"expected dual_clip of 0 \(off\) or above 1, got 0.9",
        ),
        (lambda: response_log_ratios(ONES, TOKENS[:3] / 1.0, TRAJECTORY[:3], 3), "response_tokens of an integer dtype"),
        (lambda: constant_length(0), "expected length > 0, got 0"),
        (lambda: token_mean(TOKENS, TRAJECTORY[:2], 3), r"expected two tables of shape \[R\], got shapes \(4,\)"),
        (lambda: response_mean(TOKENS / 1.0, TRAJECTORY, 3), "expected response_tokens of an integer dtype"),
    ],
)
def test_bad_input_says_what_was_expected(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_truncated_importance_golden():
    # min(ρ, 2) of ρ = ½, 1, 3/2, 3, e^500
    sampled = jnp.array([-1.0, -2.0, -0.5, -3.0, -500.0])
    logprobs = sampled + jnp.log(jnp.array([0.5, 1.0, 1.5, 3.0, 1.0])).at[4].set(500.0)
    np.testing.assert_allclose(truncated_importance(logprobs, sampled, 2.0), [0.5, 1.0, 1.5, 2.0, 2.0], rtol=1e-6)
    gradients = jax.grad(lambda p, q: truncated_importance(p, q, 2.0).sum(), argnums=(0, 1))(logprobs, sampled)
    np.testing.assert_array_equal(gradients, 0.0)
    with pytest.raises(ValueError, match=r"expected cap >= 1, got 0.5"):
        truncated_importance(logprobs, sampled, 0.5)
