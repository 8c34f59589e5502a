"""An episode's samples depend on its key and tokens alone, and agree with a pass without a cache."""

from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conversation import (
    Episode,
    cacheless,
    cacheless_gap,
    decode_responses,
    extend_slots,
    play,
    script,
    start_episodes,
    token_gaps,
)
from small_policies import DEEP, GELU, GROUPED_TIED, MULTI_UNTIED, POST_NORM, SLIDING, numpy_params, numpy_tokens

from aem_jax.models import Policy, YarnScaling
from aem_jax.sampler import Sampler, SamplingConfig
from aem_jax.sampler.reshard import make_reshard
from aem_jax.sharding import MeshConfig, make_mesh

DEEP_SLIDING = replace(DEEP, sliding_windows=(5, 0, 3) * 3)
LAYERED = replace(
    DEEP,
    num_layers=3,
    sliding_windows=(5, 0, 5),
    sliding_rope_theta=300.0,
    unrotated_layers=(2,),
    norm_placement="both",
    zero_centered_norms=True,
    scaled_embedding=True,
    score_dim=5,
    rope_scaling=YarnScaling(4.0, 24, 1.2),
)
"""All options of layers that differ; rings of 16 positions, in which an episode of 96 tokens goes round six times."""
POLICY = Policy(GROUPED_TIED)
PARAMS = numpy_params(GROUPED_TIED)
STOPS = (5, 60)
TIGHT = 1e-5


@cache
def sampler(temperature: float = 1.0, capacity: int = 96, slack: int = 16) -> Sampler:
    return Sampler(POLICY, SamplingConfig(temperature), STOPS, capacity=capacity, slack=slack, windows=(32, 64))


def token_lists(episode: Episode) -> list[list[int]]:
    return [row.tolist() for row in episode.responses]


def same(first: Episode, second: Episode) -> None:
    """Equal tokens, and equal numbers up to the rounding of another shape."""
    assert token_lists(first) == token_lists(second)
    for one, other in ((first.logprobs, second.logprobs), (first.entropies, second.entropies)):
        np.testing.assert_allclose(np.concatenate(one), np.concatenate(other), atol=TIGHT)


def alone(key: int, **kwargs) -> Episode:
    episode = script(POLICY, key, **kwargs)
    play(sampler(), PARAMS, {0: episode}, slots=2)
    return episode


@pytest.mark.parametrize("config", [GROUPED_TIED, MULTI_UNTIED])
def test_greedy_equals_the_cacheless_forward(config):
    policy, params = Policy(config), numpy_params(config)
    greedy = Sampler(policy, SamplingConfig(0.0), (5,), capacity=64, slack=16)
    episodes = {slot: script(policy, slot, (6 + slot,), budget=14) for slot in range(3)}
    play(greedy, params, episodes, slots=3)
    for episode in episodes.values():
        ids = episode.observations[0].tolist()
        for token in episode.responses[0]:
            assert int(np.argmax(cacheless(policy, params, ids)[-1])) == token
            ids.append(int(token))
        assert len(episode.responses[0]) == 14 or ids[-1] == 5


@pytest.mark.parametrize("config", [GROUPED_TIED, DEEP, POST_NORM, GELU, SLIDING, DEEP_SLIDING, LAYERED])
def test_several_turns_have_the_logprobs_and_entropies_of_one_cacheless_pass(config):
    policy, params = Policy(config), numpy_params(config)
    s = Sampler(policy, SamplingConfig(1.0), (5,), capacity=96, slack=16)
    episodes = {slot: script(policy, slot + 1, (9, 4, 6)) for slot in range(4)}
    play(s, params, episodes, slots=4)
    for episode in episodes.values():
        # Both passes round. In nine narrow layers a change of the weights' last bits alone moves single tokens by 4e-5
        # and the median by 1e-6; a wrong position or mask moves them by 1e-2 and more.
        gaps = np.abs(token_gaps(policy, params, episode))
        assert np.median(gaps) < TIGHT / 4 and np.max(gaps) < 4 * TIGHT
    assert sum(len(row) for episode in episodes.values() for row in episode.responses) > 60  # a meaningful length


