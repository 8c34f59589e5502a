"""Replayed environments are where they were; the episodes of others begin again, and count as no failure."""

from concurrent.futures import Future

import numpy as np
import pytest

from aem_jax.distributed import SINGLE_PROCESS
from aem_jax.envs.protocol import EnvError, LostError, StepResult, Task
from aem_jax.rollout import replay
from aem_jax.rollout.episode import Attempt, EnvReply, Episode, Observation
from aem_jax.rollout.sessions import SlotSessions
from aem_jax.trajectory import Turn

from .fakes import LocalPool, RoomPool

NONE = np.zeros(0, np.int32)
TURNS = (("start", "ab"), ("ooo", "abc"))
"""Observations of `CountdownEnv`, and responses to them. Next it answers "oooo"."""


def under_way(first: str = "start") -> Episode:
    """An episode after two turns, with the observation of the third."""
    attempt = Attempt(Task("t", "countdown", {"turns": 5, "first": "start"}), 0, 0, np.zeros(2, np.uint32))
    turns = [
        Turn(NONE, NONE, NONE, NONE, 0.0, True, first if text == "start" else text, response)
        for text, response in TURNS
    ]
    return Episode(attempt, tuple(turns), observation=Observation("oooo", 0, ()))


def play(pool: LocalPool, *episodes: Episode):
    sessions = SlotSessions(pool, SINGLE_PROCESS, len(episodes), 1)
    return replay.replay(sessions, dict(enumerate(episodes)))


def test_environments_get_the_recorded_responses_and_new_episodes_a_reset():
    pool = LocalPool(3)
    replies, resets = play(pool, under_way(), Episode(under_way().attempt), under_way())
    assert not replies and list(resets) == [1] and resets[1].result().observation == "start"
    assert [env.left for env in pool._envs] == [3, 5, 3]


def test_an_episode_begins_again_where_no_room_is_left(monkeypatch):
    monkeypatch.setattr(replay, "_PATIENCE_S", 0.05)
    pool = RoomPool(3, room=2)
    replies, resets = play(pool, *[under_way()] * 3)
    why = "expected room for its environment when the episode was replayed, got none beside the others"
    assert replies == {2: EnvReply(why, restarted=True)} and list(resets) == [2]
    assert pool.waits(2) and pool.holding == {0, 1}
    pool.release(0)
    assert resets[2].result(timeout=10).observation == "start"


def test_an_episode_begins_again_where_the_environment_answers_otherwise():
    """Its session is reset, so another one gets its room."""
    pool = RoomPool(2, room=1)
    replies, resets = play(pool, under_way("stars"), under_way())
    why = "expected the observation of turn 0 again when the episode was replayed, got 'start'"
    assert replies == {0: EnvReply(why, restarted=True)} and list(resets) == [0]
    assert pool.holding == {1} and pool.waits(0) and pool._envs[1].left == 3


@pytest.mark.parametrize("error", [EnvError, LostError])
def test_an_environment_that_fails_is_an_error(error):
    class Fails(LocalPool):
        def step(self, session: int, text: str) -> Future[StepResult]:
            call: Future[StepResult] = Future()
            call.set_exception(error("broken"))
            return call

    replies, resets = play(Fails(1), under_way())
    assert replies == {0: EnvReply("broken", lost=error is LostError)} and not resets
