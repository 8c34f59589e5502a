"""Responses that are cut, cancelled or sampled in branches: sampler and learner agree on every token."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from aem_jax.batch import BatchLayout, collate
from aem_jax.rollout import Rollout
from aem_jax.trajectory import Ending
from tests.rollout.fakes import sampled
from tests.rollout.parity import check_parity

from .fakes import AGENT_TASKS, TREE, RequestChat, agents


def play(sampler, params, agent, **change):
    config = replace(TREE, **change)
    with agents(agent, config) as pool:
        return Rollout(sampler, RequestChat(), pool, config)(params, AGENT_TASKS, jax.random.key(7))


@pytest.mark.parametrize("mode", ["continuous", "lockstep"])
def test_a_cancelled_response_is_no_part_of_the_episode(sampler, params, mode):
    trajectories, stats = play(sampler, params, "cancels", mode=mode, max_turns=12)
    assert {t.ending for t in trajectories} == {Ending.TERMINATED} and stats.env_errors == 0
    played = {"t2": 2, "t5": 5, "t3": 3}
    # A response that is complete before its client closes the connection counts, in a branch of its own.
    late = [len(t.turns) - played[t.task.id] for t in trajectories]
    assert all(0 <= count <= played[t.task.id] for count, t in zip(late, trajectories, strict=True))
    assert sum(late) < sum(played[t.task.id] for t in trajectories)
    assert stats.sampled_tokens >= sum(len(turn.response_ids) for t in trajectories for turn in t.turns)
    batch = check_parity(params, trajectories)
    assert int(batch.segment_ids.max(axis=-1).sum()) == len(trajectories) + sum(late)


@pytest.mark.parametrize("mode", ["continuous", "lockstep"])
def test_a_response_ends_before_a_stop_text(sampler, params, mode):
    trajectories, _ = play(sampler, params, "stops", mode=mode)
    texts = [turn.response for t in trajectories for turn in t.turns]
    assert all(not set(text[:-1]) & set("aeiou") for text in texts)
    assert any(text and text[-1] in "aeiou" for text in texts)  # its own token is the last that counts
    check_parity(params, trajectories)


def test_what_follows_a_stop_text_does_not_depend_on_how_soon_it_is_noticed(sampler, params):
    """In chunks of one token, more or fewer of them were sampled behind it before the next request came."""
    expected, _ = play(sampler, params, "stops", mode="lockstep")
    for chunk in (1, 4):
        trajectories, _ = play(sampler, params, "stops", decode_chunk=chunk)
        assert sampled(trajectories) == sampled(expected)


@pytest.mark.parametrize("mode", ["continuous", "lockstep"])
def test_a_first_prompt_may_be_longer_than_a_row_of_the_prompt_cache(sampler, params, mode):
    trajectories, _ = play(sampler, params, "long_prompt", mode=mode)
    assert min(len(t.turns[0].observation_ids) for t in trajectories) > TREE.prompt_tokens
    assert {len(t.turns) for t in trajectories} == {2}
    check_parity(params, trajectories)


def test_branches_are_rows_and_each_response_is_learnt_from_once(sampler, params):
    trajectories, stats = play(sampler, params, "two_agents")
    assert stats.branches == 3 * len(trajectories)
    batch = check_parity(params, trajectories)
    assert int((batch.segment_ids.max(axis=-1)).sum()) == 2 * len(trajectories)
    forgetful, _ = play(sampler, params, "forgetful")
    batch = check_parity(params, forgetful)
    assert int((batch.segment_ids.max(axis=-1)).sum()) == sum(len(t.turns) for t in forgetful)


def test_a_continued_tree_has_the_rows_of_the_appended_context(sampler, params):
    trajectories, _ = play(sampler, params, "play")
    appended = [replace(t, context="append", turns=tuple(_appended(t.turns))) for t in trajectories]
    layout = BatchLayout(12, 1, 96, max_responses=72, max_trajectories=12)
    ours, theirs = collate(trajectories, layout), collate(appended, layout)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def _appended(turns):
    length = 0
    for turn in turns:
        yield replace(turn, observation_ids=turn.observation_ids[length:])
        length = len(turn.observation_ids) + len(turn.response_ids)
