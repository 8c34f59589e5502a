"""Episodes of agents behind the endpoint: the same tokens as the native environment, endings, and branches."""

import sys
import time
from dataclasses import replace

import jax
import numpy as np
import pytest

from aem_jax.envs.protocol import EnvError, LostError
from aem_jax.rollout import Rollout
from aem_jax.trajectory import Ending
from tests.rollout.fakes import CONFIG, TASKS, ByteChat, LocalPool, sampled

from .fakes import AGENT_TASKS, TREE, RequestChat, agents
from .scripted import sample


def play(sampler, params, pool, config=TREE):
    return Rollout(sampler, RequestChat(), pool, config)(params, AGENT_TASKS, jax.random.key(7))


@pytest.fixture(scope="module")
def native(sampler, params):
    trajectories, _ = Rollout(sampler, ByteChat(), LocalPool(12), CONFIG)(params, TASKS, jax.random.key(7))
    return trajectories


@pytest.mark.parametrize("mode", ["continuous", "lockstep"])
@pytest.mark.parametrize("agent", ["play", "as_streams"])
def test_a_conversation_samples_what_the_native_environment_samples(sampler, params, native, agent, mode):
    config = replace(TREE, mode=mode)
    with agents(agent, config) as pool:
        trajectories, stats = play(sampler, params, pool, config)
    assert sampled(trajectories) == sampled(native)
    assert (stats.env_errors, stats.branches, stats.rematched) == (0, 0, 0)
    for ours, theirs in zip(trajectories, native, strict=True):
        assert ours.total_reward == pytest.approx(theirs.total_reward)
        assert ours.ending is Ending.TERMINATED
        ids: list[int] = []
        for one, other in zip(ours.turns, theirs.turns, strict=True):
            ids += other.observation_ids.tolist()
            assert one.observation_ids.tolist() == ids  # the whole prompt
            ids += other.response_ids.tolist()
            np.testing.assert_allclose(one.logprobs, other.logprobs, atol=2e-5)
            np.testing.assert_allclose(one.entropies, other.entropies, atol=2e-5)


def test_a_command_gets_the_task_and_prints_the_reward(sampler, params, native):
    with agents("", command=f"{sys.executable} -m tests.gateway.agents") as pool:
        trajectories, _ = play(sampler, params, pool)
    assert sampled(trajectories) == sampled(native)
    assert [t.total_reward for t in trajectories] == pytest.approx([t.total_reward for t in native])


def test_agents_call_the_endpoint_directly_where_there_is_a_proxy(sampler, params, native, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "example.org")
    with agents("through_a_proxy") as pool:
        trajectories, _ = play(sampler, params, pool)
    assert sampled(trajectories) == sampled(native)


@pytest.mark.parametrize(
    ("agent", "why"),
    [
        ("crashes", "expected an agent to end with exit status 0, got exit status 1"),
        ("asks_nothing", "expected at least one request of the agent, got none"),
        ("hangs", "expected an agent to end in 1 s"),
        ("says_nothing", "expected a reward"),
    ],
)
def test_a_failed_agent_is_masked(sampler, params, agent, why):
    config = replace(TREE, max_retries=0)
    with agents(agent, config, timeout_s=1.0) as pool:
        trajectories, stats = play(sampler, params, pool, config)
    assert {t.ending for t in trajectories} == {Ending.ENV_ERROR} and len(trajectories) == 12
    assert why in stats.first_error


@pytest.mark.parametrize(("change", "turns"), [({"max_turns": 3}, {3}), ({"context_tokens": 40}, {3, 4, 5, 6})])
def test_an_episode_at_a_limit_is_truncated_even_if_the_agent_fails(sampler, params, change, turns):
    config = replace(TREE, **change)
    with agents("never_ends", config) as pool:
        trajectories, stats = play(sampler, params, pool, config)
    assert {t.ending for t in trajectories} == {Ending.TRUNCATED} and stats.env_errors == 0
    assert {len(t.turns) for t in trajectories} <= turns
    assert {t.total_reward for t in trajectories} == {0.0}


def at_limit(pool, task):
    """Plays one episode up to its limit of one request; returns its end."""
    pool.reset(0, {"task": task}).result(20)
    session = pool._played[0].session
    end = sample(session, "a")
    while not session.at_limit:
        time.sleep(0.01)
    return end


def test_a_reward_that_fails_at_a_limit_is_no_loss_of_the_policy():
    with agents("asks_too_often", replace(TREE, max_turns=1), reward="tests.gateway.agents:broken_judge") as pool:
        end = at_limit(pool, {})
        with pytest.raises(EnvError, match="--harness.reward failed: ConnectionError: the judge is down"):
            end.result(20)


def test_a_launcher_that_dies_at_a_limit_is_no_loss_of_the_policy():
    with agents("asks_too_often", replace(TREE, max_turns=1)) as pool:
        end = at_limit(pool, {"seconds": 60})
        assert pool._agents._process
        pool._agents._process.kill()
        with pytest.raises(LostError, match="the process that starts the agents has ended"):
            end.result(20)


def test_a_posted_reward_counts_for_the_last_response(sampler, params):
    with agents("posts_reward") as pool:
        trajectories, _ = play(sampler, params, pool)
    assert {(t.total_reward, t.success, t.score, len(t.turns)) for t in trajectories} == {(0.25, True, 0.5, 1)}


def test_an_agent_that_drops_history_begins_branches(sampler, params):
    with agents("forgetful") as pool:
        trajectories, stats = play(sampler, params, pool)
    assert stats.branches == sum(len(t.turns) - 1 for t in trajectories) > 0
    assert all(t.ending is Ending.TERMINATED for t in trajectories)
