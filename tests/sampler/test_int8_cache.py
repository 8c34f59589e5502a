"""An int8 KV cache of slots: the quantised arrays, the time of rounding, and the change of the policy."""

from dataclasses import replace
from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest
from conversation import cacheless, extend_slots, play, script, start_episodes, token_gaps
from small_policies import GROUPED_TIED, numpy_params, numpy_tokens

from aem_jax.models import Policy
from aem_jax.models.int8 import QuantizedArray, quantize
from aem_jax.sampler import Sampler, SamplerState, SamplingConfig

POLICY, PARAMS = Policy(GROUPED_TIED), numpy_params(GROUPED_TIED)
make = partial(Sampler, POLICY, stop_ids=(5,), capacity=96, slack=16, windows=(32, 64))
EXACT = make(SamplingConfig(1.0))
SAMPLER = make(SamplingConfig(1.0, cache="int8"))


def cache_of(state: SamplerState, slot: int, length: int) -> list[np.ndarray]:
    """Codes and scales of a slot's first tokens."""
    layers = state.cache.layers
    assert all(isinstance(part, QuantizedArray) for layer in layers for part in layer)
    keys, values = (
        [np.stack([np.asarray(leaf[slot]) for leaf in leaves]) for leaves in zip(*parts, strict=True)]
        for parts in zip(*layers, strict=True)
    )
    return [keys[0][..., :length], keys[1][..., :length], values[0][..., :length, :], values[1][..., :length]]


def same(first: list[np.ndarray], second: list[np.ndarray]) -> None:
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_chunk_is_exact_until_it_is_merged_and_quantised_once():
    ids = numpy_tokens(GROUPED_TIED, (13,))
    episode = {1: script(POLICY, 0)}
    states = [extend_slots(s, PARAMS, start_episodes(s, s.init(4), episode), {1: ids}, 16) for s in (SAMPLER, EXACT)]
    actual, wanted = states
    np.testing.assert_allclose(POLICY.logits(PARAMS, actual.hidden[1]), cacheless(POLICY, PARAMS, ids)[-1], atol=1e-5)
    keys, values = (jnp.stack(parts) for parts in zip(*wanted.cache.layers, strict=True))
    coded = [*quantize(keys[:, 1, ..., :13], 2), *quantize(values[:, 1, :, :13], 3)]
    for one, other in zip(cache_of(actual, 1, 13), coded, strict=True):
        np.testing.assert_allclose(np.asarray(one, np.float32), other, rtol=1e-5, atol=one.dtype == np.int8)
    before = cache_of(actual, 1, 13)
    actual = extend_slots(SAMPLER, PARAMS, actual, {1: ids[:4]}, 16)
    same(cache_of(actual, 1, 13), before)  # no second rounding
    moved = POLICY.logits(PARAMS, actual.hidden[1]) - cacheless(POLICY, PARAMS, np.concatenate([ids, ids[:4]]))[-1]
    assert 1e-5 < np.abs(moved).max() < 0.2  # merged tokens are read with their rounding


def test_the_parity_gap_is_small_and_is_there():
    episodes = {slot: script(POLICY, slot + 1, (9, 14, 6)) for slot in range(4)}
    play(SAMPLER, PARAMS, episodes, slots=4)
    gaps = np.abs(np.concatenate([token_gaps(POLICY, PARAMS, episode) for episode in episodes.values()]))
    assert len(gaps) > 80
    assert 1e-5 < gaps.mean() < 0.02 and gaps.max() < 0.2, (gaps.mean(), gaps.max())


def test_a_fork_copies_codes_and_scales():
    prompts = extend_slots(
        SAMPLER, PARAMS, SAMPLER.init(2, 32), {0: numpy_tokens(GROUPED_TIED, (8,)), 1: np.arange(5)}, 16
    )
    wanted = [cache_of(prompts, row, length) for row, length in ((0, 8), (1, 5))]
    state = SAMPLER.fork(SAMPLER.init(4), prompts, np.array([1, -1, 0, 1]), np.zeros((4, 2), np.uint32))
    assert state.lengths.tolist() == [5, 0, 8, 5]
    for slot, row in ((0, 1), (2, 0), (3, 1)):
        same(cache_of(state, slot, [8, 5][row]), wanted[row])
    assert not np.any(cache_of(state, 1, 8)[0])


def test_rewound_slots_go_on_from_what_they_kept():
    ids = numpy_tokens(GROUPED_TIED, (20,))
    fresh = lambda: start_episodes(SAMPLER, SAMPLER.init(4), {0: script(POLICY, 0)})
    state = extend_slots(SAMPLER, PARAMS, fresh(), {0: ids[:10]}, 16)
    state = extend_slots(SAMPLER, PARAMS, state, {0: ids[:7]}, 16)
    state = extend_slots(SAMPLER, PARAMS, SAMPLER.rewind(state, np.array([10, 96, 96, 96])), {0: ids[10:]}, 16)
    wanted = extend_slots(SAMPLER, PARAMS, extend_slots(SAMPLER, PARAMS, fresh(), {0: ids[:10]}, 16), {0: ids[10:]}, 16)
    same(cache_of(state, 0, 20), cache_of(wanted, 0, 20))
    np.testing.assert_array_equal(state.hidden[0], wanted.hidden[0])


def test_some_slots_equal_all_slots():
    """Decoding some slots, in a different order, equals a call on all. The codes of other slots stay unchanged."""
    ids = {slot: numpy_tokens(GROUPED_TIED, (6 + slot,), slot) for slot in range(4)}
    fresh = lambda: extend_slots(
        SAMPLER, PARAMS, start_episodes(SAMPLER, SAMPLER.init(4), {slot: script(POLICY, slot) for slot in ids}), ids, 16
    )
    full, decoded = SAMPLER.decode(PARAMS, fresh(), np.array([8, 0, 0, 8]), 16)
    state = fresh()
    others = cache_of(state, 1, 7) + cache_of(state, 2, 8)
    part, out = SAMPLER.decode(PARAMS, state, np.array([8, 8]), 16, np.array([3, 0]))
    assert out.tokens.tolist() == [decoded.tokens[3].tolist(), decoded.tokens[0].tolist()]
    np.testing.assert_allclose(out.logprobs[0], decoded.logprobs[3], atol=1e-5)
    assert part.lengths.tolist() == full.lengths.tolist()
    same(cache_of(part, 1, 7) + cache_of(part, 2, 8), others)
    for slot in (0, 3):
        for one, other in zip(*(cache_of(state, slot, int(full.lengths[slot])) for state in (part, full)), strict=True):
            np.testing.assert_allclose(np.asarray(one, np.float32), other, rtol=1e-4, atol=one.dtype == np.int8)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bytes(dtype: str):
    # 3 layers, 2 key heads, 2 slots of 96 + 16 places, keys and values: 16 codes and a float32 instead of 16 numbers
    config = replace(GROUPED_TIED, dtype=dtype)
    make = partial(Sampler, Policy(config), stop_ids=(5,), capacity=96, slack=16)
    tokens = 2 * 3 * 2 * 2 * (96 + 16)
    assert make(SamplingConfig(cache="int8")).abstract(2).cache.num_bytes == tokens * (16 + 4)
    assert make(SamplingConfig()).abstract(2).cache.num_bytes == tokens * 16 * jnp.dtype(dtype).itemsize
    assert make(SamplingConfig()).abstract(2).cache.length == 112
