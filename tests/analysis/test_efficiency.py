"""Efficiency of credit rules against problems whose gradients are known exactly: a bandit, and a tree of two turns."""

import itertools
from functools import cached_property

import numpy as np
import pytest

from aem_jax.advantage import aem_coefficients
from aem_jax.analysis.efficiency import Products, decisive_at_low_entropy, distinct, efficiencies, share_within


class Tabular:
    """A softmax policy over a tree of states. `paths` are the episodes, as (state, action) pairs, with returns."""

    def __init__(self, logits, paths, returns):
        self.logits = [np.asarray(row, np.float64) for row in logits]
        self.paths, self.returns = paths, np.asarray(returns, np.float64)
        self.starts = np.cumsum([0, *(len(row) for row in self.logits)])

    def policy(self, theta):
        rows = [theta[start : start + len(row)] for start, row in zip(self.starts[:-1], self.logits, strict=True)]
        return [np.exp(row - row.max()) / np.exp(row - row.max()).sum() for row in rows]

    @property
    def theta(self):
        return np.concatenate(self.logits)

    def probabilities(self, theta):
        policy = self.policy(theta)
        return np.array([np.prod([policy[s][a] for s, a in path]) for path in self.paths])

    def value(self, theta):
        return float(self.probabilities(theta) @ self.returns)

    def gradient(self):
        """∇J, from the sum over all episodes."""
        probabilities = self.probabilities(self.theta)
        return sum(
            p * r * sum(self.score(s, a) for s, a in path)
            for p, r, path in zip(probabilities, self.returns, self.paths, strict=True)
        )

    def score(self, state, action):
        """∇ log π(action | state)."""
        policy = self.policy(self.theta)[state]
        score = np.zeros(self.starts[-1])
        score[self.starts[state] : self.starts[state + 1]] = -policy
        score[self.starts[state] + action] += 1
        return score

    def entropy(self, state):
        policy = self.policy(self.theta)[state]
        return float(-np.sum(policy * np.log(policy)))

    @cached_property
    def members(self):
        """All groups of `SIZE` episodes."""
        return list(itertools.product(range(len(self.paths)), repeat=SIZE))

    @cached_property
    def weights(self):
        """Probability of each group."""
        return np.array([np.prod(self.probabilities(self.theta)[list(m)]) for m in self.members])

    @cached_property
    def gradients(self):
        """Strength → (g, u) of each group, f64[groups, parameters]."""
        pairs = {strength: [self.group(m, strength) for m in self.members] for strength in RULES.values()}
        return {strength: tuple(map(np.array, zip(*both, strict=True))) for strength, both in pairs.items()}

    def group(self, members, strength):
        """(g, u) of one group of episodes: of GRPO times AEM's α, and the unbiased estimate of ∇J."""
        returns = self.returns[list(members)]
        deviations = returns - returns.mean()
        base = deviations / (returns.std() + 1e-6)
        others = deviations * len(members) / (len(members) - 1)
        turns = [(i, s, a) for i, m in enumerate(members) for s, a in self.paths[m]]
        entropies = np.array([self.entropy(s) for _, s, _ in turns], np.float32)
        alpha = np.asarray(aem_coefficients(entropies, np.zeros(len(turns), int), 1, strength=strength, min_range=0.0))
        g = sum(x * base[i] * self.score(s, a) for x, (i, s, a) in zip(alpha, turns, strict=True)) / len(turns)
        u = sum(others[i] * self.score(s, a) for i, s, a in turns) / len(members)
        return g, u


BANDIT = Tabular([[0.3, -0.4, 0.1]], [[(0, 0)], [(0, 1)], [(0, 2)]], [1.0, 0.0, 0.25])
# The first turn is nearly decided and matters; the second is open, and matters after one of the first actions.
TREE = Tabular(
    [[2.5, 0.0], [0.2, 0.0], [0.0, 0.1]],
    [[(0, i), (1 + i, j)] for i in range(2) for j in range(2)],
    [0.0, 0.1, 1.0, 0.9],
)
RULES = {"base": 0.0, "aem": 1.0, "reversed": -1.0}
SIZE = 3


def exact(problem, strength, scale, groups_per_step):
    """e_b by enumeration of all groups: E g, E‖g‖² and ∇J."""
    gradients, weights = problem.gradients[strength][0], problem.weights
    mean, alone = weights @ gradients, weights @ np.sum(gradients**2 * scale, axis=1)
    square = alone / groups_per_step + (1 - 1 / groups_per_step) * np.sum(mean**2 * scale)
    return np.sum(mean * problem.gradient() * scale) / np.sqrt(square), mean, square


