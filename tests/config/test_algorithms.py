"""Names become estimators: each by hand, and the same numbers from appended and windowed rows."""

import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import ONE_DEVICE

from aem_jax.advantage import Experience
from aem_jax.batch import BatchLayout, collate, place
from aem_jax.config import algorithms
from aem_jax.config.algorithms import AlgorithmConfig
from aem_jax.credit import AemConfig, experience, make_credit
from aem_jax.envs.protocol import Task
from aem_jax.trajectory import Ending, Trajectory, Turn

# One group of four; the first episode has three turns. All reward is in the last turn; turns 0 answer one observation.
TABLE = Experience(
    returns=np.array([10.0, 0.0, 0.0, 2.0], np.float32),
    group_ids=np.zeros(4, np.int32),
    valid=np.ones(4, bool),
    response_trajectory=np.array([0, 0, 0, 1, 2, 3], np.int32),
    response_turn=np.array([0, 1, 2, 0, 0, 0], np.int32),
    response_rewards=np.array([0, 0, 10, 0, 0, 2], np.float32),
    response_tokens=np.array([1, 1, 2, 1, 1, 1], np.int32),
    response_anchor=np.array([0, 1, 2, 0, 0, 0], np.int32),
    response_valid=np.ones(6, bool),
    response_values=np.array([4, 6, 8, 1, 0, 1], np.float32),
    response_entropies=np.array([0, 2, 1, 2, 0, 0], np.float32),
)


def advantages(estimator: str, **changes) -> np.ndarray:
    return np.asarray(algorithms.response_advantages(AlgorithmConfig(estimator, **changes))(TABLE, 1))


def test_estimators_of_returns_by_hand():
    # mean 3; deviations 7, -3, -3, -1; sum of squares 68
    deviations = np.array([7.0, 7.0, 7.0, -3.0, -3.0, -1.0])
    np.testing.assert_allclose(advantages("dr_grpo"), deviations, rtol=1e-6)
    np.testing.assert_allclose(advantages("rloo"), deviations * 4 / 3, rtol=1e-6)
    np.testing.assert_allclose(advantages("grpo"), deviations / np.sqrt(68 / 4), rtol=1e-5)
    np.testing.assert_allclose(advantages("grpo", ddof=1), deviations / np.sqrt(68 / 3), rtol=1e-5)


def test_maxrl_by_hand():
    deviations = np.array([7.0, 7.0, 7.0, -3.0, -3.0, -1.0])
    np.testing.assert_allclose(advantages("maxrl"), deviations / 3, rtol=1e-5)
    np.testing.assert_allclose(advantages("maxrl", eps=1.0), deviations / 4, rtol=1e-6)
    rows = np.array([10.0, 10.0, 10.0, 0.0, 0.0, 2.0])
    np.testing.assert_allclose(advantages("maxrl", scope="turns"), (rows - 16 / 3) / (16 / 3), rtol=1e-5)


def test_over_turns_a_long_episode_weighs_more():
    # rows 10, 10, 10, 0, 0, 2: mean 16/3, sum of squares (3 · 14² + 2 · 16² + 10²)/9 = 400/3
    rows = np.array([10.0, 10.0, 10.0, 0.0, 0.0, 2.0])
    np.testing.assert_allclose(advantages("dr_grpo", scope="turns"), rows - rows.mean(), rtol=1e-5)
    expected = (rows - 16 / 3) / np.sqrt(400 / 3 / 5)
    np.testing.assert_allclose(advantages("grpo", scope="turns", ddof=1), expected, rtol=1e-5)