def test_rings_change_nothing():
    """Growing slots: prompts that are forked, chunks that are kept in part, some slots of a call, a truncation."""
    policy, params = Policy(LAYERED), numpy_params(LAYERED)
    played = []
    make = partial(Sampler, policy, SamplingConfig(1.0), (5,), capacity=96, slack=5)
    for grows in (False, True):
        s = make(grows=grows)
        episodes = {slot: script(policy, slot + 1, (11, 13, 12)) for slot in range(3)}
        prompts = extend_slots(
            s, params, s.init(2, 12), {0: numpy_tokens(LAYERED, (11,)), 1: numpy_tokens(LAYERED, (7,))}, 4
        )
        prng = np.stack([episode.prng for episode in episodes.values()])
        state = s.fork(s.init(3), prompts, np.asarray([0, 1, 0], np.int32), prng)
        for turn in range(3):
            observations = {slot: episode.observations[turn] for slot, episode in episodes.items()}
            state = extend_slots(s, params, state, observations, 5)
            state = decode_responses(s, params, state, episodes, 5)
            state = s.rewind(state, np.asarray([99, int(state.lengths[1]) - 4, 99], np.int32))
            tokens = numpy_tokens(LAYERED, (2, 3), turn)
            state = s.extend(params, state, tokens, np.asarray([3, 2], np.int32), np.asarray([2, 0], np.int32))
        played.append((episodes, state))
    (full, before), (rings, after) = played
    for slot, episode in full.items():
        same(episode, rings[slot])
    np.testing.assert_array_equal(before.lengths, after.lengths)
    assert before.lengths.max() > 4 * 16
    lengths = [jax.tree.leaves(layer.values)[0].shape[2] for layer in after.cache.layers]
    assert lengths == [16, 101, 16] and after.cache.length == before.cache.length == 101
    with pytest.raises(ValueError, match="expected a sampler whose slots have all of their tokens"):
        s.copy_prefix(after, np.asarray([-1, 0, -1]), np.zeros(3, np.int32))


def test_bfloat16_sampler_and_learner_agree():
    """Weights as the reshard lays them out against float32 masters in the learner's pass, both with bf16 activations.

    The order of sums differs, so single tokens are a few bf16 roundings apart.
    """
    policy = Policy(replace(GROUPED_TIED, dtype="bfloat16"))
    weights = make_reshard(policy, make_mesh(MeshConfig(), jax.devices()[:1]))(PARAMS)
    layers = weights["base"]["layers"]
    assert {layer["qkv"].dtype.name for layer in layers} == {"bfloat16"}
    assert {layer["mlp_norm"].dtype.name for layer in layers} == {weights["base"]["norm"].dtype.name} == {"float32"}
    s = Sampler(policy, SamplingConfig(1.0), (5,), capacity=96, slack=16)
    episodes = {slot: script(policy, slot + 1, (9, 4, 6)) for slot in range(4)}
    play(s, weights, episodes, slots=4)
    gaps = np.concatenate([token_gaps(policy, PARAMS, episode) for episode in episodes.values()])
    assert len(gaps) > 60
    assert np.mean(np.abs(gaps)) < 0.01 and np.max(np.abs(gaps)) < 0.1, (np.mean(np.abs(gaps)), np.max(np.abs(gaps)))


def test_temperature_divides_the_logits_of_the_recorded_distribution():
    warm = sampler(0.6)
    episode = script(POLICY, 3)
    play(warm, PARAMS, {1: episode}, slots=2)
    assert max(cacheless_gap(POLICY, PARAMS, episode, 0.6)) < 2 * TIGHT
    assert max(cacheless_gap(POLICY, PARAMS, episode, 1.0)) > 0.05