def sampled(problem, count, scale, seed):
    drawn = np.random.default_rng(seed).choice(len(problem.members), size=count, p=problem.weights)
    vectors = {name: problem.gradients[s][0][drawn] * np.sqrt(scale) for name, s in RULES.items()}
    u = problem.gradients[0.0][1][drawn] * np.sqrt(scale)
    return {name: Products(v @ v.T, v @ vectors["base"].T, v @ u.T, v @ u.T) for name, v in vectors.items()}


def is_near(estimate, expected):
    """Within three standard errors: 36 intervals of 95 % would not all cover."""
    return abs(estimate.value - expected) <= 3 / 3.92 * (estimate.high - estimate.low)


@pytest.mark.parametrize("problem", [BANDIT, TREE], ids=["bandit", "tree"])
@pytest.mark.parametrize("groups_per_step", [1, 4])
def test_estimates_are_those_of_enumeration(problem, groups_per_step):
    scale = np.linspace(0.5, 2.0, len(problem.theta))
    estimates = efficiencies(sampled(problem, 300, scale, seed=1), np.arange(300), groups_per_step)
    expected = {name: exact(problem, strength, scale, groups_per_step)[0] for name, strength in RULES.items()}
    for name, estimate in estimates.items():
        assert is_near(estimate.gain, expected[name]), name
        assert estimate.gain.high - estimate.gain.low < 0.6 * expected["base"]
        assert is_near(estimate.ratio, expected[name] / expected["base"]), name
        assert is_near(estimate.difference, expected[name] - expected["base"]), name
    assert estimates["base"].ratio == (1, 1, 1) and estimates["base"].cosine.value == pytest.approx(1)


def test_a_bandit_has_one_state_so_alpha_changes_nothing():
    estimates = efficiencies(sampled(BANDIT, 60, 1.0, seed=2), np.arange(60), 2)
    assert estimates["aem"].ratio.value == pytest.approx(1, abs=1e-6)


