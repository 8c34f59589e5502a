"""Credit of a batch against the same arithmetic, written out slowly in numpy."""

import dataclasses

import jax
import numpy as np
import pytest

from aem_jax.advantage import grpo, of_returns, over_trajectories
from aem_jax.batch import BatchLayout, collate, place
from aem_jax.credit import AemConfig, make_credit
from aem_jax.envs.protocol import Task
from aem_jax.sharding import MeshConfig, make_mesh
from aem_jax.trajectory import Ending, Trajectory, Turn

LAYOUT = BatchLayout(num_microbatches=8, rows=4, row_length=40, max_responses=60, max_trajectories=16)


def episodes(rng: np.random.Generator) -> list[Trajectory]:
    """Three groups of four: one episode broken by its environment, one response empty, one group of equal entropies."""
    trajectories = []
    for group in range(3):
        for member in range(4):
            turns = []
            for k in range(int(rng.integers(1, 5))):
                m = 0 if (group, member, k) == (0, 1, 0) else int(rng.integers(1, 4))
                entropies = np.full(m, 0.5) if group == 2 else rng.uniform(0, 2, m)
                observation = np.arange(3, dtype=np.int32)
                ids = np.arange(5, 5 + m, dtype=np.int32)
                turns.append(Turn(observation, ids, -rng.uniform(0, 1, m), entropies, float(rng.normal()), True))
            ending = Ending.ENV_ERROR if (group, member) == (1, 3) else Ending.TERMINATED
            trajectories.append(Trajectory(Task("t", "k", {}), group, member, tuple(turns), ending, False))
    return trajectories


def by_hand(trajectories: list[Trajectory], strength: float) -> dict[tuple[int, int, int], tuple[float, float]]:
    """(group, member, turn) -> (base advantage, alpha)."""
    table = {}
    for group in range(3):
        members = [t for t in trajectories if t.group == group and t.ending is not Ending.ENV_ERROR]
        returns = np.array([t.total_reward for t in members])
        base = (returns - returns.mean()) / (returns.std() + 1e-6)
        keys = [(group, t.member, k) for t in members for k, turn in enumerate(t.turns) if len(turn.response_ids)]
        turns = {(group, t.member, k): turn for t in members for k, turn in enumerate(t.turns)}
        mean = np.array([turns[key].entropies.mean() for key in keys])
        spread = mean.max() - mean.min()
        scaled = np.exp(-strength * (mean - mean.min()) / spread) if spread >= 0.1 else np.ones(len(mean))
        alpha = scaled / scaled.mean()
        for key, a in zip(keys, alpha, strict=True):
            table[key] = (base[[t.member for t in members].index(key[1])], a)
    return table