def test_extend_in_pieces_equals_in_one():
    ids = numpy_tokens(GROUPED_TIED, (13,))
    states = []
    for pieces in ([13], [4, 4, 4, 1], [1, 12], [5, 8]):
        state, at = start_episodes(sampler(), sampler().init(2), {1: script(POLICY, 0)}), 0
        for piece in pieces:
            state = extend_slots(sampler(), PARAMS, state, {1: ids[at : at + piece]}, 13)
            at += piece
        states.append(state)
    logits = [POLICY.logits(PARAMS, state.hidden[1]) for state in states]
    for state, row in zip(states, logits, strict=True):
        assert state.lengths.tolist() == [0, 13]
        np.testing.assert_allclose(row, logits[0], atol=1e-5)
    np.testing.assert_allclose(logits[0], cacheless(POLICY, PARAMS, ids)[-1], atol=1e-5)


def test_slot_and_neighbours_change_nothing():
    wanted = {key: alone(key) for key in (1, 2, 3)}
    for keys in ({0: 3, 1: 1, 2: 2}, {4: 1, 2: 2, 0: 3}, {5: 2}):
        episodes = {slot: script(POLICY, key) for slot, key in keys.items()}
        play(sampler(), PARAMS, episodes, slots=6)
        for episode in episodes.values():
            same(episode, wanted[episode.key])


@pytest.mark.parametrize(("chunks", "window"), [((3, 1), None), ((16, 5), 64), ((7, 16), 64), ((1, 16), None)])
def test_chunks_and_windows_change_nothing(chunks: tuple[int, int], window: int | None):
    episodes = {slot: script(POLICY, slot + 1) for slot in range(2)}
    play(sampler(), PARAMS, episodes, slots=2, chunks=chunks, window=window)
    for episode in episodes.values():
        same(episode, alone(episode.key))


def test_a_slot_is_as_good_as_new():
    """The second episode of a slot samples the same as in an empty slot."""
    state = play(sampler(), PARAMS, {0: script(POLICY, 8, (16, 9)), 1: script(POLICY, 9)}, slots=2)
    again = {0: script(POLICY, 2)}
    play(sampler(), PARAMS, again, slots=2, state=state)
    same(again[0], alone(2))


def test_forked_prompts_equal_own_prompts():
    """Two prompts, prefilled once in a separate small state, forked to five slots in two calls."""
    s = sampler()
    prompts = s.init(2, capacity=24)
    heads = {0: numpy_tokens(GROUPED_TIED, (17,), 1), 1: numpy_tokens(GROUPED_TIED, (9,), 2)}
    prompts = extend_slots(s, PARAMS, prompts, heads, 8, window=24)
    episodes = {
        slot: Episode(20 + slot, [heads[slot % 2], numpy_tokens(GROUPED_TIED, (5,), slot)]) for slot in range(5)
    }
    own = {slot: Episode(e.key, e.observations) for slot, e in episodes.items()}
    play(s, PARAMS, own, slots=5)

    state = s.init(5)
    for goes in ((0, 1, 4), (2, 3)):  # the second call leaves the slots of the first unchanged
        source, prng = np.full(5, -1, np.int32), np.zeros((5, 2), np.uint32)
        for slot in goes:
            source[slot], prng[slot] = slot % 2, episodes[slot].prng
        state = s.fork(state, prompts, jnp.asarray(source), jnp.asarray(prng), window=24)
        state = decode_responses(s, PARAMS, state, {slot: episodes[slot] for slot in goes}, 16)
    state = extend_slots(s, PARAMS, state, {slot: episode.observations[1] for slot, episode in episodes.items()}, 16)
    decode_responses(s, PARAMS, state, episodes, 16)
    for slot in range(5):
        same(episodes[slot], own[slot])
    # one prompt, three keys, three responses
    assert len({tuple(episodes[slot].responses[0]) for slot in (0, 2, 4)}) == 3