def test_intervals_cover_the_exact_ratio_as_often_as_they_say():
    scale, groups_per_step = np.ones(len(TREE.theta)), 4
    base, aem = (exact(TREE, RULES[name], scale, groups_per_step)[0] for name in ("base", "aem"))
    assert abs(aem / base - 1) > 0.05  # the rules differ here
    inside = 0
    for seed in range(60):
        found = efficiencies(sampled(TREE, 160, scale, seed), np.arange(160) // groups_per_step, groups_per_step)
        inside += found["aem"].ratio.low <= aem / base <= found["aem"].ratio.high
    assert inside >= 51  # 57 of 60 expected; fewer than 51 has a probability of 1 %


@pytest.mark.parametrize("signal", [0.0, 0.2, 0.4])
def test_standard_errors_are_those_of_many_samples_where_gradients_are_mostly_noise(signal):
    """Long gradients of a small mean, as those of a policy: a bootstrap over groups gives up to √3 times as much."""
    rng, count, groups_per_step, size = np.random.default_rng(0), 96, 6, 400
    mean = rng.standard_normal(size)
    mean *= signal * size**0.25 / np.linalg.norm(mean)
    steps, found = np.arange(count) // groups_per_step, []
    for _ in range(150):
        u, rest = rng.standard_normal((2, count, size))
        u += mean
        g = 0.9 * u + np.sqrt(0.19) * rest
        products = {"base": Products(*(u @ u.T,) * 4), "other": Products(g @ g.T, g @ u.T, g @ u.T, g @ u.T)}
        estimates = efficiencies(products, steps, groups_per_step)
        found.append([getattr(estimates["other"], name)[:2] for name in ("gain", "difference")])
    values, lows = np.moveaxis(np.array(found), -1, 0)
    errors = np.sqrt(np.mean(((values - lows) / 1.96) ** 2, axis=0))
    np.testing.assert_allclose(errors / values.std(axis=0), 1, atol=0.2)  # the deviation of 150 has an error of 6 %


def test_the_mean_over_samples_of_a_few_groups_has_no_bias():
    """Products of a group with itself would raise the gain of every rule."""
    scale = np.ones(len(TREE.theta))
    _, mean, _ = exact(TREE, 1.0, scale, 1)
    expected = mean @ TREE.gradient()
    across = []
    for seed in range(400):
        gain = sampled(TREE, 6, scale, seed)["aem"].gain
        across.append((gain.sum() - np.trace(gain)) / 30)
    error = np.std(across) / np.sqrt(len(across))
    assert abs(np.mean(across) - expected) < 3 * error
    own = TREE.weights @ np.sum(TREE.gradients[1.0][0] * TREE.gradients[1.0][1], axis=1)
    assert (own - expected) / 6 > 6 * error  # the bias of a mean over all pairs: the test could tell


@pytest.mark.parametrize("name", RULES)
def test_the_gain_is_that_of_many_small_updates(name):
    """Mean of J(θ + η P g / √E‖g‖²) − J(θ) over all groups, exact, is η e to first order."""
    scale, eta = np.linspace(0.5, 2.0, len(TREE.theta)), 1e-4
    expected, _, square = exact(TREE, RULES[name], scale, 1)
    steps = eta * scale * TREE.gradients[RULES[name]][0] / np.sqrt(square)
    gains = np.array([TREE.value(TREE.theta + step) - TREE.value(TREE.theta) for step in steps])
    assert TREE.weights @ gains == pytest.approx(eta * expected, rel=2e-3)


def test_groups_of_one_part_are_not_paired():
    rng = np.random.default_rng(0)
    products = {"base": Products(*(np.eye(6) * 3 + 1 for _ in range(4)))}
    steps = np.array([0, 0, 0, 1, 1, 1])
    clean = efficiencies(products, steps, 3)["base"].gain.value
    inside = steps[:, None] == steps[None, :]
    noise = np.where(inside & ~np.eye(6, dtype=bool), rng.normal(size=(6, 6)) * 100, 0.0)
    noisy = {"base": products["base"]._replace(gain=products["base"].gain + noise)}
    assert efficiencies(noisy, steps, 3)["base"].gain.value == pytest.approx(clean)
    with pytest.raises(ValueError, match="expected groups of at least 2 steps, got 1"):
        efficiencies(products, np.zeros(6, int), 3)


def test_the_share_above_the_base_rule():
    rng = np.random.default_rng(0)
    one = 9 * np.eye(6) + rng.normal(size=(6, 6)) + 5  # all norms are defined
    base, none = Products(*(one,) * 4), Products(*(np.zeros((6, 6)),) * 4)
    products = {"base": base, "same": base, "larger": base._replace(gain=one + 1), "none": none}
    found = efficiencies(products, np.arange(6), 2)
    shares = [found[name].above for name in ("base", "same", "larger")]
    assert shares == [0.5, 0.5, 1.0] and np.isnan(found["none"].above)
    few = {name: Products(*(matrix[:2, :2] for matrix in each)) for name, each in products.items()}
    few = efficiencies(few, np.arange(2), 1)["larger"]
    assert few.gain.value > 0 and np.isnan([few.gain.low, few.ratio.value, few.above]).all()  # no interval of two


def test_multiples_of_a_row_are_left_out():
    first, second = np.array([1.0, -2.0, 0.0, 4.0]), np.array([1.0, -2.0, 0.001, 4.0])
    table = np.stack([0 * first, first, second, -0.5 * first, first.astype(np.float32) / np.float32(3), 7 * second])
    kept, multiples = distinct(table)
    np.testing.assert_array_equal(kept, [first, second])
    assert [index for index, _ in multiples] == [0, 0, 1, 0, 0, 1]
    assert [factor for _, factor in multiples] == pytest.approx([0, 1, 1, -0.5, 1 / 3, 7])
    np.testing.assert_allclose([factor * kept[index] for index, factor in multiples], table, rtol=1e-6, atol=1e-12)


def test_rows_of_zeros_are_left_out():
    kept, multiples = distinct(np.zeros((2, 3)))
    assert kept.shape == (0, 3) and multiples == [(0, 0.0)] * 2


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_share_within_states_is_that_of_the_variances(share):
    rng = np.random.default_rng(3)
    counts = rng.integers(1, 9, size=4000)
    states = np.repeat(np.arange(4000), counts)
    between, within = rng.normal(size=4000) * np.sqrt(1 - share), rng.normal(size=len(states)) * np.sqrt(share)
    value, number = share_within(between[states] + within, states)
    assert value == pytest.approx(share, abs=0.03)
    assert number == counts[counts > 1].sum()


def test_share_within_needs_a_state_that_was_visited_twice():
    value, number = share_within(np.array([0.1, 0.2]), np.array([0, 1]))
    assert np.isnan(value) and number == 0
    assert share_within(np.array([1.0, 3.0, 5.0]), np.array([0, 0, 1])) == (1.0, 2)


def test_decisive_turns_are_those_of_large_advantage():
    advantages = np.array([0.0, 0.1, -0.2, 2.0, -2.0])
    relative = np.array([0.0, 0.9, 0.9, 0.1, 0.8])
    assert decisive_at_low_entropy(advantages, relative) == 0.5
    assert np.isnan(decisive_at_low_entropy(np.zeros(3), np.zeros(3)))
