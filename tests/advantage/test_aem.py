"""AEM coefficients by hand: golden values, the edges of a batch, gradients, precisions, jit, vmap and sharding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from aem_jax.advantage import (
    aem_coefficients,
    aem_scale,
    coefficient_statistics,
    grpo,
    over_trajectories,
    response_entropy,
    token_advantages,
)


def test_golden_values():
    # Group 0 (rows 0, 2, 4), H̄ = 1.0, 1.5, 2.0:  H̃ = 0, 0.5, 1;  e^-H̃ = 1, 0.6065307, 0.3678794; their mean is
    # 1.9744101 / 3 = 0.6581367;  α = 1.5194412, 0.9215878, 0.5589712.
    # Group 1 (rows 1, 3), H̄ = 0.3, 0.35: a range of 0.05 < 0.1, so α = 1.
    alpha = aem_coefficients(jnp.array([1.0, 0.3, 1.5, 0.35, 2.0]), jnp.array([0, 1, 0, 1, 0]), 2)
    np.testing.assert_allclose(alpha, [1.5194412, 1.0, 0.9215878, 1.0, 0.5589712], rtol=1e-6)


def test_strength_in_golden_values():
    # H̃ = 0, 1 and λ = 2:  e^0 = 1, e^-2 = 0.1353353; mean 0.5676676;  α = 1.7615942, 0.2384058 (= 1 ± tanh 1).
    alpha = aem_coefficients(jnp.array([0.2, 0.9]), jnp.array([0, 0]), 1, strength=2.0)
    np.testing.assert_allclose(alpha, [1.7615942, 0.2384058], rtol=1e-6)
    reversed_alpha = aem_coefficients(jnp.array([0.2, 0.9]), jnp.array([0, 0]), 1, strength=-2.0)
    np.testing.assert_allclose(reversed_alpha, [0.2384058, 1.7615942], rtol=1e-6)


@pytest.mark.parametrize(("spread", "modulated"), [(0.0, False), (0.09375, False), (0.109375, True)])
def test_groups_below_the_minimum_range_keep_one(spread, modulated):
    alpha = np.asarray(aem_coefficients(jnp.array([2.0, 2.0 + spread]), jnp.array([0, 0]), 1))
    assert (alpha[0] > 1.0 > alpha[1]) if modulated else (alpha == 1.0).all()


def test_min_range_zero_with_equal_entropies():
    alpha = aem_coefficients(jnp.array([0.7, 0.7, 0.7]), jnp.array([0, 0, 0]), 1, min_range=0.0)
    np.testing.assert_array_equal(alpha, [1.0, 1.0, 1.0])


def test_one_response_groups_all_masked_groups_and_empty_groups():
    # Group 4: one response. Group 1: both masked. Groups 0, 2: empty. Group 3, unsorted: rows 1 and 4.
    alpha = aem_coefficients(
        jnp.array([5.0, 1.0, 0.0, 3.0, 2.0]),
        jnp.array([4, 3, 1, 1, 3]),
        5,
        valid=jnp.array([True, True, False, False, True]),
    )
    # Group 3: H̃ = 0, 1:  α = 2 / (1 + e^-1), 2 e^-1 / (1 + e^-1).
    np.testing.assert_allclose(alpha, [1.0, 1.4621172, 1.0, 1.0, 0.5378828], rtol=1e-6)


def test_empty_response_takes_no_part():
    # Responses 0 and 2 have tokens, response 1 has none; without it H̄ = 1, 2 and α = 1.4621172, 0.5378828.
    entropy = response_entropy(jnp.array([[0.5, 1.5, 2.0, 7.0]]), jnp.array([[0, 0, 2, -1]]), 3)
    alpha = aem_coefficients(entropy, jnp.array([0, 0, 0]), 1)
    np.testing.assert_allclose(alpha, [1.4621172, 1.0, 0.5378828], rtol=1e-6)


def test_no_responses_and_no_groups():
    assert aem_coefficients(jnp.zeros(0), jnp.zeros(0, jnp.int32), 0).shape == (0,)
    assert token_advantages(jnp.zeros(0), jnp.full((2, 3), -1)).tolist() == [[0.0] * 3] * 2


def test_token_advantages_golden():
    tokens = token_advantages(jnp.array([2.0, -1.0]), jnp.array([[-1, 0, 0, -1], [1, -1, 1, 1]]))
    np.testing.assert_array_equal(tokens, [[0, 2, 2, 0], [-1, 0, -1, -1]])


def test_aem_scale_golden():
    # Means over the masks: row 0 (0.5 + 1.5)/2 = 1, row 1 = 2, row 2 has no token.
    entropy = jnp.array([[0.5, 1.5, 9.0], [9.0, 2.0, jnp.nan], [9.0, 9.0, 9.0]])
    mask = jnp.array([[True, True, False], [False, True, False], [False, False, False]])
    scaled = aem_scale(jnp.array([1.0, -1.0, 3.0]), entropy, mask, jnp.array([0, 0, 0]), 1)
    np.testing.assert_allclose(scaled, [1.4621172, -0.5378828, 3.0], rtol=1e-6)


def test_no_gradient_through_the_coefficient():
    entropy, groups = jnp.array([0.1, 0.9, 0.4]), jnp.array([0, 0, 0])
    np.testing.assert_array_equal(jax.grad(lambda h: (aem_coefficients(h, groups, 1) ** 2).sum())(entropy), 0.0)
    np.testing.assert_array_equal(
        jax.grad(lambda s: aem_coefficients(entropy, groups, 1, strength=s)[0])(1.0),
        0.0,
    )
    # … except through the scaled advantages, with α as a constant factor, and without NaN next to empty responses.
    mask = jnp.array([[True], [True], [False]])
    gradient_of = jax.grad(lambda a, h: (aem_scale(a, h, mask, groups, 1) ** 2).sum() / 2, argnums=(0, 1))
    by_advantage, by_entropy = gradient_of(jnp.ones(3), entropy[:, None])
    np.testing.assert_allclose(by_advantage, [1.4621172**2, 0.5378828**2, 1.0], rtol=1e-6)
    np.testing.assert_array_equal(by_entropy, 0.0)


def test_bfloat16_is_reduced_in_float32():
    # 1024 tokens of 0.01 + 1: a bfloat16 sum (8 bits) would stop growing at 256.
    entropy = jnp.full((1, 1024), 1.0078125, jnp.bfloat16)
    mean = response_entropy(entropy, jnp.zeros((1, 1024), jnp.int32), 1)
    assert mean.dtype == jnp.float32
    assert mean[0] == 1.0078125
    alpha = aem_coefficients(jnp.array([1.0, 2.0], jnp.bfloat16), jnp.array([0, 0]), 1)
    assert alpha.dtype == jnp.float32
    np.testing.assert_allclose(alpha, [1.4621172, 0.5378828], rtol=1e-6)


def test_float64_stays_float64():
    with jax.enable_x64(True):
        alpha = aem_coefficients(np.array([0.0, 1.0]), np.array([0, 0]), 1)
        assert alpha.dtype == jnp.float64
        np.testing.assert_allclose(alpha, [2 / (1 + np.exp(-1)), 2 / (1 + np.e)], rtol=1e-15)


def test_vmap_equals_a_loop():
    rng = np.random.default_rng(1)
    entropy = rng.uniform(0, 3, (4, 10)).astype(np.float32)
    groups = rng.integers(-1, 3, (4, 10)).astype(np.int32)
    batched = jax.vmap(lambda h, g: aem_coefficients(h, g, 3))(entropy, groups)
    looped = np.stack([aem_coefficients(h, g, 3) for h, g in zip(entropy, groups, strict=True)])
    np.testing.assert_allclose(batched, looped, rtol=1e-6)


def all_steps(entropy, response_ids, response_trajectory, returns, groups):
    """All steps from a batch to its token advantages."""
    base = over_trajectories(grpo, returns, groups, 3, response_trajectory)
    alpha = aem_coefficients(response_entropy(entropy, response_ids, 24), groups[response_trajectory], 3)
    return token_advantages(alpha * base, response_ids)


def test_jit_and_a_batch_sharded_over_8_devices_equal_eager():
    if jax.device_count() < 8:
        pytest.skip("needs 8 devices: XLA_FLAGS=--xla_force_host_platform_device_count=8")
    rng = np.random.default_rng(2)
    args = (
        rng.uniform(0, 3, (16, 12)).astype(np.float32),
        rng.integers(-1, 24, (16, 12)).astype(np.int32),
        rng.integers(0, 16, 24).astype(np.int32),
        rng.normal(size=16).astype(np.float32),
        rng.integers(0, 3, 16).astype(np.int32),
    )
    eager = np.asarray(all_steps(*map(jnp.asarray, args)))
    np.testing.assert_allclose(jax.jit(all_steps)(*args), eager, rtol=1e-5, atol=1e-6)
    mesh = jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    rows = NamedSharding(mesh, P(("data", "fsdp")))
    sharded = jax.jit(all_steps, out_shardings=rows)(*(jax.device_put(array, rows) for array in args))
    assert len(sharded.sharding.device_set) == 8
    np.testing.assert_allclose(sharded, eager, rtol=1e-5, atol=1e-6)


def test_statistics_golden():
    # Group 0: H̄ = 0, 1: α = 1.4621172, 0.5378828. Group 1: range 0.05, α = 1, 1. Group 2: empty. Last row masked.
    entropy, groups = jnp.array([0.0, 1.0, 0.5, 0.55, 9.0]), jnp.array([0, 0, 1, 1, 0])
    valid, advantages = jnp.array([True, True, True, True, False]), jnp.array([1.0, -1.0, 2.0, 0.0, -5.0])
    alpha = aem_coefficients(entropy, groups, 3, valid=valid)
    statistics = coefficient_statistics(alpha, advantages, entropy, groups, 3, valid=valid)
    # Positive: (1.4621172 + 1)/2; negative: row 1 alone; one of the two non-empty groups has α = 1 by the rule.
    np.testing.assert_allclose(statistics, [1.2310586, 0.5378828, 0.5378828, 1.4621172, 0.5], rtol=1e-6)
    nobody = coefficient_statistics(alpha, advantages, entropy, groups, 3, valid=jnp.zeros(5, bool))
    assert all(np.isnan(value) for value in nobody)


FOUR, IDS = jnp.ones(4), jnp.zeros(4, jnp.int32)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: aem_coefficients(IDS, IDS, 1), "expected response_entropy of a floating dtype, got int32"),
        (lambda: aem_coefficients(FOUR, FOUR, 1), "expected group_ids of an integer dtype, got float32"),
        (lambda: aem_coefficients(FOUR, IDS[:3], 1), r"expected equal shapes, got .*\(4,\).*\(3,\)"),
        (
            lambda: aem_coefficients(FOUR[None], IDS[None], 1),
            r"response_entropy with one axis, got .*\(1, 4\)",
        ),
        (lambda: aem_coefficients(FOUR, IDS + 2, 2), r"expected group_ids in \[-1, 2\), got values from 2 to 2"),
        (lambda: aem_coefficients(FOUR, np.array([0, 0, 0, -2]), 2), r"expected group_ids in \[-1, 2\), got .* -2"),
        (lambda: aem_coefficients(FOUR, IDS, -1), "expected num_groups >= 0, got -1"),
        (lambda: aem_coefficients(FOUR, IDS, 1.5), "expected num_groups to be an int, got 1.5"),  # type: ignore[arg-type]
        (lambda: aem_coefficients(FOUR, IDS, 1, valid=IDS), "expected valid of dtype bool, got int32"),
        (lambda: aem_coefficients(FOUR, IDS, 1, valid=IDS[:2] > 0), "expected equal shapes"),
        (lambda: aem_coefficients(FOUR, IDS, 1, min_range=-0.1), "expected min_range >= 0, got -0.1"),
        (lambda: aem_coefficients(FOUR, IDS, 1, min_range=float("nan")), "expected min_range >= 0, got nan"),
        (lambda: jax.jit(aem_coefficients)(FOUR, IDS, 1), "expected num_groups to be a Python int, got a traced array"),
        (lambda: jax.jit(lambda h: aem_coefficients(h, IDS[:3], 1))(FOUR), "expected equal shapes"),
        (lambda: token_advantages(FOUR, IDS + 4), r"expected response_ids in \[-1, 4\), got values from 4 to 4"),
        (lambda: token_advantages(FOUR[None], IDS), "expected response_advantages with one axis"),
        (lambda: aem_scale(FOUR, FOUR, FOUR > 0, IDS, 1), r"expected mask of shape \[4, T\], got \(4,\)"),
        (lambda: aem_scale(FOUR, jnp.ones((4, 2)), jnp.ones((4, 3), bool), IDS, 1), "expected equal shapes"),
        (lambda: aem_scale(FOUR, jnp.ones((4, 2)), jnp.ones((4, 2)), IDS, 1), "expected mask of dtype bool"),
    ],
)
def test_bad_input_says_what_was_expected(call, message):
    with pytest.raises(ValueError, match=message):
        call()
