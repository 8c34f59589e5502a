"""Real servers are killed, frozen and made to send malformed replies during a rollout: the step completes, affected
episodes are retried, and every token is the one that an undisturbed rollout samples.
"""

import os
import signal
from dataclasses import replace

import jax
import numpy as np
import pytest

from aem_jax.envs.protocol import Task
from aem_jax.envs.serving.pool import EnvPool, PoolConfig
from aem_jax.rollout import Rollout, RolloutConfig
from aem_jax.sampler import Sampler, SamplingConfig
from aem_jax.trajectory import Ending

from .fakes import POLICY, STOP, ByteChat, sampled

CONFIG = RolloutConfig(
    groups_per_step=4, group_size=2, num_slots=8, num_cohorts=2, max_turns=6, response_tokens=5, context_tokens=160,
    prompt_tokens=24, decode_chunk=5, extend_buckets=(16,), windows=(), max_retries=3,
)  # fmt: skip
POOL = PoolConfig(num_servers=2, sessions_per_server=4, reset_deadline_s=10.0, step_deadline_s=3.0, first_pause_s=0.05)
WORDS = ("ab", "cde", "fg", "hi")


@pytest.fixture(scope="module")
def play():
    params = POLICY.init(jax.random.key(0))
    sampler = Sampler(POLICY, SamplingConfig(), [STOP], capacity=160, slack=CONFIG.slack)

    def run(pool, tasks, config=CONFIG):
        return Rollout(sampler, ByteChat(), pool, config)(params, tasks, jax.random.key(3))

    return run


def tasks(fault_of=lambda word: None) -> list[Task]:
    faults = {word: fault_of(word) for word in WORDS}
    return [Task(w, "echo", {"word": w, "length": 4, **({"fault": faults[w]} if faults[w] else {})}) for w in WORDS]


class Disturbed:
    """A pool that disturbs its servers at the n-th step."""

    def __init__(self, pool: EnvPool, at: int, disturb):
        self._pool, self._at, self._disturb, self.steps = pool, at, disturb, 0
        self.capacity = pool.capacity
        self.reset, self.server_of = pool.reset, pool.server_of

    def step(self, session, text):
        self.steps += 1
        if self.steps == self._at:
            self._disturb(self._pool)
        return self._pool.step(session, text)


@pytest.fixture(scope="module")
def undisturbed(play):
    with EnvPool(POOL, ("echo", {})) as pool:
        trajectories, stats = play(pool, tasks())
    assert stats.retries == 0
    return trajectories


def kill_one(pool):
    os.kill(pool.server_pids[0], signal.SIGKILL)


def kill_all(pool):
    for pid in pool.server_pids:
        os.kill(pid, signal.SIGKILL)


def freeze_one(pool):
    os.kill(pool.server_pids[1], signal.SIGSTOP)


@pytest.mark.parametrize("disturb", [kill_one, kill_all, freeze_one])
def test_killed_and_frozen_servers_do_not_change_the_samples(play, undisturbed, disturb):
    with EnvPool(POOL, ("echo", {})) as pool:
        trajectories, stats = play(Disturbed(pool, 11, disturb), tasks())
        assert sum(pool.stats().restarts) >= 1
    assert stats.retries >= 1 and stats.env_errors == 0
    assert sampled(trajectories) == sampled(undisturbed)
    for trajectory, expected in zip(trajectories, undisturbed, strict=True):
        assert (trajectory.ending, trajectory.success) == (expected.ending, expected.success)
        assert trajectory.total_reward == expected.total_reward
        for a, b in zip(trajectory.turns, expected.turns, strict=True):
            np.testing.assert_allclose(a.logprobs, b.logprobs, atol=2e-5)


@pytest.mark.parametrize("kind", ["rubbish", "broken", "exit"])
def test_malformed_replies_do_not_change_the_samples(play, undisturbed, kind, tmp_path):
    def fault(word):
        return {"kind": kind, "step": 2, "once": str(tmp_path / kind)} if word == "cde" else None

    with EnvPool(POOL, ("echo", {})) as pool:
        trajectories, stats = play(pool, tasks(fault))
    assert stats.retries >= 1 and stats.env_errors == 0
    assert sampled(trajectories) == sampled(undisturbed)


def test_a_task_that_always_breaks_is_masked_and_others_are_unaffected(play, undisturbed):
    """The group is masked after the retries. An exception ends no server, so the other groups are not affected."""
    with EnvPool(POOL, ("echo", {})) as pool:
        trajectories, stats = play(pool, tasks(lambda word: {"kind": "raise", "step": 1} if word == "fg" else None))
        assert sum(pool.stats().restarts) == 0
    assert [t.ending is Ending.ENV_ERROR for t in trajectories] == [t.task.id == "fg" for t in trajectories]
    assert stats.env_errors == 2 and stats.retries == 2 * CONFIG.max_retries
    rest = [i for i, t in enumerate(trajectories) if t.task.id != "fg"]
    assert [sampled(trajectories)[i] for i in rest] == [sampled(undisturbed)[i] for i in rest]


@pytest.mark.parametrize(("kind", "step_deadline_s"), [("exit", 3.0), ("hang", 0.5), ("rubbish", 3.0)])
def test_a_task_that_always_kills_its_server_is_masked_and_others_are_unaffected(
    play, undisturbed, kind, step_deadline_s
):
    """Both episodes of a group kill their server at every attempt; only these two are masked in the end."""
    pool_config = replace(POOL, step_deadline_s=step_deadline_s)
    with EnvPool(pool_config, ("echo", {})) as pool:
        trajectories, stats = play(pool, tasks(lambda word: {"kind": kind, "step": 2} if word == "fg" else None))
        assert sum(pool.stats().restarts) >= CONFIG.max_retries
    assert [t.ending is Ending.ENV_ERROR for t in trajectories] == [t.task.id == "fg" for t in trajectories]
    assert stats.env_errors == 2
    rest = [i for i, t in enumerate(trajectories) if t.task.id != "fg"]
    assert [sampled(trajectories)[i] for i in rest] == [sampled(undisturbed)[i] for i in rest]


def test_max_retries_zero_masks_at_once(play):
    with EnvPool(POOL, ("echo", {})) as pool:
        broken = tasks(lambda word: {"kind": "raise", "step": 1} if word == "fg" else None)
        _, stats = play(pool, broken, replace(CONFIG, max_retries=0))
    assert (stats.retries, stats.env_errors) == (0, 2)
