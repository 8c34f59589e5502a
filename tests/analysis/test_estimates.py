"""Estimates against values worked out by hand, and the drift against a small softmax whose entropy is exact."""

import numpy as np
import pytest

from aem_jax.analysis.claims import choose, coefficient_inputs, drift, entropy_decomposition, proxy
from aem_jax.analysis.draws import Draws
from aem_jax.analysis.estimates import (
    opposed,
    pearson,
    predicted_drift,
    relative_surprisal,
    standard_error,
    with_interval,
)
from aem_jax.analysis.states import State, states_of
from aem_jax.envs.protocol import Task
from aem_jax.trajectory import Ending, Trajectory, Turn


def test_relative_surprisal_by_hand():
    # draws 1, 2, 3: mean 2, deviation 1, error 1 / sqrt(3); surprisal 2.5 is 0.5 above
    relative, errors = relative_surprisal(np.array([2.5]), np.array([[1.0, 2.0, 3.0]]))
    assert relative == pytest.approx([0.5]) and errors == pytest.approx([3**-0.5])
    assert standard_error(np.array([[4.0, 4.0]])) == [0.0]


def test_pearson_and_opposed_by_hand():
    # x - mean = -1, 0, 1; y - mean = -1, -1, 2: sum of products 3, norms sqrt(2) and sqrt(6)
    assert pearson(np.array([1.0, 2.0, 3.0]), np.array([0.0, 0.0, 3.0])) == pytest.approx(3 / 12**0.5)
    assert all(np.isnan(pearson(np.full(n, x), np.arange(float(n)))) for n in (3, 6, 7) for x in (1.0, 0.1))
    # of four pairs one has a zero, two of the other three are opposed
    assert opposed(np.array([1.0, -1.0, 2.0, 0.0]), np.array([-1.0, 5.0, 2.0, 1.0])) == pytest.approx(2 / 3)


def test_an_interval_contains_the_value_and_needs_two_samples():
    x = np.arange(30.0)
    estimate = with_interval(pearson, x, x + np.random.default_rng(0).normal(0, 5, 30))
    assert -1 < estimate.low < estimate.value < estimate.high < 1
    assert with_interval(pearson, x, -x)[:3] == pytest.approx((-1, -1, -1))
    assert np.isnan(with_interval(pearson, x[:1], x[:1]).low)


def entropy(logits: np.ndarray) -> float:
    policy = np.exp(logits) / np.exp(logits).sum()
    return float(-(policy * np.log(policy)).sum())


@pytest.mark.parametrize("action", range(4))
@pytest.mark.parametrize("advantage", [1.5, -0.7])
def test_the_drift_is_that_of_a_natural_gradient_step_on_a_softmax(action, advantage):
    logits = np.array([1.0, 0.3, -0.5, 0.1])
    policy = np.exp(logits) / np.exp(logits).sum()
    # F = diag(pi) - pi pi^T maps e_a / pi(a) to e_a - pi, the gradient of log pi(a): the former is the natural gradient
    fisher = np.diag(policy) - np.outer(policy, policy)
    direction = np.eye(4)[action] / policy[action]
    np.testing.assert_allclose(fisher @ direction, np.eye(4)[action] - policy, atol=1e-12)
    step = 1e-5
    measured = (entropy(logits + step * advantage * direction) - entropy(logits - step * advantage * direction)) / (
        2 * step
    )
    relative = -np.log(policy[action]) - entropy(logits)
    assert predicted_drift(np.array([advantage]), np.array([relative])) == pytest.approx([measured], rel=1e-6)


def test_responses_with_one_sign_of_advantage_times_alpha_minus_one_move_entropy_one_way():
    # The exact drift of a softmax, summed over responses whose alpha decreases with their surprisal, as in the paper.
    logits = np.array([2.0, 0.5, 0.0, -1.0])
    policy = np.exp(logits) / np.exp(logits).sum()
    relative = -np.log(policy) - entropy(logits)
    alpha = 1 - 0.3 * relative
    for advantage in (1.0, -1.0):
        change = predicted_drift(np.full(4, advantage), relative)
        sign = np.sign(advantage * (alpha - 1))
        assert (change[sign > 0] < 0).all() and (change[sign < 0] > 0).all()


def state(number: int, surprisal: float, predictable: float = 1.0) -> State:
    return State(number, number, 0, 0, np.arange(3, dtype=np.int32), 2, 8, surprisal, predictable, "")


def test_proxy_by_hand():
    # H_resp is 2 in both states: relative surprisal -1 (unsurprising) and 1 (surprising); alpha 1.5 and 0.5
    drawn = Draws(np.array([[1.0, 3.0], [1.5, 2.5]]), np.full((2, 2), 1.5), np.ones((2, 2), int))
    result = proxy([state(0, 1.0, 1.0), state(1, 3.0, 2.5)], np.array([1.5, 0.5]), drawn)
    assert result["pearson"]["value"] == pytest.approx(-1)
    assert result["pearson_predictable"]["value"] == pytest.approx(-1)
    assert (result["opposed_count"], result["decided_count"], result["draws"]) == (2, 2, 2)
    assert [point["relative"] for point in result["points"]] == [-1, 1]


