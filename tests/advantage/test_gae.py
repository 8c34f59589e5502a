"""GAE by hand, against a slow loop in float64, and in its special cases."""

import numpy as np
import pytest

from aem_jax.advantage import (
    Experience,
    by_response,
    explained_variance,
    gae,
    gae_advantages,
    reinforce_plus_plus,
    rewards_to_go,
    value_returns,
    whiten,
)

NAN = np.nan

# Trajectory 0 has rewards 1, 0, 4 and values 2, 4, 6; trajectory 1 reward 3 and value 1; trajectory 2 is masked;
# trajectory 3 has rewards 2, 1, 8, of which the second is an empty response's, without a value, and values 4, –, 6.
# The last row is padding: it shares trajectory 0 and turn 0 with a true row.
TABLE = Experience(
    returns=np.array([5, 3, 50, 11], np.float32),
    group_ids=np.array([0, 0, 1, 1], np.int32),
    valid=np.array([True, True, False, True]),
    response_trajectory=np.array([0, 1, 0, 0, 2, 3, 3, 3, 0], np.int32),
    response_turn=np.array([2, 0, 0, 1, 0, 0, 1, 2, 0], np.int32),
    response_rewards=np.array([4, 3, 1, 0, 50, 2, 1, 8, 0], np.float32),
    response_tokens=np.array([1, 3, 1, 1, 7, 1, 0, 1, 0], np.int32),
    response_anchor=np.array([0, 1, 2, 3, 4, 5, 6, 7, -1], np.int32),
    response_valid=np.array([True] * 6 + [False, True, False]),
    response_values=np.array([6, 1, 2, 4, 9, 4, NAN, 6, NAN], np.float32),
)


def test_advantages_golden():
    # γ = ½. Trajectory 0: δ_2 = 4 − 6 = −2, δ_1 = 0 + 6/2 − 4 = −1, δ_0 = 1 + 4/2 − 2 = 1. Trajectory 1: δ = 3 − 1.
    # Trajectory 3: δ_2 = 8 − 6 = 2; the empty turn is worth 1 + 6/2 = 4 and δ_1 = 0; δ_0 = 2 + 4/2 − 4 = 0.
    advantages = gae_advantages(TABLE, 2, gamma=0.5, gae_lambda=0.0)
    np.testing.assert_array_equal(advantages, [-2, 2, 1, -1, 0, 0, 0, 2, 0])
    # λ = ½, so γλ = ¼: Â_1 = −1 − 2/4 = −1.5, Â_0 = 1 − 1.5/4 = 0.625; trajectory 3: 0 + (0 + 2/4)/4 = 1/8
    advantages = gae_advantages(TABLE, 2, gamma=0.5, gae_lambda=0.5)
    np.testing.assert_array_equal(advantages, [-2, 2, 0.625, -1.5, 0, 0.125, 0, 2, 0])
    # R = Â + V
    returns = value_returns(TABLE, 2, gamma=0.5, gae_lambda=0.5)
    np.testing.assert_array_equal(returns, [4, 3, 2.625, 2.5, 0, 4.125, 0, 8, 0])


def test_whitened_golden():
    # γ = λ = 1: Â = −2, 2, 5 − 2, 4 − 4, –, 11 − 4, –, 8 − 6, that is −2, 2, 3, 0, 7, 2. Per response μ = 2 and
    # Σ² = 16 + 0 + 1 + 4 + 25 + 0 = 46. Per token the second counts three times: still μ = 16/8 = 2 and Σ² = 46.
    deviations = np.array([-4, 0, 1, -2, 0, 5, 0, 0, 0])
    advantages = gae(TABLE, 2, whiten_by=by_response, eps=0.0)
    np.testing.assert_allclose(advantages, deviations / np.sqrt(46 / 6), rtol=1e-6)
    np.testing.assert_allclose(gae(TABLE, 2, ddof=1, eps=1.0), deviations / (np.sqrt(46 / 7) + 1), rtol=1e-6)


