"""HGPO and GAGPO: turns compared by observation, by hand, against loops over states, and in their special cases."""

import functools
from typing import Any

import jax
import numpy as np
import pytest

from aem_jax.advantage import (
    Experience,
    dr_grpo,
    gagpo,
    gigpo,
    grpo,
    hgpo,
    rewards_to_go,
)

# One group. Observations are a b, a b, c b, with rewards 4, 0, 8 at the end; with γ = ½, G = 2 4, 0 0, 4 8.
# The rows are in another order; row 6 is padding, and shares trajectory 0 and turn 0 with a true row.
A, B, C = 3, 0, 1
TABLE = Experience(
    returns=np.array([4, 0, 8], np.float32),
    group_ids=np.zeros(3, np.int32),
    valid=np.ones(3, bool),
    response_trajectory=np.array([0, 2, 1, 0, 1, 2, 0], np.int32),
    response_turn=np.array([1, 0, 1, 0, 0, 1, 0], np.int32),
    response_rewards=np.array([4, 0, 0, 0, 0, 8, 0], np.float32),
    response_tokens=np.array([1, 1, 1, 1, 1, 1, 0], np.int32),
    response_anchor=np.array([B, C, B, A, A, B, -1], np.int32),
    response_valid=np.array([True] * 6 + [False]),
)


def test_hgpo_golden():
    # Depth 1, centred: at a 2, 0 → 1, −1; at b 4, 0, 8 → 0, −4, 4; c is alone.
    # Depth 2: at a b 4, 0 → 2, −2; c b is alone. No turn has two turns before it.
    # Turn 1 of trajectory 0 has a_1 = 0, so only depth 2 counts: 2. That of trajectory 1: (1 · −4 + 2 · −2)/3.
    centred = functools.partial(hgpo, estimator=dr_grpo, gamma=0.5)
    np.testing.assert_allclose(centred(TABLE, 1), [2, 0, -8 / 3, 1, -1, 4, 0], rtol=1e-6)
    np.testing.assert_allclose(centred(TABLE, 1, exponent=0.0), [2, 0, -3, 1, -1, 4, 0], rtol=1e-6)
    np.testing.assert_allclose(centred(TABLE, 1, exponent=2.0), [2, 0, -12 / 5, 1, -1, 4, 0], rtol=1e-6)
    np.testing.assert_allclose(centred(TABLE, 1, history=0), [0, 0, -4, 1, -1, 4, 0], rtol=1e-6)
    # Scaled: σ = 1 at a, √(32/3) at b, 2 at a b.
    scaled = hgpo(TABLE, 1, estimator=functools.partial(grpo, eps=0.0), gamma=0.5)
    b = 4 / np.sqrt(32 / 3)
    np.testing.assert_allclose(scaled, [1, 0, (-b - 2) / 3, 1, -1, b, 0], rtol=1e-6)


def test_gagpo_golden():
    # V(a) = 1, V(b) = 4, V(c) = 4. δ: ½ · 4 − 1 = 1, 4 − 4 = 0; 1, −4; ½ · 4 − 4 = −2, 4. They sum to 0.
    # γλ = ½ adds half of the next Â: 1, 0; 1 − 2, −4; −2 + 2, 4. γλ = ¼: 1, 0; 0, −4; −1, 4.
    centred = functools.partial(gagpo, estimator=dr_grpo, gamma=0.5)
    np.testing.assert_allclose(centred(TABLE, 1, gae_lambda=0.0), [0, -2, -4, 1, 1, 4, 0], rtol=1e-6)
    np.testing.assert_allclose(centred(TABLE, 1, gae_lambda=1.0), [0, 0, -4, 1, -1, 4, 0], rtol=1e-6)
    np.testing.assert_allclose(centred(TABLE, 1, gae_lambda=0.5), [0, -1, -4, 1, 0, 4, 0], rtol=1e-6)
    # Scaled by the deviation of the group's six responses, √((1 + 1 + 16 + 16)/6) with λ = 1.
    scaled = gagpo(TABLE, 1, estimator=functools.partial(grpo, eps=0.0), gamma=0.5, gae_lambda=1.0)
    np.testing.assert_allclose(scaled, np.array([0, 0, -4, 1, -1, 4, 0]) / np.sqrt(34 / 6), rtol=1e-6)


