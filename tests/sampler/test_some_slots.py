"""Calls on some slots, and responses that continue before the host reads whether they have ended."""

from functools import partial

import jax
import numpy as np
import pytest
from conversation import Episode, play, script, start_episodes
from small_policies import numpy_params

from aem_jax.models import ModelConfig, Policy
from aem_jax.sampler import CONTINUE, Sampler, SamplingConfig
from aem_jax.sharding import DECODE, MeshConfig, make_mesh, shardings

CONFIG = ModelConfig(64, 48, 80, 3, 4, 2, 16)
POLICY = Policy(CONFIG)
SLOTS = 16
NAMES = ("tokens", "logprobs", "entropies")


def play_in_parts(sampler: Sampler, params, episodes: dict[int, Episode], size: int, seed: int) -> None:
    """In each turn, slots are extended in random groups, then decode in groups, chunk by chunk.

    The device keeps their budgets. Their tokens are read at the end of the turn.
    """
    rng, state = np.random.default_rng(seed), start_episodes(sampler, sampler.init(SLOTS), episodes)
    budget = {slot: episode.budget for slot, episode in episodes.items()}
    for turn in range(3):
        order = rng.permutation(list(episodes)).tolist()
        groups = [order[at : at + 3] for at in range(0, len(order), 3)]
        for group in groups:
            padded = sampler.pad_slots(group, SLOTS, [size])
            assert padded is not None and set(group) <= set(padded.tolist()) and len(set(padded.tolist())) == size
            tokens, counts = np.full((size, 16), 7, np.int32), np.zeros(size, np.int32)
            for row, slot in enumerate(padded.tolist()):
                if slot in group:
                    observation = episodes[slot].observations[turn]
                    tokens[row, : len(observation)], counts[row] = observation, len(observation)
            state = sampler.extend(params, state, tokens, counts, padded, window=64)
        chunks = []
        for call in range(4):  # 4 × 4 tokens cover a budget of 12, with a call to spare
            for group in groups:
                padded = sampler.pad_slots(group, SLOTS, [size])
                assert padded is not None
                budgets = [(CONTINUE if call else budget[slot]) if slot in group else 0 for slot in padded.tolist()]
                state, out = sampler.decode(params, state, np.asarray(budgets, np.int32), 4, padded, window=64)
                chunks.append(({slot: row for row, slot in enumerate(padded.tolist()) if slot in group}, out))
        for slot, episode in episodes.items():
            parts = [(out, rows[slot], int(out.counts[rows[slot]])) for rows, out in chunks if slot in rows]
            for kept, name in zip((episode.responses, episode.logprobs, episode.entropies), NAMES, strict=True):
                kept.append(np.concatenate([np.asarray(getattr(out, name))[row, :count] for out, row, count in parts]))


@pytest.mark.parametrize("sizes", [None, (2, 2, 2), (1, 4, 2)])
def test_parts_of_the_slots_equal_all_slots(sizes: tuple[int, int, int] | None):
    params = numpy_params(CONFIG)
    make = partial(Sampler, POLICY, SamplingConfig(1.0), (5,), capacity=64, slack=16, windows=(32,))
    wanted = {slot: script(POLICY, slot) for slot in range(10)}
    play(make(), params, wanted, slots=SLOTS)
    if sizes is None:
        sampler, placed = make(), params
    else:
        mesh = make_mesh(MeshConfig(*sizes))
        sampler = make(mesh=mesh)
        placed = jax.device_put(params, shardings(mesh, POLICY.axes, DECODE))
    actual = {slot: script(POLICY, slot) for slot in range(10)}
    play_in_parts(sampler, placed, actual, size=12, seed=3)
    for slot, episode in wanted.items():
        assert [row.tolist() for row in actual[slot].responses] == [row.tolist() for row in episode.responses]
        for name in ("logprobs", "entropies"):
            ours, theirs = np.concatenate(getattr(actual[slot], name)), np.concatenate(getattr(episode, name))
            np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_what_is_left_of_a_budget_is_kept():
    sampler, params = Sampler(POLICY, SamplingConfig(1.0), (63,), capacity=64, slack=16), numpy_params(CONFIG)
    state = sampler.extend(params, sampler.init(3), np.ones((3, 2), np.int32), np.full(3, 2, np.int32))
    state, _ = sampler.decode(params, state, np.asarray([9, 3, 0], np.int32), 4)
    left = np.asarray(state.remaining)
    assert left[2] == 0 and left[1] == 0 and left[0] in (5, 0)
    before = np.asarray(state.lengths)
    state, out = sampler.decode(params, state, np.asarray([CONTINUE, CONTINUE, 0], np.int32), 16)
    assert int(out.counts[0]) <= left[0] and out.counts.tolist()[1:] == [0, 0]
    np.testing.assert_array_equal(state.lengths, before + out.counts)
    assert state.remaining.tolist() == [0, 0, 0]


def test_parts_are_dealt_to_the_devices_that_own_them():
    mesh = make_mesh(MeshConfig(2, 2, 2))
    sampler = Sampler(POLICY, SamplingConfig(1.0), (5,), capacity=64, slack=16, mesh=mesh)
    padded = sampler.pad_slots([0, 1, 15], SLOTS, [4, 8])
    assert padded is not None and padded.shape == (8,)  # two of them are one device's, so each computes two
    assert (padded.reshape(4, 2) // 4 == np.arange(4)[:, None]).all() and {0, 1, 15} <= set(padded.tolist())
    assert sampler.pad_slots([0, 1, 2, 15], SLOTS, [4, 8]) is None