def random_experience(seed: int) -> Experience:
    """Eight trajectories of up to five turns, one of them masked; a tenth of responses empty; rows in any order."""
    rng = np.random.default_rng(seed)
    turns = rng.integers(1, 6, 8)
    rows = [(n, k) for n in range(8) for k in range(turns[n])]
    rows = [rows[i] for i in rng.permutation(len(rows))]
    count = 45
    trajectory, turn = (
        np.concatenate([column, np.zeros(count - len(rows), np.int64)]).astype(np.int32)
        for column in zip(*rows, strict=True)
    )
    used = np.arange(count) < len(rows)
    has_tokens = used & (rng.random(count) > 0.1)
    rewards = np.where(used, rng.normal(size=count), 0.0).astype(np.float32)
    return Experience(
        returns=np.bincount(trajectory, rewards, 8).astype(np.float32),
        group_ids=np.arange(8, dtype=np.int32) % 2,
        valid=np.arange(8) != 3,
        response_trajectory=trajectory,
        response_turn=turn,
        response_rewards=rewards,
        response_tokens=np.where(has_tokens, rng.integers(1, 9, count), 0).astype(np.int32),
        response_anchor=np.where(used, np.arange(count), -1).astype(np.int32),
        response_valid=has_tokens,
        response_values=np.where(has_tokens, rng.normal(size=count), NAN).astype(np.float32),
    )


def slow(e: Experience, gamma: float, lam: float) -> np.ndarray:
    """The definition: for each response the discounted sum of all later δ. An empty response has δ = 0."""
    assert e.response_values is not None
    advantages = np.zeros(len(e.response_rewards))
    used = e.response_anchor >= 0
    for n in np.flatnonzero(e.valid):
        rows = sorted(np.flatnonzero((e.response_trajectory == n) & used), key=lambda r: e.response_turn[r])
        value = [0.0] * (len(rows) + 1)
        for k in reversed(range(len(rows))):
            own = float(e.response_values[rows[k]])
            value[k] = float(e.response_rewards[rows[k]]) + gamma * value[k + 1] if np.isnan(own) else own
        delta = [float(e.response_rewards[r]) + gamma * value[k + 1] - value[k] for k, r in enumerate(rows)]
        for k, r in enumerate(rows):
            if e.response_valid[r]:
                advantages[r] = sum((gamma * lam) ** (m - k) * delta[m] for m in range(k, len(rows)))
    return advantages


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.9, 0.8), (1.0, 0.95), (0.7, 0.0), (0.0, 1.0)])
def test_equals_a_slow_loop(gamma: float, lam: float):
    e = random_experience(int(10 * gamma + lam))
    wanted = slow(e, gamma, lam)
    assert np.abs(wanted).max() > 0.5
    np.testing.assert_allclose(gae_advantages(e, 2, gamma=gamma, gae_lambda=lam), wanted, rtol=1e-5, atol=1e-6)
    advantages = gae(e, 2, gamma=gamma, gae_lambda=lam, whiten_by=by_response, eps=0.0)
    part = e.response_valid & e.valid[e.response_trajectory]
    np.testing.assert_allclose(
        advantages, np.where(part, (wanted - wanted[part].mean()) / wanted[part].std(), 0), rtol=1e-4, atol=1e-5
    )