def test_reinforce_by_hand():
    # γ = ½: G = 2.5, 5, 10, 0, 0, 2.  Per response: μ = 3.25, Σ² = 135.25 − 6 · 3.25² = 71.875
    to_go = np.array([2.5, 5.0, 10.0, 0.0, 0.0, 2.0])
    computed = advantages("reinforce++", gamma=0.5, whiten="responses")
    np.testing.assert_allclose(computed, (to_go - 3.25) / np.sqrt(71.875 / 6), rtol=1e-5)
    # Per token the 10 counts twice: μ = 29.5/7, Σ² = 235.25 − 29.5²/7
    computed = advantages("reinforce++", gamma=0.5, ddof=1)
    np.testing.assert_allclose(computed, (to_go - 29.5 / 7) / np.sqrt((235.25 - 29.5**2 / 7) / 6), rtol=1e-5)
    # γ = 1: centred as dr_grpo, then whitened: 7 · 3 − 3 − 3 − 1 = 14 of six; Σ² = 166 − 14²/6
    centred = np.array([7.0, 7.0, 7.0, -3.0, -3.0, -1.0])
    computed = advantages("reinforce++-baseline", whiten="responses")
    np.testing.assert_allclose(computed, (centred - 14 / 6) / np.sqrt((166 - 14**2 / 6) / 6), rtol=1e-5)
    # Over turns the centre is the batch's own: dr_grpo over turns has mean 0.
    computed = advantages("reinforce++-baseline", scope="turns", whiten="responses")
    np.testing.assert_allclose(computed, advantages("grpo", scope="turns"), rtol=1e-5)


def test_gigpo_by_hand():
    # γ = ½: at the first observation G = 2.5, 0, 0, 2: μ = 9/8, deviations 11, −9, −9, 7 eighths.
    episode = np.array([7.0, 7.0, 7.0, -3.0, -3.0, -1.0])
    step = np.array([11, 0, 0, -9, -9, 7]) / 8
    computed = advantages("gigpo", gamma=0.5, step_weight=2.0, scale="none")
    np.testing.assert_allclose(computed, episode + 2 * step, rtol=1e-6)
    computed = advantages("gigpo", gamma=0.5, ddof=1)  # Σ² = (121 + 81 + 81 + 49)/64 = 332/64
    np.testing.assert_allclose(computed, episode / np.sqrt(68 / 3) + step / np.sqrt(332 / 64 / 3), rtol=1e-5)


def test_hgpo_and_gagpo_by_hand():
    # The states of turns 1 and 2 of the first episode are visited once: V = G there, and their context is their own.
    step = np.array([11, 0, 0, -9, -9, 7]) / 8
    for history in (0, 2):
        computed = advantages("hgpo", gamma=0.5, scale="none", history=history)
        np.testing.assert_allclose(computed, step, rtol=1e-6)
    # λ = 1: G − V = `step`; λ = 0: δ_0 = 0 + ½ · 5 − 9/8 is the same, because V_1 = G_1. Both have mean 0.
    for gae_lambda in (0.0, 1.0):
        computed = advantages("gagpo", gamma=0.5, gae_lambda=gae_lambda, scale="none")
        np.testing.assert_allclose(computed, step, rtol=1e-6, atol=1e-6)
    computed = advantages("gagpo", gamma=0.5, gae_lambda=1.0, ddof=1)  # Σ² = 332/64
    np.testing.assert_allclose(computed, step / np.sqrt(332 / 64 / 5), rtol=1e-5, atol=1e-6)


def test_empg_by_hand():
    # H̃ = 0, 1, ½, 1, 0, 0; turn 0 of the first episode has E as its bonus, turn 1 has G.
    E, G = np.exp(-1.0), np.exp(-0.5)
    weights = np.array([1, E, G, E, 1, 1])
    episode = np.array([7.0, 7.0, 7.0, -3.0, -3.0, -1.0])
    modulated = weights / weights.mean() * episode + 0.5 * np.array([E, G, 0, 0, 0, 0])
    computed = advantages("empg", bonus_weight=0.5, scale="none")
    np.testing.assert_allclose(computed, modulated - modulated.mean(), rtol=1e-5)