def random_experience(seed: int) -> Experience:
    """Two groups of four trajectories of up to six turns and three states, one masked; a tenth empty; in any order."""
    rng = np.random.default_rng(seed)
    rows = [(n, k, int(rng.integers(3))) for n in range(8) for k in range(rng.integers(1, 7))]
    rows = [rows[i] for i in rng.permutation(len(rows))]
    count = 52
    column = lambda values: np.array([*values, *[0] * (count - len(rows))], np.int32)
    trajectory, turn, state = (column(values) for values in zip(*rows, strict=True))
    used = np.arange(count) < len(rows)
    rewards = np.where(used, rng.normal(size=count), 0.0).astype(np.float32)
    keys = [(trajectory[r] % 2, state[r]) for r in range(len(rows))]
    return Experience(
        returns=np.bincount(trajectory, rewards, 8).astype(np.float32),
        group_ids=np.arange(8, dtype=np.int32) % 2,
        valid=np.arange(8) != 3,
        response_trajectory=trajectory,
        response_turn=turn,
        response_rewards=rewards,
        response_tokens=used.astype(np.int32),
        response_anchor=np.array([keys.index(key) for key in keys] + [-1] * (count - len(rows)), np.int32),
        response_valid=used & (rng.random(count) > 0.1),
    )


def members(e: Experience) -> list[int]:
    return [r for r in range(len(e.response_turn)) if e.response_valid[r] and e.valid[e.response_trajectory[r]]]


def to_go(e: Experience, gamma: float) -> dict[int, float]:
    of, turn = e.response_trajectory, e.response_turn
    used = np.flatnonzero(e.response_anchor >= 0).tolist()
    return {
        r: sum(
            gamma ** int(turn[q] - turn[r]) * float(e.response_rewards[q])
            for q in used
            if of[q] == of[r] and turn[q] >= turn[r]
        )
        for r in used
    }


def slow_hgpo(e: Experience, gamma: float, history: int, exponent: float) -> np.ndarray:
    """Groups keyed by the observations themselves, turn by turn."""
    returns, advantages = to_go(e, gamma), np.zeros(len(e.response_turn))
    seen = {(e.response_trajectory[r], e.response_turn[r]): e.response_anchor[r] for r in returns}
    groups: dict[Any, list[int]] = {}
    for r in members(e):
        n, turn = e.response_trajectory[r], e.response_turn[r]
        for k in range(1, min(history, turn) + 2):
            context = tuple(seen[n, turn - j] for j in range(k))
            groups.setdefault((e.group_ids[n], context), []).append(r)
    parts: dict[int, list[tuple[float, float]]] = {}
    for (_, context), rows in groups.items():
        values = np.array([returns[r] for r in rows])
        for r, a in zip(rows, (values - values.mean()) / (values.std() + 1e-6), strict=True):
            if abs(returns[r] - values.mean()) > 1e-5 * (values.max() - values.min()):
                parts.setdefault(r, []).append((len(context) ** exponent, a))
    for r, items in parts.items():
        advantages[r] = sum(w * a for w, a in items) / sum(w for w, _ in items)
    return advantages


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("history", "exponent"), [(0, 1.0), (1, 0.5), (2, 1.0), (4, 2.0)])
def test_hgpo_against_groups_of_observations(seed, history, exponent):
    e = random_experience(seed)
    expected = slow_hgpo(e, 0.9, history, exponent)
    computed = hgpo(e, 2, gamma=0.9, history=history, exponent=exponent)
    np.testing.assert_allclose(computed, expected, rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("middle", [9.5, 9.6])
def test_rounding_does_not_decide_which_depths_count(middle):
    """Of three returns in equal steps the middle one is their mean, exactly or up to rounding."""
    returns = np.array([middle - 0.1, middle, middle + 0.1, 0, 0], np.float32)
    # All five make the same first observation; the first three also make the same second one.
    table = Experience(
        returns=returns,
        group_ids=np.zeros(5, np.int32),
        valid=np.ones(5, bool),
        response_trajectory=np.repeat(np.arange(5, dtype=np.int32), 2),
        response_turn=np.tile(np.array([0, 1], np.int32), 5),
        response_rewards=np.stack([np.zeros(5, np.float32), returns], axis=1).reshape(-1),
        response_tokens=np.ones(10, np.int32),
        response_anchor=np.array([0, 1, 0, 1, 0, 1, 2, 1, 3, 1], np.int32),
        response_valid=np.ones(10, bool),
    )
    second = np.asarray(hgpo(table, 1, gamma=1.0, history=1))[3]  # at depth 2 it is the mean, so depth 1 alone counts
    values = returns.astype(np.float64)
    assert second == pytest.approx((values[1] - values.mean()) / values.std(), rel=1e-4)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("gamma", "lam"), [(0.9, 0.7), (0.95, 0.0), (1.0, 1.0)])
