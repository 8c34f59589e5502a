"""The states of one episode, worked out by hand; and which failed attempts count."""

from dataclasses import replace

import numpy as np
import pytest

from aem_jax.envs.protocol import Task
from aem_jax.rollout import RolloutConfig
from aem_jax.rollout.episode import Attempt, EnvReply, Episode
from aem_jax.trajectory import Ending

CONFIG = RolloutConfig(response_tokens=4, context_tokens=9, prompt_tokens=4)
ATTEMPT = Attempt(Task("t", "countdown", {}), 1, 2, np.zeros(2, np.uint32))


def chunk(*ids: int):
    count = len(ids)
    return (
        np.asarray(ids, np.int32),
        -np.asarray(ids, np.float32),
        np.ones(count, np.float32),
        np.zeros(count, np.int32),
    )


@pytest.mark.parametrize(
    ("context", "keep", "tokens", "cached", "observation_ids"),
    [
        ("append", 6, (9, 8), (1, 2, 3, 5, 6, 7, 9, 8), [9, 8]),
        ("window", 2, (9, 8, 7), (1, 2, 9, 8, 7), [1, 2, 9, 8, 7]),
    ],
)
def test_the_states_of_two_turns(context, keep, tokens, cached, observation_ids):
    start = Episode(ATTEMPT)
    observed = start.apply_reply(EnvReply(observation="first", prefill_tokens=(1, 2, 3)), context)
    assert start.observation is None and observed.needs_prefill and not observed.budget
    episode = observed.prefilled(CONFIG)
    assert (episode.cached_ids, episode.needs_prefill, episode.budget) == ((1, 2, 3), False, 4)
    episode = episode.append_sampled(chunk(5, 6), finished=False)
    assert (episode.budget, episode.num_tokens) == (2, 5)
    episode = episode.append_sampled(chunk(7), finished=True)
    assert (episode.budget, episode.num_tokens, episode.response_ids) == (0, 6, [5, 6, 7])

    reply = EnvReply(reward=0.5, response="one", observation="second", keep=keep, prefill_tokens=tokens)
    episode = episode.apply_reply(reply, context)
    (turn,) = episode.turns
    assert (turn.observation, turn.response, turn.reward) == ("first", "one", 0.5)
    assert turn.observation_ids.tolist() == [1, 2, 3] and turn.response_ids.tolist() == [5, 6, 7]
    assert turn.logprobs.tolist() == [-5.0, -6.0, -7.0] and episode.cached_ids == (1, 2, 3, 5, 6, 7)

    episode = episode.prefilled(CONFIG)
    assert episode.cached_ids == cached and episode.budget == min(4, 9 - len(cached))
    episode = episode.append_sampled(chunk(4), finished=False)
    episode = episode.apply_reply(EnvReply(response="two", ending=Ending.TERMINATED), context)
    assert episode.turns[1].observation == "second" and episode.turns[1].observation_ids.tolist() == observation_ids
    trajectory = episode.trajectory(Ending.TERMINATED, context, True, 1.0)
    assert (trajectory.group, trajectory.member, len(trajectory.turns), trajectory.retries) == (1, 2, 2, 0)


def test_a_response_that_nobody_received_leaves_no_experts():
    episode = Episode(ATTEMPT).apply_reply(EnvReply(prefill_tokens=(1, 2)), "tree").prefilled(CONFIG)
    episode = replace(episode.append_sampled(chunk(5), finished=True), experts=np.ones((9, 2), np.uint8))
    episode = episode.apply_reply(EnvReply(received=False, keep=1, prefill_tokens=(3,)), "tree")
    assert episode.experts is None and not episode.response and not episode.turns


def test_an_attempt_that_lost_its_server_twice_is_quarantined():
    once = ATTEMPT.retry(count_retry=False)
    twice = once.retry(count_retry=False)
    assert [attempt.quarantined for attempt in (ATTEMPT, once, twice)] == [False, False, True]
    counted = twice.retry(count_retry=True)
    assert (counted.retries, counted.server_losses, counted.quarantined) == (1, 2, True)
    assert Episode(counted).trajectory(Ending.ENV_ERROR, "append").retries == 3