def test_stop_ids_end_a_response():
    """Every response ends with its first stop id, or at its budget."""
    episodes = {slot: script(POLICY, slot, (5,), budget=40) for slot in range(12)}
    play(sampler(), PARAMS, episodes, slots=12)
    ends = [episode.responses[0][-1] in STOPS for episode in episodes.values()]
    assert 3 < sum(ends) < 12 or all(ends)
    for episode in episodes.values():
        row = episode.responses[0]
        assert not set(row[:-1].tolist()) & set(STOPS)
        assert row[-1] in STOPS or len(row) == 40


def test_budgets_and_bookkeeping():
    s = sampler()
    episodes = {slot: script(POLICY, slot, (4 + slot,)) for slot in range(4)}
    state = start_episodes(s, s.init(5), episodes)
    state = extend_slots(s, PARAMS, state, {slot: e.observations[0] for slot, e in episodes.items()}, 8)
    before = jax.tree.map(np.asarray, state)
    budgets = jnp.asarray([0, 1, 3, 50, 0])
    state, out = s.decode(PARAMS, state, budgets, 6)
    assert out.tokens.shape == out.logprobs.shape == out.entropies.shape == (5, 6)
    for slot, budget in enumerate([0, 1, 3, 6, 0]):
        count = int(out.counts[slot])
        assert count == budget or (out.finished[slot] and count < budget)
        assert bool(out.finished[slot]) == (count > 0 and int(out.tokens[slot, count - 1]) in STOPS)
        for rows in (out.tokens, out.logprobs, out.entropies):
            assert not np.any(np.asarray(rows[slot, count:]))
        assert int(state.lengths[slot]) == before.lengths[slot] + count
        assert int(state.sampled[slot]) == count
    np.testing.assert_array_equal(state.hidden[0], before.hidden[0])


def test_idle_slots_are_untouched():
    """A slot with count 0 or budget 0 does not change, even at its very last position."""
    s = sampler(capacity=32)
    full, quiet, busy = script(POLICY, 1, (31, 1), budget=1), script(POLICY, 2), script(POLICY, 3)
    quiet.observations, wanted = quiet.observations[:1], Episode(2, quiet.observations[:1])
    play(s, PARAMS, {0: wanted}, slots=1)
    state = start_episodes(s, s.init(3), {0: full, 1: quiet, 2: busy})
    state = extend_slots(s, PARAMS, state, {0: full.observations[0], 1: quiet.observations[0]}, 16)
    for _ in range(2):
        state = extend_slots(s, PARAMS, state, {2: busy.observations[0]}, 16)
        state, out = s.decode(PARAMS, state, jnp.asarray([0, 0, 3]), 16)
        assert out.counts.tolist()[:2] == [0, 0] and not np.any(out.finished[:2])
    state = decode_responses(s, PARAMS, state, {0: full, 1: quiet}, 16)
    same(quiet, wanted)
    full.observations = full.observations[:1]
    assert max(cacheless_gap(POLICY, PARAMS, full)) < TIGHT


def test_zero_budgets_cost_and_change_nothing():
    s = sampler()
    state = extend_slots(s, PARAMS, s.init(2), {0: numpy_tokens(GROUPED_TIED, (4,))}, 8)
    hidden = np.asarray(state.hidden)
    state, out = s.decode(PARAMS, state, jnp.zeros(2, jnp.int32), 4)
    assert out.counts.tolist() == [0, 0] and state.lengths.tolist() == [4, 0]
    np.testing.assert_array_equal(state.hidden, hidden)