def test_gagpo_against_a_loop_over_states(seed, gamma, lam):
    e = random_experience(seed)
    rows, returns = members(e), to_go(e, gamma)
    visits: dict[Any, list[float]] = {}
    for r in rows:
        visits.setdefault(e.response_anchor[r], []).append(returns[r])
    raw = np.zeros(len(e.response_turn))
    for n in range(8):
        advantage, value_after = 0.0, 0.0
        own = [r for r in returns if e.response_trajectory[r] == n]
        for r in sorted(own, key=lambda r: -e.response_turn[r]):
            ahead = float(e.response_rewards[r]) + gamma * value_after
            value = float(np.mean(visits[e.response_anchor[r]])) if r in rows else ahead
            advantage = ahead - value + gamma * lam * advantage
            raw[r], value_after = advantage, value
    expected = np.zeros(len(raw))
    for group in (0, 1):
        own = [r for r in rows if e.group_ids[e.response_trajectory[r]] == group]
        expected[own] = (raw[own] - raw[own].mean()) / (raw[own].std() + 1e-6)
    computed = gagpo(e, 2, gamma=gamma, gae_lambda=lam)
    np.testing.assert_allclose(computed, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("estimator", [grpo, dr_grpo, functools.partial(grpo, ddof=1)])
def test_hgpo_without_history_is_the_step_part_of_gigpo(estimator):
    e = random_experience(4)
    steps_alone = gigpo(e._replace(returns=np.zeros(8, np.float32)), 2, estimator=estimator)
    assert np.abs(steps_alone).max() > 0.5
    np.testing.assert_array_equal(hgpo(e, 2, estimator=estimator, history=0), steps_alone)


def test_gagpo_in_closed_form():
    e = random_experience(5)
    e = e._replace(response_valid=e.response_anchor >= 0)  # an empty response has no value of its own
    groups = np.where(e.response_valid, e.group_ids[e.response_trajectory], -1)
    groups = np.where(e.valid[e.response_trajectory], groups, -1)
    # λ = 1: G − V(s), the centred step part of GiGPO.
    steps = gigpo(e._replace(returns=np.zeros(8, np.float32)), 2, estimator=dr_grpo, gamma=0.9)
    computed = gagpo(e, 2, gamma=0.9, gae_lambda=1.0)
    np.testing.assert_allclose(computed, grpo(steps, groups, 2), rtol=1e-4, atol=1e-5)
    # λ = 0: r + γ V' − V, with V = G − (G − V).
    table = e.response_rewards, e.response_trajectory, e.response_turn
    value = np.where(groups >= 0, rewards_to_go(*table, 8, gamma=0.9) - steps, 0.0)
    at = {(n, k): v for n, k, v, g in zip(e.response_trajectory, e.response_turn, value, groups) if g >= 0}
    after = np.array([at.get((n, k + 1), 0.0) for n, k in zip(e.response_trajectory, e.response_turn)])
    delta = (e.response_rewards + 0.9 * after - value).astype(np.float32)
    computed = gagpo(e, 2, gamma=0.9, gae_lambda=0.0)
    np.testing.assert_allclose(computed, grpo(delta, groups, 2), rtol=1e-3, atol=1e-4)


def test_states_that_are_visited_once_have_no_advantage():
    e = random_experience(6)
    e = e._replace(response_anchor=np.where(e.response_anchor >= 0, np.arange(52), -1).astype(np.int32))
    np.testing.assert_array_equal(hgpo(e, 2), 0.0)
    np.testing.assert_array_equal(gagpo(e, 2), 0.0)


def test_equal_paths_to_the_end_have_no_advantage():
    # Two episodes share a state three turns before a reward of 9.7, one after one turn and one after two.
    trajectory, turn = np.repeat([0, 1], [4, 5]).astype(np.int32), np.array([0, 1, 2, 3, 0, 1, 2, 3, 4], np.int32)
    rewards = np.array([0, 0, 0, 9.7, 0, 0, 0, 0, 9.7], np.float32)
    anchors = np.array([0, 1, 2, 3, 4, 5, 1, 2, 3], np.int32)
    ones = np.ones(9, bool)
    table = Experience(
        rewards[[3, 8]], np.zeros(2, np.int32), ones[:2], trajectory, turn, rewards, ones * 1, anchors, ones
    )
    for estimator in (hgpo, gagpo):
        np.testing.assert_array_equal(estimator(table, 1), 0.0)


def test_an_empty_or_masked_response_is_part_of_the_history():
    # Without tokens in turn 0 of trajectory 1, trajectory 0 is alone at a, but a b is still shared.
    e = TABLE._replace(response_valid=np.array([True] * 4 + [False, True, False]))
    computed = hgpo(e, 1, estimator=dr_grpo, gamma=0.5)
    np.testing.assert_allclose(computed, [2, 0, -8 / 3, 0, 0, 4, 0], rtol=1e-6)


@pytest.mark.parametrize("estimator", [hgpo, gagpo])
def test_the_order_of_rows_changes_nothing_and_jit_and_vmap_equal_eager(estimator):
    tables = [random_experience(seed) for seed in range(3)]
    order = np.random.default_rng(0).permutation(52)
    batched = jax.jit(jax.vmap(lambda e: estimator(e, 2)))(jax.tree.map(lambda *leaves: np.stack(leaves), *tables))
    for e, row in zip(tables, batched, strict=True):
        eager = np.asarray(estimator(e, 2))
        np.testing.assert_allclose(row, eager, rtol=1e-4, atol=1e-5)
        columns = {
            name: column[order]
            for name, column in e._asdict().items()
            if name.startswith("response_") and column is not None
        }
        np.testing.assert_allclose(estimator(e._replace(**columns), 2), eager[order], rtol=1e-4, atol=1e-5)
        assert np.abs(eager).max() > 0.5 and np.all(eager[~e.response_valid] == 0)


def test_bad_input_says_what_was_expected():
    with pytest.raises(ValueError, match="expected history >= 0, got -1"):
        hgpo(TABLE, 1, history=-1)
    for estimator in (hgpo, gagpo):
        with pytest.raises(ValueError, match=r"expected gamma in \[0, 1\], got 1.5"):
            estimator(TABLE, 1, gamma=1.5)
        with pytest.raises(ValueError, match=r"expected response_anchor in \[-1, 7\)"):
            estimator(TABLE._replace(response_anchor=TABLE.response_anchor + 7), 1)
    with pytest.raises(ValueError, match=r"expected gae_lambda in \[0, 1\], got -1.0"):
        gagpo(TABLE, 1, gae_lambda=-1.0)