def test_entropy_decomposition_by_hand():
    # H̄ of the draws: 1 and 3 in the first state, 6 and 6 in the second (12 nats over 2 tokens). Means 2 and 6, of
    # variance 4; variance inside 1 and 0, mean 1/2: 4 / 4.5 lies between states. Inside, only the first varies, and
    # there H̄ − 2 = (−1, 1) beside S − 5 = (−2, 2): r is 2 / √(1 · (4 + 1)): S varies in both states.
    drawn = Draws(np.array([[3.0, 7.0], [8.0, 10.0]]), np.array([[1.0, 3.0], [12.0, 12.0]]), np.array([[1, 1], [2, 2]]))
    result = entropy_decomposition(drawn)
    assert result["between"]["value"] == pytest.approx(4 / 4.5)
    assert result["inside"]["value"] == pytest.approx(2 / np.sqrt(5))
    # a response of one uncertain token: its entropy does not depend on the sample
    one = Draws(np.array([[0.1, 2.3], [0.7, 0.7]]), np.array([[0.3, 0.3], [0.7, 0.7]]), np.ones((2, 2), int))
    result = entropy_decomposition(one)
    assert result["between"]["value"] == 1.0 and np.isnan(result["inside"]["value"])
    # the same over 64 draws of three tokens, two of them certain: means of thirds are rounded
    many = Draws(np.random.default_rng(0).random((2, 64)), np.repeat([[0.3], [0.7]], 64, 1), np.full((2, 64), 3))
    assert np.isnan(entropy_decomposition(many)["inside"]["value"])


def test_drift_by_hand():
    # states 0 and 1 are in the update (A (alpha - 1) > 0), state 2 is not; S - H is -1, 1, 0
    states = [state(0, 1.0), state(1, 3.0), state(2, 2.0)]
    alpha, advantages = np.array([1.5, 0.5, 0.5]), np.array([2.0, -1.0, 1.0])
    before = Draws(np.full((3, 2), 2.0), np.full((3, 2), 1.0), np.ones((3, 2), int))
    after = before._replace(predictable=np.array([[0.8, 1.0], [0.9, 0.9], [1.2, 1.2]]))
    result = drift(states, alpha, advantages, before, after, 1)
    assert result["own_states"] == 2
    assert result["predicted"]["value"] == pytest.approx((2 * -1 + -1 * 1) / 2)
    assert result["measured_own"]["value"] == pytest.approx(-0.1)  # both fall by 0.1 in the mean
    assert result["measured"]["value"] == pytest.approx(0.0)
    # draws of state 0 change by -0.2 and 0: deviation 0.1 sqrt(2), error 0.1
    assert result["points"][0] == pytest.approx({"predicted": -2.0, "measured": -0.1, "error": 0.1})
    assert drift(states, np.ones(3), advantages, before, after, 1)["predicted"] is None


def test_choose_takes_larger_weights_first_and_never_weight_zero():
    weights = np.array([2, 0, 1, 2, 1, 0, 2])
    assert choose(weights, 3, 0).tolist() == [0, 3, 6]
    assert set(choose(weights, 99, 0)) == {0, 2, 3, 4, 6}
    four = choose(weights, 4, 1).tolist()
    assert {0, 3, 6} < set(four) and four == sorted(four)


def turn(observation_ids: list[int], response_ids: list[int]) -> Turn:
    logprobs = -0.5 * np.ones(len(response_ids), np.float32)
    return Turn(np.array(observation_ids), np.array(response_ids), logprobs, 0.25 - logprobs, 0.0, True, "", "x")


@pytest.mark.parametrize("context", ["append", "window"])
def test_the_context_of_a_state_is_the_context_of_the_policy(context):
    turns = (turn([1, 2], [3]), turn([4], []), turn([5], [6, 7]))
    played = Trajectory(Task("t", "k", {}), 1, 0, turns, Ending.TERMINATED, True, context=context)
    broken = Trajectory(Task("t", "k", {}), 0, 0, turns, Ending.ENV_ERROR, False, context=context)
    first, last = states_of([broken, played], response_tokens=8, context_tokens=10)
    assert (first.response, last.response, last.turn, last.group, last.trajectory) == (0, 2, 2, 1, 1)
    assert first.context.tolist() == [1, 2]
    assert last.context.tolist() == ([1, 2, 3, 4, 5] if context == "append" else [5])
    assert (first.budget, last.budget) == (8, 5 if context == "append" else 8)
    assert (last.tokens, last.surprisal, last.predictable) == (2, 1.0, 1.5)


def test_coefficient_inputs_by_hand():
    states = [state(0, 1.0), state(1, 1.0), state(2, 1.0), state(3, 1.0)]
    result = coefficient_inputs(
        states, np.array([1.2, 0.8, 1, 1]), np.array([0.1, 0.6, 0.3, 0.35]), np.array([0, 0, 2, 2]), 0.1
    )
    assert result["groups"] == 2 and result["flat_groups"] == 0.5  # spans are 0.5 and 0.05
    assert result["entropy_span"][1] == pytest.approx(0.275) and result["alpha"] == [0.8, 1.2]
    assert result["turns"] == 1 and result["tokens"] == [2, 2, 2]
