"""Sampling one token: its distribution, its logprob, the entropy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from aem_jax.sampler import SamplingConfig, make_sample_token
from aem_jax.sampler.sampling import uniforms

DRAWS = 60_000


def randoms(count: int, seed: int = 0) -> jax.Array:
    return jax.random.uniform(jax.random.key(seed), (count, 2))


def draw_many(config: SamplingConfig, logits: np.ndarray, count: int = DRAWS, seed: int = 0) -> np.ndarray:
    rows = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (count, len(logits)))
    return np.asarray(jax.jit(make_sample_token(config))(rows, randoms(count, seed))[0])


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def chi_square_p(tokens: np.ndarray, probabilities: np.ndarray) -> float:
    """p-value of the counts; tokens expected fewer than 5 times are counted together, impossible ones never occur."""
    counts = np.bincount(tokens, minlength=len(probabilities))
    assert counts[probabilities == 0].sum() == 0
    expected = probabilities * len(tokens)
    rare = (expected < 5) & (expected > 0)
    often = expected >= 5
    observed, wanted = counts[often], expected[often]
    if expected[rare].sum() >= 5:
        observed, wanted = np.append(observed, counts[rare].sum()), np.append(wanted, expected[rare].sum())
    return float(stats.chisquare(observed, wanted * observed.sum() / wanted.sum()).pvalue)


@pytest.mark.parametrize(("vocab", "temperature"), [(3, 1.0), (64, 1.0), (65, 0.7), (300, 1.3), (300, 1.0)])
def test_tokens_follow_softmax(vocab: int, temperature: float):
    """Part of a block of the two-level draw, exactly one, slightly more than one, several."""
    logits = np.random.RandomState(vocab).standard_normal(vocab) * 1.5
    tokens = draw_many(SamplingConfig(temperature), logits)
    assert chi_square_p(tokens, softmax(logits / temperature)) > 1e-3


def test_the_check_sees_a_wrong_distribution():
    logits = np.random.RandomState(0).standard_normal(300) * 1.5
    tokens = draw_many(SamplingConfig(1.0), logits)
    assert chi_square_p(tokens, softmax(logits / 1.1)) < 1e-6


def test_rare_tokens_keep_their_odds():
    """A hundred tokens of 1e-5 each and one of 0.999: about 100 of 100,000 draws are rare."""
    logits = np.log(np.concatenate([[1 - 100e-5], np.full(100, 1e-5)]))
    tokens = draw_many(SamplingConfig(1.0), logits, count=100_000, seed=3)
    rare = np.sum(tokens > 0)
    assert 60 < rare < 140
    assert np.bincount(tokens)[1:].max() <= 8


def test_top_k():
    logits = np.random.RandomState(1).standard_normal(90) * 1.5
    best = np.argsort(logits)[-7:]
    wanted = np.zeros(90)
    wanted[best] = softmax(logits[best])
    assert chi_square_p(draw_many(SamplingConfig(1.0, top_k=7), logits), wanted) > 1e-3


@pytest.mark.parametrize("top_k", [0, 20])
def test_top_p(top_k: int):
    """The smallest set of most likely tokens whose probability (among the top k) reaches p."""
    logits = np.random.RandomState(2).standard_normal(90) * 1.5
    probabilities = softmax(logits)
    if top_k:
        probabilities[np.argsort(probabilities)[:-top_k]] = 0
        probabilities /= probabilities.sum()
    order = np.argsort(-probabilities)
    size = int(np.searchsorted(np.cumsum(probabilities[order]), 0.6)) + 1
    wanted = np.zeros(90)
    wanted[order[:size]] = probabilities[order[:size]] / probabilities[order[:size]].sum()
    assert 1 < size < (top_k or 90)
    assert chi_square_p(draw_many(SamplingConfig(1.0, top_k, 0.6), logits), wanted) > 1e-3


def test_a_tiny_top_p_is_greedy():
    logits = np.random.RandomState(3).standard_normal(90)
    assert set(draw_many(SamplingConfig(1.0, top_p=1e-6), logits, 100)) == {int(np.argmax(logits))}


@pytest.mark.parametrize("config", [SamplingConfig(0.7), SamplingConfig(1.3, top_k=5), SamplingConfig(0.5, top_p=0.5)])
def test_logprobs_and_entropies_are_those_of_the_whole_softmax_at_the_temperature(config: SamplingConfig):
    logits = np.random.RandomState(4).standard_normal((50, 130)).astype(np.float32) * 3
    tokens, logprobs, entropies = make_sample_token(config)(jnp.asarray(logits), randoms(50))
    wide = logits.astype(np.float64) / config.temperature
    table = wide - wide.max(1, keepdims=True)
    table -= np.log(np.exp(table).sum(1, keepdims=True))
    np.testing.assert_allclose(logprobs, np.take_along_axis(table, np.asarray(tokens)[:, None], 1)[:, 0], atol=1e-5)
    np.testing.assert_allclose(entropies, -(np.exp(table) * table).sum(1), atol=1e-5)


def test_greedy_reports_the_distribution_at_temperature_one():
    """Logits ln 3 and ln 1: p = 3/4, 1/4; logprob ln(3/4); entropy ln 4 - 3/4 ln 3."""
    token, logprob, entropy = make_sample_token(SamplingConfig(0.0))(jnp.log(jnp.asarray([[1.0, 3.0]])), randoms(1))
    assert int(token[0]) == 1
    assert float(logprob[0]) == pytest.approx(np.log(0.75), abs=1e-6)
    assert float(entropy[0]) == pytest.approx(np.log(4) - 0.75 * np.log(3), abs=1e-6)


def test_extreme_logits_stay_finite():
    """A peak of e^200 over the rest: certain, entropy 0; masked logits of -1e30 are never drawn."""
    logits = jnp.stack([jnp.zeros(70).at[3].set(200.0), jnp.full(70, -1e30).at[69].set(0.0)])
    for seed in range(20):
        tokens, logprobs, entropies = make_sample_token(SamplingConfig(1.0))(logits, randoms(2, seed))
        assert tokens.tolist() == [3, 69]
        np.testing.assert_allclose(logprobs, 0, atol=1e-6)
        np.testing.assert_allclose(entropies, 0, atol=1e-6)


def test_a_row_is_drawn_by_its_own_numbers():
    logits = jnp.asarray(np.random.RandomState(5).standard_normal((6, 100)), jnp.float32)
    sample_token = make_sample_token(SamplingConfig(1.0))
    tokens = sample_token(logits, randoms(6))[0]
    order = jnp.asarray([3, 0, 5, 1, 2, 4])
    np.testing.assert_array_equal(sample_token(logits[order], randoms(6)[order])[0], tokens[order])


def test_random_numbers_belong_to_key_and_token():
    """The same episode and token have the same numbers in any call; other tokens and other episodes have others."""
    prng = jax.random.key_data(jax.random.split(jax.random.key(0), 3))
    numbers = uniforms(prng, jnp.broadcast_to(jnp.arange(5), (3, 5)))
    assert numbers.shape == (5, 3, 2) and len(np.unique(numbers)) == 30
    later = uniforms(prng[::-1], jnp.broadcast_to(jnp.arange(2, 4), (3, 2)))
    np.testing.assert_array_equal(later[:, ::-1], numbers[2:4])


@pytest.mark.parametrize(
    ("kwargs", "complaint"),
    [
        ({"temperature": -1.0}, "temperature >= 0, got -1"),
        ({"top_k": -1}, "top_k >= 0, got -1"),
        ({"top_p": 0.0}, "0 < top_p <= 1, got 0"),
        ({"top_p": 1.1}, "0 < top_p <= 1, got 1.1"),
    ],
)
def test_bad_settings_are_refused(kwargs: dict, complaint: str):
    with pytest.raises(ValueError, match=complaint):
        SamplingConfig(**kwargs)
