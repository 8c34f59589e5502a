"""Draws from the real sampler against response entropies that can be computed exactly."""

from functools import cache

import jax
import numpy as np
import pytest
from conversation import cacheless
from small_policies import MULTI_UNTIED, numpy_params

from aem_jax.analysis.draws import Draws, draw_responses
from aem_jax.analysis.states import State
from aem_jax.models import Params, Policy
from aem_jax.rollout import RolloutConfig
from aem_jax.sampler import Sampler, SamplingConfig

POLICY, PARAMS = Policy(MULTI_UNTIED), numpy_params(MULTI_UNTIED)
STOP = 5
ROLLOUT = RolloutConfig(
    context_tokens=32, prompt_tokens=16, response_tokens=8, decode_chunk=2, extend_buckets=(4, 8), num_slots=8
)
DRAWS = 256


@cache
def sampler() -> Sampler:
    return Sampler(POLICY, SamplingConfig(), (STOP,), capacity=32, slack=8, windows=(16,))


def draws(ids: list[int], budget: int, params: Params = PARAMS, seed: int = 0) -> Draws:
    state = State(0, 0, 0, 0, np.array(ids, np.int32), 1, budget, 0.0, 0.0, "")
    return draw_responses(sampler(), params, [state], jax.random.key(seed), DRAWS, ROLLOUT)


def distribution(ids: list[int]) -> np.ndarray:
    logits = np.asarray(cacheless(POLICY, PARAMS, ids)[-1], np.float64)
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def entropy(policy: np.ndarray) -> float:
    return float(-(policy * np.log(policy)).sum())


def test_of_one_token_the_response_entropy_is_the_token_s():
    ids = [3, 17, 8, 25, 9, 1]
    found, exact = draws(ids, 1), entropy(distribution(ids))
    np.testing.assert_allclose(found.predictable, exact, atol=1e-4)
    assert (found.tokens == 1).all()
    assert abs(found.surprisal.mean() - exact) < 4 * found.surprisal.std() / DRAWS**0.5


def test_of_two_tokens_it_is_the_sum_over_all_first_tokens():
    # H = H_1 + sum over a_1 != stop of pi(a_1) H_2(a_1)
    ids = [3, 17, 8, 25, 9, 1]
    first = distribution(ids)
    exact = entropy(first) + sum(p * entropy(distribution([*ids, a])) for a, p in enumerate(first) if a != STOP)
    found = draws(ids, 2)
    for values in (found.surprisal, found.predictable):
        assert abs(values.mean() - exact) < 4 * values.std() / DRAWS**0.5
    assert found.predictable.std() < found.surprisal.std()  # less noise, as in its docstring
    assert set(np.unique(found.tokens)) <= {1, 2}


def test_the_same_key_draws_with_the_same_random_numbers_whatever_the_parameters():
    one, again = draws([3, 17, 8], 3), draws([3, 17, 8], 3)
    np.testing.assert_array_equal(one.surprisal, again.surprisal)
    other = draws([3, 17, 8], 3, seed=1)
    assert (one.surprisal != other.surprisal).any()
    nudged = draws([3, 17, 8], 3, jax.tree.map(lambda leaf: leaf * 1.0005, PARAMS))
    paired, apart = (each.predictable - one.predictable for each in (nudged, other))
    assert 0 < paired.std() < 0.2 * apart.std()


def test_every_state_has_its_own_keys():
    ids = np.array([3, 17, 8], np.int32)
    states = [State(n, 0, 0, 0, ids, 1, 2, 0.0, 0.0, "") for n in range(2)]
    found = draw_responses(sampler(), PARAMS, states, jax.random.key(0), DRAWS, ROLLOUT)
    assert (found.surprisal[0] != found.surprisal[1]).any()
    np.testing.assert_array_equal(found.surprisal[0], draws(ids.tolist(), 2).surprisal[0])


def test_a_state_that_does_not_fit_is_named():
    with pytest.raises(ValueError, match="expected at most 32 tokens a slot, got 40"):
        draws([1] * 40, 1)