def test_gae_by_hand():
    # γ = 1, λ = ½. First episode: δ = 0 + 6 − 4, 0 + 8 − 6, 10 − 8 = 2, 2, 2, so Â = 3.5, 3, 2; others −1, 0, 1.
    computed = advantages("gae", gae_lambda=0.5, whiten="responses")
    raw = np.array([3.5, 3.0, 2.0, -1.0, 0.0, 1.0])
    np.testing.assert_allclose(computed, (raw - raw.mean()) / raw.std(), rtol=1e-5)
    # Per token the third counts twice: μ = 10.5/7, Σ² = 12.25 + 9 + 2 · 4 + 1 + 1 − 7 · 1.5² = 15.5
    computed = advantages("gae", gae_lambda=0.5, ddof=1)
    np.testing.assert_allclose(computed, (raw - 1.5) / np.sqrt(15.5 / 6), rtol=1e-5)
    # γ = ½, λ = 0: R = r + γ V' = 3, 4, 10 and the last rewards 0, 0, 2
    targets = algorithms.value_targets(AlgorithmConfig("gae", gamma=0.5, gae_lambda=0.0))
    assert targets is not None
    np.testing.assert_array_equal(targets(TABLE, 1), [3, 4, 10, 0, 0, 2])
    assert algorithms.has_values(AlgorithmConfig("gae")) and not algorithms.has_values(AlgorithmConfig("grpo"))
    assert algorithms.value_targets(AlgorithmConfig("grpo")) is None and set(algorithms.VALUED) < set(
        algorithms.ESTIMATORS
    )


def test_every_name_that_the_config_takes_has_a_function():
    kinds = typing.get_type_hints(AlgorithmConfig)
    tables = {"estimator": algorithms.ESTIMATORS, "scope": algorithms.SCOPES, "whiten": algorithms.WHITENED}
    tables |= {"scale": algorithms.SCALES}
    for field, table in tables.items():
        assert set(typing.get_args(kinds[field])) == set(table)
    assert set(algorithms.CENTRED) == set(algorithms.SCOPES)


CHANGES = {
    "scope": "turns",
    "ddof": 1,
    "eps": 1.0,
    "gamma": 0.5,
    "gae_lambda": 0.5,
    "whiten": "responses",
    "step_weight": 2.0,
    "scale": "none",
    "history": 0,
    "bonus_weight": 1.0,
}


@pytest.mark.parametrize("estimator", algorithms.ESTIMATORS)
def test_the_table_of_settings_that_not_all_estimators_read_is_right(estimator: str):
    assert set(CHANGES) == set(algorithms.READ_BY)
    batch, rng = collate(episodes("append"), LAYOUT), np.random.default_rng(1)
    values, entropies = rng.normal(size=(2, LAYOUT.max_responses)).astype(np.float32)
    table = experience(batch, jnp.asarray(values), jnp.asarray(np.exp(entropies)))
    plain = algorithms.response_advantages(AlgorithmConfig(estimator))(table, 3)
    for field, value in CHANGES.items():
        changed = algorithms.response_advantages(AlgorithmConfig(estimator, **{field: value}))(table, 3)
        assert (estimator in algorithms.READ_BY[field]) == bool((plain != changed).any()), field


@pytest.mark.parametrize(
    ("field", "value"), [("gamma", 1.5), ("gae_lambda", -0.5), ("eps", -1.0), ("history", -1), ("bonus_weight", -0.5)]
)
def test_numbers_out_of_range_are_refused(field, value):
    with pytest.raises(ValueError, match=rf"expected algorithm\.{field} .* got {value}"):
        AlgorithmConfig(**{field: value})