def test_without_discount_it_is_the_reward_to_go_minus_the_value():
    e = random_experience(5)
    table = e.response_rewards, e.response_trajectory, e.response_turn
    part = e.response_valid & e.valid[e.response_trajectory]
    to_go = np.where(part, rewards_to_go(*table, 8, gamma=1.0), 0.0)
    advantages = gae_advantages(e, 2)
    np.testing.assert_allclose(advantages, np.where(part, to_go - e.response_values, 0.0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(value_returns(e, 2), to_go, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("gamma", [1.0, 0.6])
def test_with_values_of_zero_it_is_reinforce(gamma: float):
    e = random_experience(6)
    e = e._replace(response_values=np.where(e.response_valid, 0.0, NAN).astype(np.float32))
    table = e.response_rewards, e.response_trajectory, e.response_turn
    part = e.response_valid & e.valid[e.response_trajectory]
    advantages = gae_advantages(e, 2, gamma=gamma)
    np.testing.assert_allclose(
        advantages, np.where(part, rewards_to_go(*table, 8, gamma=gamma), 0), rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(gae(e, 2, gamma=gamma), reinforce_plus_plus(e, 2, gamma=gamma), rtol=1e-4, atol=1e-6)


def test_exact_values_give_zero_advantages():
    e = random_experience(7)
    table = e.response_rewards, e.response_trajectory, e.response_turn
    to_go = np.where(e.response_valid, rewards_to_go(*table, 8, gamma=0.9), NAN)
    advantages = gae_advantages(e._replace(response_values=to_go), 2, gamma=0.9, gae_lambda=0.4)
    np.testing.assert_allclose(advantages, 0.0, atol=1e-6)


def test_explained_variance_golden():
    # R = 0, 2, 4 (variance 8/3; the last row does not count)
    returns, valid = np.array([0.0, 2.0, 4.0, 99.0]), np.array([True, True, True, False])
    score = lambda *values: float(explained_variance(np.array([*values, NAN]), returns, valid))
    assert score(0.0, 2.0, 4.0) == 1.0 and score(5.0, 7.0, 9.0) == 1.0  # a constant error adds no variance
    assert score(3.0, 3.0, 3.0) == 0.0
    assert score(4.0, 2.0, 0.0) == pytest.approx(-3.0)  # R − V = −4, 0, 4: 32/3
    assert np.isnan(float(explained_variance(np.ones(2), np.ones(2), np.ones(2, bool))))


@pytest.mark.parametrize("reward", [0.0, 0.3])
def test_equal_returns_have_no_variance_to_explain_whatever_the_values(reward: float):
    e = random_experience(9)
    values = e.response_values
    assert values is not None
    turns = np.bincount(e.response_trajectory, e.response_anchor >= 0, 8)
    last = (e.response_anchor >= 0) & (e.response_turn == turns[e.response_trajectory] - 1)
    e = e._replace(response_rewards=np.where(last, reward, 0.0).astype(np.float32))
    part = e.response_valid & e.valid[e.response_trajectory]
    returns = value_returns(e, 2)
    np.testing.assert_array_equal(returns, np.where(part, np.float32(reward), 0))
    assert np.isnan(float(explained_variance(values, returns, part)))


def test_missing_or_invalid_arguments_are_named():
    with pytest.raises(ValueError, match="expected response_values, got none"):
        gae(TABLE._replace(response_values=None), 2)
    with pytest.raises(ValueError, match=r"expected gae_lambda in \[0, 1\], got 1.5"):
        gae_advantages(TABLE, 2, gae_lambda=1.5)
    with pytest.raises(ValueError, match=r"expected gamma in \[0, 1\], got -0.5"):
        value_returns(TABLE, 2, gamma=-0.5)
    with pytest.raises(ValueError, match="expected equal shapes"):
        gae(TABLE._replace(response_values=np.zeros(3, np.float32)), 2)


def test_whitening_runs_over_the_responses_that_take_part():
    e = random_experience(8)
    assert e.response_values is not None
    part = e.response_valid & e.valid[e.response_trajectory]
    tokens = np.where(part, e.response_tokens, 0).astype(np.float32)
    raw = np.asarray(gae_advantages(e, 2, gae_lambda=0.9))
    np.testing.assert_array_equal(gae(e, 2, gae_lambda=0.9), whiten(raw, tokens))
    # an episode without packed tokens has no values and does not change the statistics
    without_values = e._replace(
        response_values=np.where(e.response_trajectory == 0, NAN, e.response_values).astype(np.float32)
    )
    others = np.where(e.response_trajectory == 0, 0, tokens)
    np.testing.assert_allclose(
        gae(without_values, 2, gae_lambda=0.9), whiten(np.where(others > 0, raw, 0), others), rtol=1e-5
    )
