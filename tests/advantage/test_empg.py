"""EMPG by hand, against a slow loop, and without its bonus, which leaves AEM over the batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aem_jax.advantage import (
    Experience,
    aem_coefficients,
    dr_grpo,
    empg,
    grpo,
    of_returns,
    over_trajectories,
    over_turns,
)

NAN = np.nan
E, G = np.exp(-1.0), np.exp(-0.5)

ENTROPIES = np.array([3, 2, 9, 1, NAN, NAN], np.float32)

# One group. Trajectory 0 has turns 0 (H̄ = 1) and 1 (H̄ = 3), trajectory 1 a turn (H̄ = 2) and an empty one, trajectory 2
# is masked. The rows are not in order, and the last is padding: it shares trajectory 0 and turn 0 with a true row.
TABLE = Experience(
    returns=np.array([2, 0, 50], np.float32),
    group_ids=np.zeros(3, np.int32),
    valid=np.array([True, True, False]),
    response_trajectory=np.array([0, 1, 2, 0, 1, 0], np.int32),
    response_turn=np.array([1, 0, 0, 0, 1, 0], np.int32),
    response_rewards=np.array([2, 0, 50, 0, 0, 0], np.float32),
    response_tokens=np.array([1, 1, 1, 1, 0, 0], np.int32),
    response_anchor=np.array([0, 1, 2, 3, 4, -1], np.int32),
    response_valid=np.array([True, True, True, True, False, False]),
    response_entropies=ENTROPIES,
)


def test_golden():
    # A_E = 1, −1. H̃ = 1, ½ and 0 in the order of rows, so exp(−H̃) = E, G, 1 with mean m. The only turn with a next one
    # is row 3; its next turn has H̃ = 1, so f = E. With ζ = ½: B = E/m, −G/m, 1/m + E/2.
    m = (E + G + 1) / 3
    b = np.array([E / m, -G / m, 1 / m + E / 2])
    expected = np.zeros(6)
    expected[[0, 1, 3]] = b - b.mean()
    np.testing.assert_allclose(empg(TABLE, 1, estimator=dr_grpo, bonus_weight=0.5), expected, rtol=1e-5)
    # k = 2 and k′ = 0: the bonus of every turn with a next one is ζ.
    m = (E**2 + E + 1) / 3
    b = np.array([E**2 / m, -E / m, 1 / m + 0.5])
    expected[[0, 1, 3]] = b - b.mean()
    computed = empg(TABLE, 1, estimator=dr_grpo, strength=2.0, bonus_strength=0.0, bonus_weight=0.5)
    np.testing.assert_allclose(computed, expected, rtol=1e-5)


def random_experience(seed: int) -> Experience:
    """Eight trajectories of up to five turns in two groups, one masked; a tenth of responses empty; in any order."""
    rng = np.random.default_rng(seed)
    rows = [(n, k) for n in range(8) for k in range(rng.integers(1, 6))]
    rows = [rows[i] for i in rng.permutation(len(rows))]
    count = 45
    used = np.arange(count) < len(rows)
    trajectory, turn = (
        np.resize([*column, *[0] * count], count).astype(np.int32) for column in zip(*rows, strict=True)
    )
    trajectory, turn = np.where(used, trajectory, 0), np.where(used, turn, 0)
    valid = used & (rng.random(count) > 0.1)
    rewards = np.where(used, rng.normal(size=count), 0.0).astype(np.float32)
    return Experience(
        returns=np.bincount(trajectory, rewards, 8).astype(np.float32),
        group_ids=np.arange(8, dtype=np.int32) % 2,
        valid=np.arange(8) != 3,
        response_trajectory=trajectory,
        response_turn=turn,
        response_rewards=rewards,
        response_tokens=valid.astype(np.int32),
        response_anchor=np.where(used, np.arange(count), -1).astype(np.int32),
        response_valid=valid,
        response_entropies=np.where(valid, rng.gamma(2.0, size=count), NAN).astype(np.float32),
    )


def slow(e: Experience, base: np.ndarray, k: float, k_next: float, zeta: float) -> np.ndarray:
    """The definition, row by row."""
    assert e.response_entropies is not None
    rows = [r for r in range(len(base)) if e.response_valid[r] and e.valid[e.response_trajectory[r]]]
    entropy = {r: float(e.response_entropies[r]) for r in rows}
    low, high = min(entropy.values()), max(entropy.values())
    relative = {r: (entropy[r] - low) / (high - low) for r in rows}
    at = {(e.response_trajectory[r], e.response_turn[r]): r for r in rows}
    mean = np.mean([np.exp(-k * relative[r]) for r in rows])
    advantages = np.zeros(len(base))
    for r in rows:
        following = at.get((e.response_trajectory[r], e.response_turn[r] + 1))
        bonus = 0.0 if following is None else np.exp(-k_next * relative[following])
        advantages[r] = np.exp(-k * relative[r]) / mean * base[r] + zeta * bonus
    advantages[rows] -= advantages[rows].mean()
    return advantages


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("scope", [over_trajectories, over_turns])
def test_against_a_slow_loop(seed, scope):
    e = random_experience(seed)
    base = np.asarray(of_returns(scope, grpo)(e, 2))
    computed = empg(e, 2, scope=scope, strength=1.5, bonus_strength=0.7, bonus_weight=0.3)
    np.testing.assert_allclose(computed, slow(e, base, 1.5, 0.7, 0.3), rtol=1e-4, atol=1e-5)


def test_without_bonus_it_is_aem_over_the_batch_centred():
    e = random_experience(5)
    part = e.response_valid & e.valid[e.response_trajectory]
    assert e.response_entropies is not None
    alpha = aem_coefficients(e.response_entropies, np.where(part, 0, -1), 1, min_range=0.0)
    scaled = np.asarray(alpha * of_returns(over_trajectories, grpo)(e, 2))
    assert np.ptp(np.asarray(alpha)[part]) > 0.5
    computed = empg(e, 2, bonus_weight=0.0)
    np.testing.assert_allclose(computed, np.where(part, scaled - scaled[part].mean(), 0.0), rtol=1e-4, atol=1e-6)


def test_the_order_of_rows_and_padding_change_nothing():
    e, rng = random_experience(6), np.random.default_rng(0)
    order = rng.permutation(45)
    shuffled = e._replace(
        **{
            name: getattr(e, name)[order]
            for name in e._fields
            if name.startswith("response_") and getattr(e, name) is not None
        }
    )
    np.testing.assert_allclose(empg(shuffled, 2), np.asarray(empg(e, 2))[order], rtol=1e-5, atol=1e-6)
    assert e.response_entropies is not None
    noisy = e._replace(response_entropies=np.where(e.response_valid, e.response_entropies, 77.0).astype(np.float32))
    np.testing.assert_array_equal(empg(noisy, 2), empg(e, 2))


def test_equal_entropies_leave_the_base_and_the_number_of_turns():
    # Every H̃ is 0: g = 1 and f = 1 before another turn.
    e = TABLE._replace(response_entropies=np.where(np.isnan(ENTROPIES), NAN, 1.0).astype(np.float32))
    b = np.array([1, -1, 1 + 0.05])
    np.testing.assert_allclose(np.asarray(empg(e, 1, estimator=dr_grpo))[[0, 1, 3]], b - b.mean(), rtol=1e-5)


def test_no_gradient_flows_through_entropies():
    gradient = jax.grad(lambda h: jnp.sum(empg(TABLE._replace(response_entropies=h), 1) ** 2))(jnp.arange(6.0))
    np.testing.assert_array_equal(gradient, 0.0)


def test_jit_and_vmap_equal_eager():
    tables = [random_experience(seed) for seed in range(3)]
    batched = jax.jit(jax.vmap(lambda e: empg(e, 2)))(jax.tree.map(lambda *leaves: np.stack(leaves), *tables))
    for table, row in zip(tables, batched, strict=True):
        np.testing.assert_allclose(row, empg(table, 2), rtol=1e-4, atol=1e-5)


def test_missing_or_invalid_entropies_are_named():
    with pytest.raises(ValueError, match="expected response_entropies, got none"):
        empg(TABLE._replace(response_entropies=None), 1)
    with pytest.raises(ValueError, match="expected equal shapes"):
        empg(TABLE._replace(response_entropies=np.zeros(3, np.float32)), 1)
    with pytest.raises(ValueError, match="expected response_entropies of a floating dtype"):
        empg(TABLE._replace(response_entropies=np.zeros(6, np.int32)), 1)
