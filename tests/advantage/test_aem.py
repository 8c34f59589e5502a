"""AEM coefficients: METHOD §4, property by property, against values worked out by hand and a slow reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
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

# Entropies on a grid of 1/64 nat: sums, shifts and doublings are exact in float32, and no range falls on 0.1 itself.
GRID = 64.0
NUM_GROUPS = 5
MAX_RESPONSES = 16  # every example is padded to this, so that jax compiles once


@st.composite
def ragged_groups(draw):
    """(entropy f32[16], group_ids i32[16], valid bool[16]): 0 to 16 responses in up to five groups, interleaved."""
    count = draw(st.integers(0, MAX_RESPONSES))
    ticks = draw(st.lists(st.integers(0, 200), min_size=count, max_size=count))
    groups = draw(st.lists(st.integers(0, NUM_GROUPS - 1), min_size=count, max_size=count))
    valid = draw(st.lists(st.sampled_from([True, True, True, False]), min_size=count, max_size=count))
    pad = MAX_RESPONSES - count
    entropy = np.array(ticks + [0] * pad, np.float32) / GRID
    return entropy, np.array(groups + [-1] * pad, np.int32), np.array(valid + [False] * pad, bool)


@jax.jit
def coefficients(entropy, groups, valid, strength=1.0):
    return aem_coefficients(entropy, groups, NUM_GROUPS, strength=strength, valid=valid)


def reference(entropy, groups, valid, strength=1.0, min_range=0.1):
    """METHOD §4 as written, one group at a time, in float64."""
    alpha = np.ones(len(entropy))
    for group in set(groups[valid]) - {-1}:
        rows = np.flatnonzero(valid & (groups == group))
        h = entropy[rows].astype(np.float64)
        if h.max() - h.min() >= min_range:
            weight = np.exp(-strength * (h - h.min()) / (h.max() - h.min()))
            alpha[rows] = weight / weight.mean()
    return alpha


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


@given(ragged_groups(), st.floats(0.0, 4.0, width=32))
@settings(deadline=None)
def test_equals_the_slow_reference(example, strength):
    entropy, groups, valid = example
    expected = reference(entropy, groups, valid, strength)
    np.testing.assert_allclose(coefficients(entropy, groups, valid, strength), expected, rtol=2e-6)


@given(ragged_groups())
@settings(deadline=None)
def test_mean_over_a_group_is_one(example):
    entropy, groups, valid = example
    alpha = np.asarray(coefficients(entropy, groups, valid))
    for group in set(groups[valid]):
        assert alpha[valid & (groups == group)].mean() == pytest.approx(1.0, abs=1e-6)


@given(ragged_groups(), st.floats(0.0, 4.0, width=32))
@settings(deadline=None)
def test_positive_and_bounded(example, strength):
    alpha = np.asarray(coefficients(*example, strength))
    assert (alpha > 0).all()
    assert (alpha >= np.exp(-strength) * (1 - 1e-5)).all()
    assert (alpha <= np.exp(strength) * (1 + 1e-5)).all()


@given(ragged_groups())
@settings(deadline=None)
def test_no_advantage_changes_sign(example):
    entropy, groups, valid = example
    advantages = np.sin(np.arange(MAX_RESPONSES, dtype=np.float32)) * (np.arange(MAX_RESPONSES) % 5 > 0)
    scaled = np.asarray(coefficients(entropy, groups, valid)) * advantages
    np.testing.assert_array_equal(np.sign(scaled), np.sign(advantages))


@given(ragged_groups())
@settings(deadline=None)
def test_falls_as_entropy_rises(example):
    entropy, groups, valid = example
    alpha = np.asarray(coefficients(entropy, groups, valid))
    for group in set(groups[valid]):
        rows = np.flatnonzero(valid & (groups == group))
        rows = rows[np.argsort(entropy[rows], kind="stable")]
        rise, fall = np.diff(entropy[rows]), np.diff(alpha[rows])
        assert (fall <= 0).all()
        if np.ptp(entropy[rows]) >= 0.1:
            np.testing.assert_array_equal(fall < 0, rise > 0)


@given(ragged_groups(), st.integers(-300, 300))
@settings(deadline=None)
def test_shift_changes_nothing(example, ticks):
    entropy, groups, valid = example
    shifted = coefficients(entropy + np.float32(ticks / GRID), groups, valid)
    np.testing.assert_array_equal(shifted, coefficients(entropy, groups, valid))


@given(ragged_groups(), st.floats(0.25, 8.0, width=32))
@settings(deadline=None)
def test_scale_changes_nothing_while_the_range_stays(example, scale):
    entropy, groups, valid = example
    before, after = np.asarray(coefficients(entropy, groups, valid)), coefficients(entropy * scale, groups, valid)
    for group in set(groups[valid]):
        rows = valid & (groups == group)
        if np.ptp(entropy[rows]) >= 0.1 and np.ptp(entropy[rows]) * scale >= 0.101:
            np.testing.assert_allclose(np.asarray(after)[rows], before[rows], rtol=1e-5)


@given(ragged_groups(), st.randoms(use_true_random=False))
@settings(deadline=None)
def test_permuting_responses_permutes_coefficients(example, random):
    order = list(range(MAX_RESPONSES))
    random.shuffle(order)
    permuted = coefficients(*(array[order] for array in example))
    np.testing.assert_allclose(permuted, np.asarray(coefficients(*example))[order], rtol=1e-6)


@given(ragged_groups())
@settings(deadline=None)
def test_strength_zero_is_one(example):
    np.testing.assert_array_equal(coefficients(*example, 0.0), np.ones(MAX_RESPONSES))


@given(ragged_groups(), st.integers(0, NUM_GROUPS - 1), st.floats(0, 50, width=32))
@settings(deadline=None)
def test_a_group_never_affects_another(example, group, entropy_there):
    entropy, groups, valid = example
    elsewhere = groups != group
    changed = np.where(elsewhere, entropy, np.float32(entropy_there) * np.arange(MAX_RESPONSES, dtype=np.float32))
    before, after = coefficients(entropy, groups, valid), coefficients(changed, groups, valid)
    np.testing.assert_array_equal(np.asarray(after)[elsewhere], np.asarray(before)[elsewhere])


@given(ragged_groups(), st.sampled_from([0.0, 1e6, np.inf, -np.inf, np.nan]))
@settings(deadline=None)
def test_masked_responses_are_one_and_take_no_part(example, rubbish):
    entropy, groups, valid = example
    alpha = coefficients(np.where(valid, entropy, np.float32(rubbish)), groups, valid)
    np.testing.assert_array_equal(alpha, coefficients(entropy, groups, valid))
    np.testing.assert_array_equal(np.asarray(alpha)[~valid], 1.0)


def test_is_the_minimiser_that_it_claims_to_be():
    # α/n minimises Σ p H̃ + (1/λ) Σ p log p over distributions: no random p does better.
    entropy, strength = np.array([0.1, 0.9, 1.3, 0.4], np.float32), 1.7
    relative = (entropy - entropy.min()) / np.ptp(entropy)

    def objective(p):
        return (p * relative).sum(-1) + (p * np.log(p)).sum(-1) / strength

    best = np.asarray(aem_coefficients(entropy, np.zeros(4, np.int32), 1, strength=strength)) / 4
    others = np.random.default_rng(0).dirichlet(np.ones(4), size=2000)
    assert objective(best) <= objective(others).min()
    assert objective(best) == pytest.approx(objective(0.999 * best + 0.001 * others).min(), abs=1e-3)


@pytest.mark.parametrize(("spread", "modulated"), [(0.0, False), (0.09375, False), (0.109375, True)])
def test_the_rule_at_a_tenth(spread, modulated):
    alpha = np.asarray(aem_coefficients(jnp.array([2.0, 2.0 + spread]), jnp.array([0, 0]), 1))
    assert (alpha[0] > 1.0 > alpha[1]) if modulated else (alpha == 1.0).all()


def test_min_range_zero_with_equal_entropies():
    alpha = aem_coefficients(jnp.array([0.7, 0.7, 0.7]), jnp.array([0, 0, 0]), 1, min_range=0.0)
    np.testing.assert_array_equal(alpha, [1.0, 1.0, 1.0])


def test_one_response_groups_all_masked_groups_and_empty_groups():
    # Group 4: one response. Group 1: both masked. Groups 0, 2: nobody. Group 3, unsorted: rows 1 and 4.
    alpha = aem_coefficients(
        jnp.array([5.0, 1.0, 0.0, 3.0, 2.0]),
        jnp.array([4, 3, 1, 1, 3]),
        5,
        valid=jnp.array([True, True, False, False, True]),
    )
    # Group 3: H̃ = 0, 1:  α = 2 / (1 + e^-1), 2 e^-1 / (1 + e^-1).
    np.testing.assert_allclose(alpha, [1.0, 1.4621172, 1.0, 1.0, 0.5378828], rtol=1e-6)


def test_empty_response_takes_no_part():
    # Responses 0 and 2 speak, response 1 never does; without it H̄ = 1, 2 and α = 1.4621172, 0.5378828.
    entropy = response_entropy(jnp.array([[0.5, 1.5, 2.0, 7.0]]), jnp.array([[0, 0, 2, -1]]), 3)
    alpha = aem_coefficients(entropy, jnp.array([0, 0, 0]), 1)
    np.testing.assert_allclose(alpha, [1.4621172, 1.0, 0.5378828], rtol=1e-6)


def test_no_responses_and_no_groups():
    assert aem_coefficients(jnp.zeros(0), jnp.zeros(0, jnp.int32), 0).shape == (0,)
    assert token_advantages(jnp.zeros(0), jnp.full((2, 3), -1)).tolist() == [[0.0] * 3] * 2


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=20, deadline=None)
def test_padding_and_other_tokens_change_nothing(seed):
    rng = np.random.default_rng(seed)
    ids = rng.integers(-1, 6, size=(4, 8)).astype(np.int32)
    entropy = rng.uniform(0, 3, size=(4, 8)).astype(np.float32)
    groups = np.array([0, 1, 0, 1, 0, 1], np.int32)

    def alpha(entropy, ids):
        return np.asarray(aem_coefficients(response_entropy(entropy, ids, 6), groups, 2))

    padded_ids = np.pad(ids, ((0, 2), (0, 3)), constant_values=-1)
    padded_entropy = np.pad(np.where(ids >= 0, entropy, 77.0), ((0, 2), (0, 3)), constant_values=np.nan)
    np.testing.assert_allclose(alpha(padded_entropy.astype(np.float32), padded_ids), alpha(entropy, ids), rtol=1e-6)


def test_token_advantages_golden():
    tokens = token_advantages(jnp.array([2.0, -1.0]), jnp.array([[-1, 0, 0, -1], [1, -1, 1, 1]]))
    np.testing.assert_array_equal(tokens, [[0, 2, 2, 0], [-1, 0, -1, -1]])


def test_scale_is_the_one_line_of_the_whole():
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
    # … but through the advantages that it scales, with α as a constant factor, and NaN-free beside empty responses.
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


def whole_credit(entropy, response_ids, response_trajectory, returns, groups):
    """Everything between a batch and its token advantages."""
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
    eager = np.asarray(whole_credit(*map(jnp.asarray, args)))
    np.testing.assert_allclose(jax.jit(whole_credit)(*args), eager, rtol=1e-5, atol=1e-6)
    mesh = jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    rows = NamedSharding(mesh, P(("data", "fsdp")))
    sharded = jax.jit(whole_credit, out_shardings=rows)(*(jax.device_put(array, rows) for array in args))
    assert len(sharded.sharding.device_set) == 8
    np.testing.assert_allclose(sharded, eager, rtol=1e-5, atol=1e-6)


def test_statistics_golden():
    # Group 0: H̄ = 0, 1: α = 1.4621172, 0.5378828. Group 1: range 0.05, α = 1, 1. Group 2: nobody. Last row masked.
    entropy, groups = jnp.array([0.0, 1.0, 0.5, 0.55, 9.0]), jnp.array([0, 0, 1, 1, 0])
    valid, advantages = jnp.array([True, True, True, True, False]), jnp.array([1.0, -1.0, 2.0, 0.0, -5.0])
    alpha = aem_coefficients(entropy, groups, 3, valid=valid)
    statistics = coefficient_statistics(alpha, advantages, entropy, groups, 3, valid=valid)
    # Positive: (1.4621172 + 1)/2; negative: row 1 alone; one of the two groups present is at the rule.
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
