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


def test_the_entropy_of_one_token_responses_is_the_entropy_of_the_token():
    ids = [3, 17, 8, 25, 9, 1]
    drawn, exact = draws(ids, 1), entropy(distribution(ids))
    np.testing.assert_allclose(drawn.predictable, exact, atol=1e-4)
    assert (drawn.tokens == 1).all()
    assert abs(drawn.surprisal.mean() - exact) < 4 * drawn.surprisal.std() / DRAWS**0.5


def test_the_entropy_of_two_token_responses_is_the_sum_over_first_tokens():
    # H = H_1 + sum over a_1 != stop of pi(a_1) H_2(a_1)
    ids = [3, 17, 8, 25, 9, 1]
    first = distribution(ids)
    exact = entropy(first) + sum(p * entropy(distribution([*ids, a])) for a, p in enumerate(first) if a != STOP)
    drawn = draws(ids, 2)
    for values in (drawn.surprisal, drawn.predictable):
        assert abs(values.mean() - exact) < 4 * values.std() / DRAWS**0.5
    assert drawn.predictable.std() < drawn.surprisal.std()  # less noise, as in its docstring
    assert set(np.unique(drawn.tokens)) <= {1, 2}


def test_one_key_gives_the_same_random_numbers_for_any_parameters():
    one, repeated = draws([3, 17, 8], 3), draws([3, 17, 8], 3)
    np.testing.assert_array_equal(one.surprisal, repeated.surprisal)
    other = draws([3, 17, 8], 3, seed=1)
    assert (one.surprisal != other.surprisal).any()
    nudged = draws([3, 17, 8], 3, jax.tree.map(lambda leaf: leaf * 1.0005, PARAMS))
    paired, unpaired = (changed.predictable - one.predictable for changed in (nudged, other))
    assert 0 < paired.std() < 0.2 * unpaired.std()


def test_every_state_has_its_own_keys():
    ids = np.array([3, 17, 8], np.int32)
    states = [State(n, 0, 0, 0, ids, 1, 2, 0.0, 0.0, "") for n in range(2)]
    drawn = draw_responses(sampler(), PARAMS, states, jax.random.key(0), DRAWS, ROLLOUT)
    assert (drawn.surprisal[0] != drawn.surprisal[1]).any()
    np.testing.assert_array_equal(drawn.surprisal[0], draws(ids.tolist(), 2).surprisal[0])


def test_a_state_longer_than_a_slot_is_refused():
    with pytest.raises(ValueError, match="expected at most 32 tokens a slot, got 40"):
        draws([1] * 40, 1)
