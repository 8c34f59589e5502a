"""REINFORCE++ by hand, against slow loops in float64, and in its special cases."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aem_jax.advantage import (
    Experience,
    by_response,
    by_token,
    by_trajectory,
    dr_grpo,
    over_trajectories,
    over_turns,
    reinforce_plus_plus,
    reinforce_plus_plus_baseline,
    rewards_to_go,
    whiten,
)

# Group 0: trajectory 0 (rewards 1, 0, 4) and 1 (reward 3). Group 1: trajectory 2 (rewards 0, 2), and 3, masked.
# The last row is padding. With γ = ½: G = 4, 0 + 2, 1 + 1 in trajectory 0; 3; 2, 0 + 1.
TABLE = Experience(
    returns=np.array([5, 3, 2, 50], np.float32),
    group_ids=np.array([0, 0, 1, 1], np.int32),
    valid=np.array([True, True, True, False]),
    response_trajectory=np.array([0, 1, 0, 2, 0, 2, 3, 0], np.int32),
    response_turn=np.array([2, 0, 0, 1, 1, 0, 0, 0], np.int32),
    response_rewards=np.array([4, 3, 1, 2, 0, 0, 50, 0], np.float32),
    response_tokens=np.array([1, 3, 1, 1, 1, 1, 7, 0], np.int32),
    response_anchor=np.array([0, 1, 2, 3, 4, 5, 6, -1], np.int32),
    response_valid=np.array([True] * 7 + [False]),
)
TO_GO = [4, 3, 2, 2, 2, 1]


def test_rewards_to_go_golden():
    table = TABLE.response_rewards, TABLE.response_trajectory, TABLE.response_turn
    np.testing.assert_array_equal(rewards_to_go(*table, 4, gamma=0.5)[:6], TO_GO)
    np.testing.assert_array_equal(rewards_to_go(*table, 4, gamma=0.0), TABLE.response_rewards + np.eye(8)[7])
    undiscounted = rewards_to_go(*table, 4, gamma=1.0)
    first = TABLE.response_turn[:7] == 0
    np.testing.assert_array_equal(undiscounted[:7][first], TABLE.returns[TABLE.response_trajectory[:7][first]])


def test_whitened_by_response_golden():
    # μ = 14/6; deviations 5, 2, −1, −1, −1, −4 thirds; Σ² = 48/9; σ² = 8/9 or, with ddof 1, 16/15.
    expected = np.array([5, 2, -1, -1, -1, -4, 0, 0]) / 3
    advantages = reinforce_plus_plus(TABLE, 2, gamma=0.5, whiten_by=by_response, eps=0.0)
    np.testing.assert_allclose(advantages, expected / np.sqrt(8 / 9), rtol=1e-6)
    advantages = reinforce_plus_plus(TABLE, 2, gamma=0.5, whiten_by=by_response, ddof=1, eps=0.0)
    np.testing.assert_allclose(advantages, expected / np.sqrt(16 / 15), rtol=1e-6)


@pytest.mark.parametrize("scale", [1.0, 0.25, 1e-3])
def test_whitening_depends_on_the_ratios_of_weights_alone(scale):
    whitened = whiten(np.array([0, 1], np.float32), np.full(2, scale, np.float32), eps=0.0)
    np.testing.assert_allclose(whitened, [-1, 1], rtol=1e-5)


def test_whitened_by_token_golden():
    # Eight tokens, three of them of the value 3: μ = 20/8 = 2.5; Σ w d² = 2.25 + 3/4 + 3/4 + 2.25 = 6; σ² = 6/8.
    expected = np.array([1.5, 0.5, -0.5, -0.5, -0.5, -1.5, 0, 0])
    advantages = reinforce_plus_plus(TABLE, 2, gamma=0.5, whiten_by=by_token, eps=0.0)
    np.testing.assert_allclose(advantages, expected / np.sqrt(6 / 8), rtol=1e-6)
    advantages = reinforce_plus_plus(TABLE, 2, gamma=0.5, whiten_by=by_token, ddof=1, eps=1.0)
    np.testing.assert_allclose(advantages, expected / (np.sqrt(6 / 7) + 1), rtol=1e-6)


def test_baseline_golden():
    # By trajectory: group 0 has means 8/3 and 3, so μ = 17/6; group 1 has 3/2. B = 7, 1, −5, 3, −5, −3 sixths,
    # whose mean is −1/18: 22, 4, −14, 10, −14, −8 over 18; Σ² = 1056/18², σ = √176 / 18.
    advantages = reinforce_plus_plus_baseline(TABLE, 2, gamma=0.5, whiten_by=by_response, eps=0.0)
    np.testing.assert_allclose(advantages, np.array([22, 4, -14, 10, -14, -8, 0, 0]) / np.sqrt(176), rtol=1e-5)
    # By response: group 0 has μ = 11/4. B = 5, 1, −3, 2, −3, −2 fourths, of mean 0; Σ² = 52/16, σ² = 52/96.
    advantages = reinforce_plus_plus_baseline(
        TABLE, 2, gamma=0.5, centre_by=by_response, whiten_by=by_response, eps=0.0
    )
    np.testing.assert_allclose(advantages, np.array([5, 1, -3, 2, -3, -2, 0, 0]) / 4 / np.sqrt(52 / 96), rtol=1e-5)


def random_experience(seed: int, terminal: bool = False) -> Experience:
    """Six trajectories of up to four turns in two groups, one of them masked; rows in any order, the rest padding."""
    rng = np.random.default_rng(seed)
    turns = rng.integers(1, 5, 6)
    rows = [(n, k) for n in range(6) for k in range(turns[n])]
    rows = [rows[i] for i in rng.permutation(len(rows))]
    trajectory, turn = (np.resize([*column, *[0] * 26], 26).astype(np.int32) for column in zip(*rows, strict=True))
    count, used = 26, np.arange(26) < len(rows)
    rewards = np.where(used, rng.normal(size=count), 0.0).astype(np.float32)
    if terminal:
        rewards = np.where(turn == turns[trajectory] - 1, rewards, 0.0).astype(np.float32)
    returns = np.bincount(trajectory, rewards, 6).astype(np.float32)
    return Experience(
        returns=returns,
        group_ids=np.array([0, 1, 0, 1, 0, 1], np.int32),
        valid=np.array([True, True, True, True, True, False]),
        response_trajectory=trajectory,
        response_turn=turn,
        response_rewards=rewards,
        response_tokens=np.where(used, rng.integers(1, 9, count), 0).astype(np.int32),
        response_anchor=np.arange(count, dtype=np.int32),
        response_valid=used,
    )


def slow(e: Experience, gamma: float, baseline: bool, tokens: bool, ddof: int) -> np.ndarray:
    """The definitions, by loops over lists of repeated values."""
    rows = [r for r in range(len(e.response_rewards)) if e.response_valid[r] and e.valid[e.response_trajectory[r]]]
    of, turn, group = e.response_trajectory, e.response_turn, e.group_ids
    value = {
        r: sum(
            gamma ** int(turn[q] - turn[r]) * float(e.response_rewards[q])
            for q in rows
            if of[q] == of[r] and turn[q] >= turn[r]
        )
        for r in rows
    }
    if baseline:
        mean = {
            g: np.mean(
                [np.mean([value[r] for r in rows if of[r] == n]) for n in range(6) if group[n] == g and e.valid[n]]
            )
            for g in (0, 1)
        }
        value = {r: value[r] - mean[group[of[r]]] for r in rows}
    repeated = np.repeat([float(value[r]) for r in rows], e.response_tokens[rows] if tokens else 1)
    advantages = np.zeros(len(e.response_rewards))
    for r in rows:
        advantages[r] = (value[r] - repeated.mean()) / (repeated.std(ddof=ddof) + 1e-6)
    return advantages


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("baseline", [False, True])
def test_against_loops_in_float64(seed, baseline):
    table, estimator = random_experience(seed), reinforce_plus_plus_baseline if baseline else reinforce_plus_plus
    for tokens, ddof in ((False, 0), (True, 1)):
        advantages = estimator(table, 2, gamma=0.9, whiten_by=by_token if tokens else by_response, ddof=ddof)
        np.testing.assert_allclose(advantages, slow(table, 0.9, baseline, tokens, ddof), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("scope", "centre_by"), [(over_trajectories, by_trajectory), (over_turns, by_response)])
def test_baseline_of_outcomes_is_dr_grpo_whitened(scope, centre_by):
    e = random_experience(7, terminal=True)
    trajectory = np.where(e.response_valid, e.response_trajectory, -1)
    centred = scope(dr_grpo, e.returns, e.group_ids, 2, trajectory, valid=e.valid)
    part = e.response_valid & e.valid[e.response_trajectory]
    expected = whiten(centred, np.where(part, e.response_tokens, 0))
    advantages = reinforce_plus_plus_baseline(e, 2, centre_by=centre_by)
    np.testing.assert_allclose(advantages, expected, rtol=1e-4, atol=1e-5)


def test_responses_that_take_no_part_change_nothing():
    plain = reinforce_plus_plus(TABLE, 2, gamma=0.5)
    noisy = TABLE._replace(
        response_rewards=np.where(np.arange(8) == 6, -1e6, TABLE.response_rewards).astype(np.float32),
        response_tokens=np.where(np.arange(8) >= 6, 99, TABLE.response_tokens).astype(np.int32),
    )
    for estimator in (reinforce_plus_plus, reinforce_plus_plus_baseline):
        np.testing.assert_array_equal(
            estimator(noisy, 2, gamma=0.5), estimator(TABLE, 2, gamma=0.5), err_msg=estimator.__name__
        )
    assert plain[6] == plain[7] == 0


def test_the_reward_of_an_empty_response_counts_for_earlier_responses():
    # Turn 2 of trajectory 0 has no token: it has no advantage, but its reward counts for turns 0 and 1.
    silent = TABLE._replace(response_valid=np.array([False] + [True] * 6 + [False]))
    advantages = reinforce_plus_plus(silent, 2, gamma=0.5, whiten_by=by_response, eps=0.0)
    # G = 3, 2, 2, 2, 1: μ = 2, σ² = 2/5
    np.testing.assert_allclose(advantages, np.array([0, 1, 0, 0, 0, -1, 0, 0]) / np.sqrt(0.4), rtol=1e-5, atol=1e-7)


def test_equal_values_give_exactly_zero():
    np.testing.assert_array_equal(whiten(np.full(5, 9.7, np.float32), np.array([1, 2, 0, 1, 7], np.float32)), 0.0)


def test_equal_endings_have_equal_returns_to_the_last_bit():
    # 30 trajectories of lengths 1 to 30, each with a reward of 9.7 at its end: G depends on the distance to it alone.
    trajectory, turn = np.nonzero(np.tri(30))
    rewards = np.where(turn == trajectory, 9.7, 0.0).astype(np.float32)
    to_go = np.asarray(rewards_to_go(rewards, trajectory.astype(np.int32), turn.astype(np.int32), 30, gamma=0.95))
    for distance in range(30):
        assert len(set(to_go[trajectory - turn == distance])) == 1
    np.testing.assert_allclose(to_go, 9.7 * 0.95 ** (trajectory - turn), rtol=1e-5)


def test_jit_and_vmap_equal_eager():
    tables = [random_experience(seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *tables)
    for estimator in (reinforce_plus_plus, reinforce_plus_plus_baseline):
        batched = jax.jit(jax.vmap(lambda table, estimator=estimator: estimator(table, 2, gamma=0.9)))(stacked)
        for table, row in zip(tables, batched, strict=True):
            np.testing.assert_allclose(row, estimator(table, 2, gamma=0.9), rtol=1e-4, atol=1e-5)


IDS, ONES = np.zeros(2, np.int32), np.ones(2, np.float32)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rewards_to_go(ONES, IDS, IDS, 1, gamma=1.1), r"expected gamma in \[0, 1\], got 1.1"),
        (lambda: rewards_to_go(ONES, IDS + 1, IDS, 1, gamma=1.0), r"expected trajectory in \[-1, 1\)"),
        (lambda: rewards_to_go(ONES, IDS, IDS[:1], 1, gamma=1.0), "expected equal shapes"),
        (lambda: whiten(ONES, ONES, ddof=2), "expected ddof 0 or 1, got 2"),
        (lambda: whiten(ONES, ONES, eps=-1.0), "expected eps >= 0, got -1.0"),
        (lambda: whiten(ONES, ONES[:1]), "expected equal shapes"),
        (lambda: reinforce_plus_plus(TABLE._replace(response_turn=IDS), 2), r"expected equal shapes, .*response_turn"),
        (lambda: reinforce_plus_plus(TABLE, 1), r"expected group_ids in \[-1, 1\), got values from 0 to 1"),
        (lambda: reinforce_plus_plus(TABLE._replace(valid=IDS), 2), "expected valid of dtype bool"),
    ],
)
def test_bad_input_says_what_was_expected(call, message):
    with pytest.raises(ValueError, match=message):
        call()