@pytest.mark.parametrize("strength", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("context", ["append", "window"])
def test_token_advantages_are_alpha_times_base(strength, context):
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    trajectories = [
        Trajectory(t.task, t.group, t.member, t.turns, t.ending, t.success, context=context)
        for t in episodes(np.random.default_rng(0))
    ]
    batch = collate(trajectories, LAYOUT)
    credit = make_credit(of_returns(over_trajectories, grpo), AemConfig(strength), 3, mesh)
    assigned, statistics = jax.device_get(credit(place(batch, mesh)))
    expected = by_hand(trajectories, strength)
    response = 0
    seen = 0
    for t in trajectories:
        if t.ending is Ending.ENV_ERROR:
            continue
        for k, turn in enumerate(t.turns):
            where = np.asarray(batch.response_ids) == response
            assert where.sum() == len(turn.response_ids)
            if len(turn.response_ids):
                base, alpha = expected[t.group, t.member, k]
                np.testing.assert_allclose(assigned.tokens[where], base * alpha, rtol=2e-5, atol=2e-6)
                np.testing.assert_allclose(assigned.coefficients[response], alpha, rtol=2e-5)
                seen += 1
            response += 1
    assert seen == len(expected)
    assert np.all(assigned.tokens[np.asarray(batch.response_ids) < 0] == 0)
    alphas = np.array([alpha for _, alpha in expected.values()])
    assert statistics["aem/alpha_max"] == pytest.approx(alphas.max(), rel=1e-5)
    assert statistics["aem/flat_groups"] == pytest.approx(1 / 3)
    every = [e for t in trajectories if t.ending is not Ending.ENV_ERROR for turn in t.turns for e in turn.entropies]
    assert statistics["entropy/token"] == pytest.approx(np.mean(every), rel=1e-5)


def test_an_episode_out_of_the_loss_counts_only_in_the_statistics_of_its_group():
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    trajectories = episodes(np.random.default_rng(0))
    masked = [dataclasses.replace(t, in_loss=t.member != 2) for t in trajectories]
    credit = make_credit(of_returns(over_trajectories, grpo), AemConfig(), 3, mesh)
    batch = collate(masked, LAYOUT)
    all_in, _ = jax.device_get(credit(place(collate(trajectories, LAYOUT), mesh)))
    assigned, statistics = jax.device_get(credit(place(batch, mesh)))
    # base advantages equal those with everything in the loss: the statistics are the same
    np.testing.assert_array_equal(assigned.base, all_in.base)
    # alpha equals that of a step without the masked episodes
    others = collate([t for t in masked if t.in_loss], LAYOUT)
    without, _ = jax.device_get(credit(place(others, mesh)))
    of_masked = np.array([t.member == 2 for t in trajectories])[batch.response_trajectory] & batch.response_valid
    valid = batch.response_valid & ~of_masked
    np.testing.assert_allclose(assigned.coefficients[valid], without.coefficients[others.response_valid], rtol=1e-6)
    assert of_masked.any() and np.all(assigned.coefficients[of_masked] == 1)
    # none of their tokens is in a row or a minibatch
    assert not np.isin(np.nonzero(of_masked)[0], np.asarray(batch.response_ids)).any()
    assert set(batch.trajectory_minibatch[[t.member == 2 for t in trajectories] + [False] * 4]) == {-1}
    assert all(np.isfinite(value) for value in statistics.values())


def alphas(trajectories: list[Trajectory], config: AemConfig, key: jax.Array | None = None) -> np.ndarray:
    """alpha of the responses that have a token, in order."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    batch = collate(trajectories, LAYOUT)
    credit, _ = make_credit(of_returns(over_trajectories, grpo), config, 3, mesh)(place(batch, mesh), key)
    return np.asarray(credit.coefficients)[batch.response_valid]


def episode(group: int, member: int, *entropies: float) -> Trajectory:
    """An episode of responses of one token each, with these entropies."""
    ids, one = np.arange(3, dtype=np.int32), np.zeros(1, np.float32)
    turns = [Turn(ids, ids[:1], one, np.full(1, e, np.float32), 1.0, True) for e in entropies]
    return Trajectory(Task("t", "k", {}), group, member, tuple(turns), Ending.TERMINATED, False)


# exp(-H~) is 1 at the lowest entropy of a scope, 1/e at its highest, and g = exp(-1/2) half way between
E, G = np.exp(-1.0), np.exp(-0.5)


@pytest.mark.parametrize(
    ("scope", "expected"),
    [
        # group 0 holds 0, 1, 0.5; group 1 holds 1, 2
        ("group", [*(np.array([1, E, G]) / np.mean([1, E, G])), *(np.array([1, E]) / np.mean([1, E]))]),
        # trajectories are {0, 1}, {0.5} (one response: no range, so 1), {1, 2}
        ("trajectory", [*(np.array([1, E]) / np.mean([1, E])), 1, *(np.array([1, E]) / np.mean([1, E]))]),
        # all five together: H~ = 0, 1/2, 1/4, 1/2, 1
        ("batch", np.exp([0, -0.5, -0.25, -0.5, -1]) / np.mean(np.exp([0, -0.5, -0.25, -0.5, -1]))),
    ],
)
def test_alpha_is_normalised_over_its_scope(scope, expected):
    trajectories = [episode(0, 0, 0.0, 1.0), episode(0, 1, 0.5), episode(1, 0, 1.0, 2.0)]
    np.testing.assert_allclose(alphas(trajectories, AemConfig(scope=scope)), expected, rtol=1e-5)


def test_the_reversed_variant_gives_uncertain_responses_larger_coefficients():
    # exp(+H~) is 1, e, sqrt(e)
    coefficients = alphas([episode(0, 0, 0.0, 1.0), episode(0, 1, 0.5)], AemConfig(variant="reversed"))
    np.testing.assert_allclose(coefficients, np.array([1, 1 / E, 1 / G]) / np.mean([1, 1 / E, 1 / G]), rtol=1e-5)


def test_the_shuffled_variant_permutes_coefficients_within_a_group():
    rng = np.random.default_rng(0)
    trajectories = [episode(g, m, *rng.uniform(0, 2, 3)) for g in range(3) for m in range(4)]
    config = AemConfig(variant="shuffled")
    with pytest.raises(ValueError, match="expected a PRNG key"):
        alphas(trajectories, config)
    plain = alphas(trajectories, AemConfig()).reshape(3, 12)
    permuted = [alphas(trajectories, config, jax.random.key(seed)).reshape(3, 12) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(permuted[0], permuted[1])
    assert (permuted[0] != permuted[2]).any() and (permuted[0] != plain).any()
    np.testing.assert_array_equal(np.sort(permuted[0]), np.sort(plain))


def test_the_sign_control_has_aems_mean_over_responses_with_one_sign():
    # Each turn is worth 1: returns 2, 1 and 3 against a mean of 2. alpha is 1, E, G, E, G, G over their mean.
    trajectories = [episode(0, 0, 0.0, 1.0), episode(0, 1, 0.5), episode(0, 2, 1.0, 0.5, 0.5)]
    m = np.mean([1, E, G, E, G, G])
    expected = np.array([1, E, G, *[(E + G + G) / 3] * 3]) / m  # A = 0 keeps alpha; one response has A < 0
    np.testing.assert_allclose(alphas(trajectories, AemConfig(variant="sign")), expected, rtol=1e-5)


@pytest.mark.parametrize("scope", ["group", "batch"])
def test_the_sign_control_moves_only_the_weight_that_aem_moves_between_signs(scope):
    rng = np.random.default_rng(3)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    # Outcomes 0 or 1 in groups of four, so the advantage has two values in a group; one group has equal outcomes.
    trajectories = [
        dataclasses.replace(
            t, turns=tuple(dataclasses.replace(u, reward=float(won and u is t.turns[-1])) for u in t.turns)
        )
        for t, won in zip(episodes(rng), [1, 0, 0, 0, 1, 1, 0, 0, 1, 1, 1, 1], strict=True)
    ]
    batch = place(collate(trajectories, LAYOUT), mesh)
    both = {
        variant: make_credit(of_returns(over_trajectories, grpo), AemConfig(scope=scope, variant=variant), 3, mesh)
        for variant in ("aem", "sign")
    }
    aem, sign = (jax.device_get(both[variant](batch)[0]) for variant in ("aem", "sign"))
    np.testing.assert_array_equal(aem.base, sign.base)
    valid = np.asarray(batch.response_valid)
    groups = np.asarray(batch.group_ids)[batch.response_trajectory] if scope == "group" else np.zeros(len(valid), int)
    seen = 0
    for group in set(groups[valid]):
        for side in (1, -1):
            rows = valid & (groups == group) & (np.sign(aem.base) == side)
            if not rows.any():
                continue
            seen += 1
            assert np.ptp(sign.coefficients[rows]) == 0
            assert sign.coefficients[rows].mean() == pytest.approx(aem.coefficients[rows].mean(), rel=1e-5)
            if scope == "group":  # the advantage has one value on each side
                total = [float((credit.coefficients * credit.base)[rows].sum()) for credit in (aem, sign)]
                assert total[0] == pytest.approx(total[1], rel=1e-5)
        rows = valid & (groups == group) & (aem.base == 0)
        np.testing.assert_array_equal(sign.coefficients[rows], aem.coefficients[rows])
    assert seen == 4 if scope == "group" else seen == 2
    assert np.abs(aem.coefficients - sign.coefficients)[valid].max() > 0.05


def test_the_config_refuses_negative_strength():
    with pytest.raises(ValueError, match="aem.strength and aem.min_range >= 0, got -1"):
        AemConfig(strength=-1.0)
