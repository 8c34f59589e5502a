"""Token statistics, response entropy, and the drift identity that AEM rests on (METHOD §2)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aem_jax.advantage import response_entropy, token_statistics


def test_token_statistics_golden():
    # π = (1/2, 1/4, 1/4): H = ½ ln 2 + ½ ln 4 = 1.5 ln 2 = 1.0397208; log π(1) = −2 ln 2 = −1.3862944.
    # π uniform over 4: H = ln 4 = 1.3862944, and every surprisal is equal to H.
    logits = jnp.log(jnp.array([[0.5, 0.25, 0.25, 0.0], [0.25, 0.25, 0.25, 0.25]])) + 3.0
    logprobs, entropies = token_statistics(logits, jnp.array([1, 3]))
    np.testing.assert_allclose(logprobs, [-1.3862944, -1.3862944], rtol=1e-6)
    np.testing.assert_allclose(entropies, [1.0397208, 1.3862944], rtol=1e-6)


def test_ruled_out_tokens_leave_entropy_and_gradient_finite():
    logits = jnp.array([0.0, 0.0, -jnp.inf])
    logprobs, entropy = token_statistics(logits, jnp.array(0))
    np.testing.assert_allclose((logprobs, entropy), (-0.6931472, 0.6931472), rtol=1e-6)
    for statistic in (0, 1):
        gradient = jax.grad(lambda z, which=statistic: token_statistics(z, jnp.array(0))[which])(logits)
        assert np.isfinite(gradient).all() and gradient[2] == 0.0


def test_entropy_is_never_negative_and_survives_large_logits():
    # An almost deterministic policy with a large common offset.
    logits = jnp.array([[1e4, 1e4 - 30.0, 0.0], [-1e4, -1e4, -1e4]])
    _, entropies = token_statistics(logits, jnp.array([0, 0]))
    assert 0.0 <= entropies[0] < 1e-10
    np.testing.assert_allclose(entropies[1], np.log(3), rtol=1e-6)


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=25, deadline=None)
def test_token_statistics_equal_float64(seed):
    rng = np.random.default_rng(seed)
    logits, tokens = rng.normal(0, 4, (2, 3, 17)).astype(np.float32), rng.integers(0, 17, (2, 3))
    z = logits.astype(np.float64)
    log_policy = z - np.log(np.exp(z).sum(-1, keepdims=True))
    logprobs, entropies = token_statistics(logits, tokens)
    np.testing.assert_allclose(
        logprobs, np.take_along_axis(log_policy, tokens[..., None], -1)[..., 0], rtol=1e-5, atol=1e-5
    )
    np.testing.assert_allclose(entropies, -(np.exp(log_policy) * log_policy).sum(-1), rtol=1e-5, atol=1e-5)


def test_entropy_gradient_equals_its_closed_form():
    # ∇_z H = −π ⊙ (log π + H)
    logits = jnp.array([0.3, -1.0, 2.0, 0.5])
    gradient = jax.grad(lambda z: token_statistics(z, jnp.array(0))[1])(logits)
    log_policy = np.asarray(jax.nn.log_softmax(logits))
    policy, entropy = np.exp(log_policy), -(np.exp(log_policy) * log_policy).sum()
    np.testing.assert_allclose(gradient, -policy * (log_policy + entropy), rtol=1e-5, atol=1e-7)


def test_low_precision_logits_are_cast_to_float32_first():
    logits = jnp.linspace(-2, 2, 1000, dtype=jnp.float32).astype(jnp.bfloat16)
    logprob, entropy = token_statistics(logits, jnp.array(5))
    assert logprob.dtype == entropy.dtype == jnp.float32
    expected = token_statistics(logits.astype(jnp.float32), jnp.array(5))
    np.testing.assert_array_equal((logprob, entropy), expected)


def test_response_entropy_golden():
    # Response 0: (1 + 2)/2, across two rows. Response 1: none. Response 2: 4. Id −1 counts nowhere, NaN or not.
    entropy = jnp.array([[1.0, jnp.nan, 4.0], [9.0, 2.0, jnp.inf]])
    ids = jnp.array([[0, -1, 2], [-1, 0, -1]])
    np.testing.assert_array_equal(response_entropy(entropy, ids, 3), [1.5, np.nan, 4.0])


def test_response_entropy_gradient_is_one_over_the_length():
    ids = jnp.array([[0, 0, -1, 1]])
    gradient = jax.grad(lambda h: jnp.nansum(response_entropy(h, ids, 3)))(jnp.array([[1.0, 2.0, 3.0, 4.0]]))
    np.testing.assert_array_equal(gradient, [[0.5, 0.5, 0.0, 1.0]])


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=25, deadline=None)
def test_response_entropy_does_not_depend_on_the_layout(seed):
    rng = np.random.default_rng(seed)
    ids, entropy = rng.integers(-1, 5, 48).astype(np.int32), rng.uniform(0, 5, 48).astype(np.float32)
    order = rng.permutation(48)
    one_row = response_entropy(entropy[None], ids[None], 5)
    packed = response_entropy(entropy[order].reshape(3, 2, 8), ids[order].reshape(3, 2, 8), 5)
    np.testing.assert_allclose(packed, one_row, rtol=1e-6)


@pytest.mark.parametrize("seed", range(8))
def test_drift_identity(seed):
    """dH/dη = A · (S(a) − H) along the natural gradient of A log π(a), numerically, to 1e-6 in float64."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(seed)
        theta, action, advantage = rng.normal(0, 1.5, 7), rng.integers(7), rng.normal()
        logprob, entropy = token_statistics(theta, np.asarray(action))
        policy = np.exp(theta) / np.exp(theta).sum()
        fisher = np.diag(policy) - np.outer(policy, policy)
        score = np.eye(7)[action] - policy
        direction = np.linalg.lstsq(fisher, advantage * score, rcond=1e-12)[0]  # F is singular along the constant

        def entropy_after(eta):
            return float(token_statistics(theta + eta * direction, np.asarray(action))[1])

        # Richardson's central difference: an error of order step⁴. Steps are relative to the largest move of a logit.
        step = 1e-3 / np.abs(direction).max()
        wide, narrow = ((entropy_after(h) - entropy_after(-h)) / (2 * h) for h in (2 * step, step))
        drift = (4 * narrow - wide) / 3
        assert logprob.dtype == jnp.float64
        assert drift == pytest.approx(advantage * float(-logprob - entropy), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: token_statistics(jnp.ones((2, 3)), jnp.zeros(3, int)),
            r"expected logits of shape tokens.shape",
        ),
        (lambda: token_statistics(jnp.ones((2, 3), int), jnp.zeros(2, int)), "expected logits of a floating dtype"),
        (lambda: token_statistics(jnp.ones((2, 3)), jnp.zeros(2)), "expected tokens of an integer dtype, got float32"),
        (lambda: response_entropy(jnp.ones((2, 3)), jnp.zeros((3, 2), int), 1), "expected equal shapes"),
        (lambda: response_entropy(jnp.zeros((2, 3), int), jnp.ones((2, 3)), 1), "swapped"),
        (lambda: response_entropy(jnp.ones((1, 2)), jnp.array([[0, 3]]), 3), r"expected response_ids in \[-1, 3\)"),
        (lambda: response_entropy(jnp.ones((1, 2)), jnp.array([[0, 3]]), None), "expected num_responses to be an int"),  # type: ignore[arg-type]
    ],
)
def test_bad_input_says_what_was_expected(call, message):
    with pytest.raises(ValueError, match=message):
        call()
