"""GiGPO by hand, against a loop over states, and without shared states."""

import functools

import jax
import numpy as np
import pytest

from aem_jax.advantage import Experience, dr_grpo, gigpo, grpo, of_returns, over_trajectories, over_turns, rloo

# One group. Trajectory 0 returns to its first state (rewards 0, 4), 1 leaves it (0, 0), 2 stays (2).
# All begin at observation 0; response 3 is the only one to another observation. Trajectory 3 is masked, and the last
# row is padding.
TABLE = Experience(
    returns=np.array([4, 0, 2, 9], np.float32),
    group_ids=np.zeros(4, np.int32),
    valid=np.array([True, True, True, False]),
    response_trajectory=np.array([0, 0, 1, 1, 2, 3, 0], np.int32),
    response_turn=np.array([0, 1, 0, 1, 0, 0, 0], np.int32),
    response_rewards=np.array([0, 4, 0, 0, 2, 9, 0], np.float32),
    response_tokens=np.array([1, 1, 1, 1, 1, 1, 0], np.int32),
    response_anchor=np.array([0, 0, 0, 3, 0, 0, -1], np.int32),
    response_valid=np.array([True] * 6 + [False]),
)


def test_centred_golden():
    # A_E: μ = 2, so 2, −2, 0. G with γ = ½: 2, 4, 0, 0, 2; at observation 0 μ = (2 + 4 + 0 + 2)/4 = 2: 0, 2, −2, 0.
    advantages = gigpo(TABLE, 1, estimator=dr_grpo, gamma=0.5, weight=0.5)
    np.testing.assert_allclose(advantages, [2, 2 + 1, -2 - 1, -2, 0, 0, 0], rtol=1e-6)


def test_scaled_golden():
    # σ_E = √(8/3) and σ_S = √(8/4): 2/1.6329932 = 1.2247449 and 2/√2 = 1.4142136. ddof 1: σ_E = 2, σ_S = √(8/3).
    advantages = gigpo(TABLE, 1, estimator=functools.partial(grpo, eps=0.0), gamma=0.5)
    np.testing.assert_allclose(
        advantages, [1.2247449, 2.6389585, -2.6389585, -1.2247449, 0, 0, 0], rtol=1e-6, atol=1e-7
    )
    advantages = gigpo(TABLE, 1, estimator=functools.partial(grpo, ddof=1, eps=0.0), gamma=0.5)
    np.testing.assert_allclose(advantages, [1, 2.2247449, -2.2247449, -1, 0, 0, 0], rtol=1e-6, atol=1e-7)


def random_experience(seed: int) -> Experience:
    """Two groups of three trajectories of three turns; each group has up to four states."""
    rng = np.random.default_rng(seed)
    trajectory = np.repeat(np.arange(6), 3).astype(np.int32)
    rewards, state = rng.normal(size=18).astype(np.float32), rng.integers(0, 4, 18)
    keys = [(trajectory[r] // 3, state[r]) for r in range(18)]
    return Experience(
        returns=rewards.reshape(6, 3).sum(1),
        group_ids=np.repeat(np.arange(2), 3).astype(np.int32),
        valid=rng.random(6) < 0.8,
        response_trajectory=trajectory,
        response_turn=np.tile(np.arange(3), 6).astype(np.int32),
        response_rewards=rewards,
        response_tokens=np.ones(18, np.int32),
        response_anchor=np.array([keys.index(key) for key in keys], np.int32),
        response_valid=rng.random(18) < 0.9,
    )


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("scope", [over_trajectories, over_turns])
def test_against_a_loop_over_states(seed, scope):
    e = random_experience(seed)
    of, turn = e.response_trajectory, e.response_turn
    inside = e.response_valid & e.valid[of]
    to_go = np.array(
        [
            sum(
                0.95 ** (turn[q] - turn[r]) * np.float64(e.response_rewards[q])
                for q in range(18)
                if of[q] == of[r] and turn[q] >= turn[r]
            )
            for r in range(18)
        ]
    )
    expected = np.zeros(18)
    for anchor in set(e.response_anchor):
        rows = np.flatnonzero(inside & (e.response_anchor == anchor))
        if len(rows) > 1:
            expected[rows] = 2.0 * (to_go[rows] - to_go[rows].mean()) / (to_go[rows].std() + 1e-6)
    for group in (0, 1):
        rows = np.flatnonzero(inside & (e.group_ids[of] == group))
        members = np.flatnonzero(e.valid & (e.group_ids == group))
        sample = e.returns[of[rows]] if scope is over_turns else e.returns[members]
        if len(sample):
            expected[rows] += (e.returns[of[rows]] - sample.mean()) / (sample.std() + 1e-6)
    np.testing.assert_allclose(gigpo(e, 2, scope=scope, weight=2.0), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("estimator", [grpo, dr_grpo, rloo])
def test_without_shared_states_it_is_the_advantage_of_the_episode(estimator):
    e = random_experience(5)._replace(response_anchor=np.arange(18, dtype=np.int32))
    expected = of_returns(over_trajectories, estimator)(e, 2)
    assert np.abs(expected).max() > 0.1
    np.testing.assert_array_equal(gigpo(e, 2, estimator=estimator), expected)
    np.testing.assert_array_equal(gigpo(random_experience(5), 2, estimator=estimator, weight=0.0), expected)


def test_equal_paths_to_the_end_have_no_advantage():
    # Two episodes share a state three turns before a reward of 9.7, one after one turn and one after two.
    trajectory, turn = np.repeat([0, 1], [4, 5]).astype(np.int32), np.array([0, 1, 2, 3, 0, 1, 2, 3, 4], np.int32)
    rewards = np.array([0, 0, 0, 9.7, 0, 0, 0, 0, 9.7], np.float32)
    anchors = np.array([0, 1, 2, 3, 4, 5, 1, 2, 3], np.int32)
    ones = np.ones(9, bool)
    table = Experience(
        rewards[[3, 8]], np.zeros(2, np.int32), ones[:2], trajectory, turn, rewards, ones * 1, anchors, ones
    )
    np.testing.assert_array_equal(gigpo(table, 1), 0.0)


def test_jit_and_vmap_equal_eager():
    tables = [random_experience(seed) for seed in range(3)]
    batched = jax.jit(jax.vmap(lambda table: gigpo(table, 2)))(jax.tree.map(lambda *leaves: np.stack(leaves), *tables))
    for table, row in zip(tables, batched, strict=True):
        np.testing.assert_allclose(row, gigpo(table, 2), rtol=1e-4, atol=1e-5)


def test_bad_input_says_what_was_expected():
    with pytest.raises(ValueError, match=r"expected gamma in \[0, 1\], got -0.1"):
        gigpo(TABLE, 1, gamma=-0.1)
    with pytest.raises(ValueError, match=r"expected response_anchor in \[-1, 7\), got values from -1 to 7"):
        gigpo(TABLE._replace(response_anchor=TABLE.response_anchor + np.eye(7, dtype=np.int32)[3] * 4), 1)