def episodes(context: str) -> list[Trajectory]:
    """Three groups of four. A few observations repeat in their turns; one episode is broken."""
    rng, trajectories = np.random.default_rng(0), []
    for n in range(12):
        turns = []
        for _ in range(int(rng.integers(1, 5))):
            m = int(rng.integers(1, 4))
            observation, response = np.arange(1, 4, dtype=np.int32), np.arange(5, 5 + m, dtype=np.int32)
            state = f"room {rng.integers(3)}"
            entropies = rng.uniform(0, 2, m)
            turns.append(Turn(observation, response, -entropies, entropies, float(rng.normal()), True, state))
        ending = Ending.ENV_ERROR if n == 5 else Ending.TERMINATED
        trajectories.append(Trajectory(Task("t", "k", {}), n // 4, n % 4, tuple(turns), ending, False, context=context))
    return trajectories


LAYOUT = BatchLayout(num_microbatches=12, rows=4, row_length=24, max_responses=60, max_trajectories=16)


@pytest.mark.parametrize("estimator", algorithms.ESTIMATORS)
def test_both_contexts_give_the_same_credit(estimator: str):
    config = AlgorithmConfig(estimator, gamma=0.95, gae_lambda=0.9)
    estimate, targets = algorithms.response_advantages(config), algorithms.value_targets(config)
    credit = make_credit(estimate, AemConfig(), 3, ONE_DEVICE, targets)
    values = np.random.default_rng(1).normal(size=LAYOUT.max_responses).astype(np.float32) if targets else None
    batches = {context: collate(episodes(context), LAYOUT) for context in ("append", "window")}
    assert (batches["append"].response_ids != batches["window"].response_ids).any()
    credits = {
        context: jax.device_get(credit(place(batch, ONE_DEVICE), None, values)[0]) for context, batch in batches.items()
    }
    one, other = credits["append"], credits["window"]
    np.testing.assert_array_equal(one.base, other.base)
    np.testing.assert_allclose(one.coefficients, other.coefficients, rtol=1e-6)
    for context, batch in batches.items():
        scaled = credits[context].base * credits[context].coefficients
        ids = np.asarray(batch.response_ids)
        np.testing.assert_allclose(credits[context].tokens, np.where(ids >= 0, scaled[ids], 0.0), rtol=1e-6)
    assert np.abs(one.base).max() > 0.1 and np.ptp(one.coefficients) > 0.1
    assert (one.values is None) == (targets is None)
    if targets is not None:
        np.testing.assert_array_equal(one.values, other.values)


def test_aem_scales_advantages_and_never_what_values_are_fitted_to():
    config = AlgorithmConfig("gae", whiten="responses", gae_lambda=0.5)
    estimate, targets = algorithms.response_advantages(config), algorithms.value_targets(config)
    batch = place(collate(episodes("window"), LAYOUT), ONE_DEVICE)
    values = np.random.default_rng(1).normal(size=LAYOUT.max_responses).astype(np.float32)
    values[~np.asarray(batch.response_valid)] = np.nan
    credit, statistics = jax.device_get(make_credit(estimate, AemConfig(), 3, ONE_DEVICE, targets)(batch, None, values))
    table, has_value = experience(batch, jnp.asarray(values)), ~np.isnan(values)
    ids = np.asarray(batch.response_ids)
    base, alpha = np.asarray(estimate(table, 3)), credit.coefficients
    np.testing.assert_allclose(credit.tokens, np.where(ids >= 0, (base * alpha)[ids], 0.0), rtol=1e-5, atol=1e-6)
    assert np.ptp(alpha) > 0.1 and targets is not None
    returns = np.asarray(targets(table, 3))[has_value]
    np.testing.assert_allclose(credit.values.returns[has_value], returns, rtol=1e-5, atol=1e-6)
    assert statistics["value/mean"] == pytest.approx(values[has_value].mean(), rel=1e-4)
    assert statistics["value/return"] == pytest.approx(returns.mean(), rel=1e-4)
    explained = 1 - np.var(returns - values[has_value]) / np.var(returns)
    assert statistics["value/explained_variance"] == pytest.approx(explained, rel=1e-4)


@pytest.mark.parametrize("estimator", ["reinforce++-baseline", "gigpo"])
def test_without_strength_the_base_algorithm_is_left(estimator: str):
    estimate = algorithms.response_advantages(AlgorithmConfig(estimator))
    batch = collate(episodes("append"), LAYOUT)
    credit, _ = make_credit(estimate, AemConfig(strength=0.0), 3, ONE_DEVICE)(place(batch, ONE_DEVICE))
    ids = np.asarray(batch.response_ids)
    np.testing.assert_array_equal(credit.tokens, np.where(ids >= 0, np.asarray(credit.base)[ids], 0.0))