def test_rewind_forgets():
    """A rewound slot that is extended again equals one that never had the forgotten tokens."""
    s = sampler()
    ids, other = numpy_tokens(GROUPED_TIED, (12,), 1), numpy_tokens(GROUPED_TIED, (6,), 2)
    state = extend_slots(s, PARAMS, s.init(2), {0: ids, 1: ids}, 16)
    state = s.rewind(state, jnp.asarray([5, 99]))
    assert state.lengths.tolist() == [5, 12]
    state = extend_slots(s, PARAMS, state, {0: other}, 16)
    wanted = cacheless(POLICY, PARAMS, np.concatenate([ids[:5], other]))[-1]
    np.testing.assert_allclose(POLICY.logits(PARAMS, state.hidden[0]), wanted, atol=1e-5)


def test_a_copied_prefix_equals_an_own_one():
    """Slot 1 copies all of slot 0 and decodes; slot 2 copies a part and is extended; slot 3 is rewound."""
    s = sampler()
    ids, other = numpy_tokens(GROUPED_TIED, (12,), 1), numpy_tokens(GROUPED_TIED, (6,), 2)
    contexts = [ids, ids, np.concatenate([ids[:5], other]), np.concatenate([other[:2], ids])]
    own = {slot: Episode(40 + slot, [context]) for slot, context in enumerate(contexts)}
    play(s, PARAMS, own, slots=4)

    copied = {slot: Episode(episode.key, episode.observations) for slot, episode in own.items()}
    state = start_episodes(s, s.init(4), copied)
    state = extend_slots(s, PARAMS, state, {0: ids, 1: other[:3], 2: other, 3: other}, 16)
    state = s.copy_prefix(state, np.asarray([-1, 0, 0, -1]), np.asarray([99, 12, 5, 2]), window=32)
    assert state.lengths.tolist() == [12, 12, 5, 2]
    state = extend_slots(s, PARAMS, state, {2: other, 3: ids}, 16)
    decode_responses(s, PARAMS, state, copied, 16)
    for slot, episode in own.items():
        same(copied[slot], episode)
    assert own[0].responses[0].tolist() != own[1].responses[0].tolist()  # each has its own key
    for source in ([1, 0, -1, -1], [-1, 1, -1, -1]):
        with pytest.raises(ValueError, match="expected sources in the slot's own shard of 4 slots that are not copied"):
            s.copy_prefix(s.init(4), np.asarray(source), np.zeros(4, np.int32))


def test_windows():
    s = sampler()
    assert s.windows == (32, 64, 96)
    assert [s.window_for(length) for length in (0, 32, 33, 64, 65, 96)] == [32, 32, 64, 64, 96, 96]
    with pytest.raises(ValueError, match="at most 96 tokens a slot, got 97"):
        s.window_for(97)


def test_a_context_that_the_model_was_not_trained_for_is_warned_of(caplog: pytest.LogCaptureFixture):
    short = replace(GROUPED_TIED, max_positions=24)
    for config in short, replace(short, rope_scaling=YarnScaling(4.0, 24, 1.2)):
        for capacity in 24, 96, 97:
            Sampler(Policy(config), SamplingConfig(), STOPS, capacity=capacity, slack=8)
    limits = [record.getMessage().partition("; ")[0] for record in caplog.records]
    assert limits == [
        "expected a context of at most 24 tokens, which the model was trained for, got 96",
        "expected a context of at most 24 tokens, which the model was trained for, got 97",
        "expected a context of at most 96 tokens, which the model was trained for, got 97",
    ]


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="at least one stop id"):
        Sampler(POLICY, SamplingConfig(), (), capacity=32, slack=8)
    s = sampler()
    with pytest.raises(ValueError, match="chunks of at most 16 tokens .*got 17"):
        s.extend(PARAMS, s.init(1), jnp.zeros((1, 17), jnp.int32), jnp.ones(1, jnp.int32))
    with pytest.raises(ValueError, match="chunks of at most 16 tokens .*got 32"):
        s.decode(PARAMS, s.init(1), jnp.ones(1, jnp.int32), 32)
    with pytest.raises(ValueError, match="tokens a slot, got 97"):
        s.extend(PARAMS, s.init(1), jnp.zeros((1, 1), jnp.int32), jnp.ones(1, jnp.int32), window=97)
