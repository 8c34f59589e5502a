"""METHOD §4, property by property, over ragged groups."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aem_jax.advantage import aem_coefficients, response_entropy

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
def test_shifting_entropies_changes_nothing(example, ticks):
    entropy, groups, valid = example
    shifted = coefficients(entropy + np.float32(ticks / GRID), groups, valid)
    np.testing.assert_array_equal(shifted, coefficients(entropy, groups, valid))


@given(ragged_groups(), st.floats(0.25, 8.0, width=32))
@settings(deadline=None)
def test_scaling_entropies_changes_nothing_above_the_minimum_range(example, scale):
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


def test_coefficients_minimise_their_objective():
    # α/n minimises Σ p H̃ + (1/λ) Σ p log p over distributions: no random p does better.
    entropy, strength = np.array([0.1, 0.9, 1.3, 0.4], np.float32), 1.7
    relative = (entropy - entropy.min()) / np.ptp(entropy)

    def objective(p):
        return (p * relative).sum(-1) + (p * np.log(p)).sum(-1) / strength

    best = np.asarray(aem_coefficients(entropy, np.zeros(4, np.int32), 1, strength=strength)) / 4
    others = np.random.default_rng(0).dirichlet(np.ones(4), size=2000)
    assert objective(best) <= objective(others).min()
    assert objective(best) == pytest.approx(objective(0.999 * best + 0.001 * others).min(), abs=1e-3)


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
