"""Base advantages against hand arithmetic, a slow reference, and each other."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aem_jax.advantage import dr_grpo, grpo, maxrl, over_trajectories, over_turns, rloo

# Group 0 (rows 0, 2, 3): returns 10, 0, 2 -> μ = 4, deviations 6, −4, −2, squares 36 + 16 + 4 = 56.
# Group 1 (rows 1, 5): returns 1, 3 -> μ = 2, deviations −1, 1. Row 4 is masked; group 2 has one row.
RETURNS = np.array([10, 1, 0, 2, 99, 3, 7], np.float32)
GROUPS = np.array([0, 1, 0, 0, 1, 1, 2], np.int32)
VALID = np.array([True, True, True, True, False, True, True])


def test_grpo_golden():
    # ddof 0: σ₀ = √(56/3) = 4.3204938, σ₁ = 1.   ddof 1: σ₀ = √28 = 5.2915026, σ₁ = √2.
    population = grpo(RETURNS, GROUPS, 3, eps=0.0, valid=VALID)
    np.testing.assert_allclose(population, [1.3887301, -1, -0.9258201, -0.46291, 0, 1, 0], rtol=1e-6)
    sample = grpo(RETURNS, GROUPS, 3, ddof=1, eps=0.0, valid=VALID)
    np.testing.assert_allclose(sample, [1.1338934, -0.7071068, -0.7559289, -0.3779645, 0, 0.7071068, 0], rtol=1e-6)
    # eps = 1 is added to σ, not to σ²: 6 / 5.3204938.
    assert grpo(RETURNS, GROUPS, 3, eps=1.0, valid=VALID)[0] == pytest.approx(1.1277149)


def test_dr_grpo_golden():
    np.testing.assert_allclose(dr_grpo(RETURNS, GROUPS, 3, valid=VALID), [6, -1, -4, -2, 0, 1, 0])


def test_rloo_golden():
    # Row 0 against the mean of the others: 10 − (0 + 2)/2 = 9; row 2: 0 − 6 = −6; row 3: 2 − 5 = −3; group 1: −2, 2.
    np.testing.assert_allclose(rloo(RETURNS, GROUPS, 3, valid=VALID), [9, -2, -6, -3, 0, 2, 0], rtol=1e-6)


def test_maxrl_golden():
    # μ₀ = 4, μ₁ = 2: 6/4, −1/2, −4/4, −2/4, 1/2.   eps = 1 is added to μ: 6/5.
    np.testing.assert_allclose(
        maxrl(RETURNS, GROUPS, 3, eps=0.0, valid=VALID), [1.5, -0.5, -1, -0.5, 0, 0.5, 0], rtol=1e-6
    )
    assert maxrl(RETURNS, GROUPS, 3, eps=1.0, valid=VALID)[0] == pytest.approx(1.2)


@pytest.mark.parametrize("eps", [0.0, 1e-6])
def test_maxrl_has_no_gradient_where_the_mean_is_not_positive(eps):
    # Groups: no success; a mean of exactly 0; a mean below 0; penalties and one success.
    returns = np.array([0, 0, 1, -1, -0.5, -0.1, -0.5, 2.5], np.float32)
    groups = np.repeat(np.arange(4, dtype=np.int32), 2)
    advantages = np.asarray(maxrl(returns, groups, 4, eps=eps))
    np.testing.assert_array_equal(advantages[:6], 0.0)
    np.testing.assert_allclose(advantages[6:], [-1.5, 1.5], rtol=1e-5)
    assert np.isfinite(jax.grad(lambda r: maxrl(r, groups, 4, eps=eps).sum())(jnp.asarray(returns))).all()


@pytest.mark.parametrize("successes", range(1, 8))
def test_maxrl_of_outcomes_is_grpo_on_another_scale(successes):
    # σ = √(p(1 − p)) and μ = p: MaxRL is √((1 − p)/p) times GRPO, and gives a success 1/p − 1.
    returns, groups, p = (np.arange(8) < successes).astype(np.float32), np.zeros(8, np.int32), successes / 8
    advantages = maxrl(returns, groups, 1, eps=0.0)
    np.testing.assert_allclose(advantages, np.sqrt((1 - p) / p) * grpo(returns, groups, 1, eps=0.0), rtol=1e-5)
    np.testing.assert_allclose(advantages, np.where(returns > 0, 1 / p - 1, -1.0), rtol=1e-5)


def test_equal_returns_give_exactly_zero():
    # 0.1 is no float32: Σ/8 would leave a rounding error that 1/(σ + 1e-6) turns into an advantage.
    returns, groups = np.full(8, 9.7, np.float32), np.zeros(8, np.int32)
    for estimator in (grpo, functools.partial(grpo, ddof=1), functools.partial(grpo, eps=0.0), dr_grpo, rloo, maxrl):
        np.testing.assert_array_equal(estimator(returns, groups, 1), 0.0)


@st.composite
def groups_of_returns(draw):
    size = draw(st.integers(1, 12))
    returns = draw(st.lists(st.integers(-40, 40), min_size=size, max_size=size))
    groups = draw(st.lists(st.integers(-1, 3), min_size=size, max_size=size))
    valid = draw(st.lists(st.booleans(), min_size=size, max_size=size))
    pad = 12 - size
    return (
        np.array(returns + [0] * pad, np.float32) / 4,
        np.array(groups + [-1] * pad, np.int32),
        np.array(valid + [False] * pad, bool),
    )


@given(groups_of_returns(), st.sampled_from([0, 1]))
@settings(deadline=None)
def test_all_equal_a_loop_over_groups(example, ddof):
    returns, groups, valid = example
    expected = np.zeros((4, len(returns)))
    for group in range(4):
        rows = np.flatnonzero(valid & (groups == group))
        if len(rows) < 2:
            continue
        values = returns[rows].astype(np.float64)
        expected[0, rows] = (values - values.mean()) / (values.std(ddof=ddof) + 1e-6)
        expected[1, rows] = values - values.mean()
        expected[2, rows] = [value - np.delete(values, i).mean() for i, value in enumerate(values)]
        expected[3, rows] = (values - values.mean()) / (values.mean() + 1e-6) if values.mean() > 0 else 0.0
    np.testing.assert_allclose(grpo(returns, groups, 4, ddof=ddof, valid=valid), expected[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dr_grpo(returns, groups, 4, valid=valid), expected[1], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(rloo(returns, groups, 4, valid=valid), expected[2], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(maxrl(returns, groups, 4, valid=valid), expected[3], rtol=1e-5, atol=1e-5)


# Trajectories 0 (three turns) and 1 (one turn) of group 0; trajectory 2 (two turns) is masked; −1 is padding.
TURNS_OF = np.array([0, 1, 0, 2, 0, -1, 2], np.int32)


def test_scopes_golden():
    returns, groups = np.array([8, 4, 100], np.float32), np.array([0, 0, 0], np.int32)
    valid = np.array([True, True, False])
    # Trajectories: μ = (8 + 4)/2 = 6.   Turn rows: μ = (8 + 8 + 8 + 4)/4 = 7.
    by_trajectory = over_trajectories(dr_grpo, returns, groups, 1, TURNS_OF, valid=valid)
    np.testing.assert_array_equal(by_trajectory, [2, -2, 2, 0, 2, 0, 0])
    by_turn = over_turns(dr_grpo, returns, groups, 1, TURNS_OF, valid=valid)
    np.testing.assert_array_equal(by_turn, [1, -3, 1, 0, 1, 0, 0])
    # ddof over turn rows: Σ² = 3·1 + 9 = 12; ddof = 1 divides by 3: σ = 2.
    scaled = over_turns(functools.partial(grpo, ddof=1, eps=0.0), returns, groups, 1, TURNS_OF, valid=valid)
    np.testing.assert_allclose(scaled, [0.5, -1.5, 0.5, 0, 0.5, 0, 0], rtol=1e-6)


def test_scopes_agree_when_all_trajectories_are_equally_long():
    rng = np.random.default_rng(0)
    returns, groups = rng.normal(size=6).astype(np.float32), np.array([0, 1, 0, 1, 0, 1], np.int32)
    turns_of = rng.permutation(np.repeat(np.arange(6, dtype=np.int32), 4))
    by_trajectory = over_trajectories(grpo, returns, groups, 2, turns_of)
    np.testing.assert_allclose(over_turns(grpo, returns, groups, 2, turns_of), by_trajectory, rtol=1e-5)


def test_jit_and_vmap_equal_eager():
    rng = np.random.default_rng(3)
    returns, groups = rng.normal(size=(5, 9)).astype(np.float32), rng.integers(-1, 4, (5, 9)).astype(np.int32)
    for estimator in (grpo, dr_grpo, rloo, maxrl):
        eager = np.stack([estimator(r, g, 4) for r, g in zip(returns, groups, strict=True)])
        batched = jax.jit(jax.vmap(lambda r, g, estimator=estimator: estimator(r, g, 4)))(returns, groups)
        np.testing.assert_allclose(batched, eager, rtol=1e-5, atol=1e-6)


def test_gradients_stay_finite_in_groups_of_equal_returns():
    gradient = jax.grad(lambda r: grpo(r, jnp.zeros(4, jnp.int32), 1)[0])(jnp.full(4, 2.0))
    assert np.isfinite(gradient).all()


ONES, IDS = np.ones(3, np.float32), np.zeros(3, np.int32)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: grpo(ONES, IDS, 1, ddof=2), "expected ddof 0 or 1, got 2"),
        (lambda: grpo(ONES, IDS, 1, eps=-1.0), "expected eps >= 0, got -1.0"),
        (lambda: maxrl(ONES, IDS, 1, eps=-1.0), "expected eps >= 0, got -1.0"),
        (lambda: grpo(ONES, IDS[:2], 1), "expected equal shapes"),
        (lambda: grpo(ONES > 0, IDS, 1), "expected returns of a floating dtype, got bool"),
        (lambda: dr_grpo(ONES, ONES, 1), "expected group_ids of an integer dtype"),
        (lambda: rloo(ONES, IDS + 1, 1), r"expected group_ids in \[-1, 1\), got values from 1 to 1"),
        (lambda: rloo(ONES[None], IDS[None], 1), "expected returns with one axis"),
        (lambda: over_turns(grpo, ONES, IDS, 1, np.array([3])), r"expected response_trajectory in \[-1, 3\)"),
        (lambda: over_turns(grpo, ONES, IDS, 1, IDS, valid=np.ones(2, bool)), "expected equal shapes"),
        (lambda: over_trajectories(grpo, ONES, IDS, 1, np.array([3])), r"expected response_trajectory in \[-1, 3\)"),
    ],
)
def test_bad_input_says_what_was_expected(call, message):
    with pytest.raises(ValueError, match=message):
        call()
