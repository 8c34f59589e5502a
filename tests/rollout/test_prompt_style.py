"""Prompts in one message: composed from the episode so far, the same in demonstrations and in resumed runs."""

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import numpy as np
import pytest

from aem_jax.envs.prompt import Situation
from aem_jax.envs.protocol import EnvError, StepResult
from aem_jax.rollout import Rollout, group_attempts
from aem_jax.rollout.carry import from_record, record
from aem_jax.rollout.context import full_prompt
from aem_jax.trajectory import Trajectory
from aem_jax.warmstart import demonstrate

from .countdown import CountdownEnv
from .fakes import CONFIG, POLICY, TASKS, ByteChat, LocalPool
from .test_carry import CARRY, KEY, all_of, tasks
from .test_carry import play as play_carried
from .test_rollout import log_probabilities

SINGLE = replace(CONFIG, context="window", prompt_style="single", window_turns=2, prompt_tokens=40)


def admissible(left: int) -> list[str]:
    return ["go" * left, "stop"]


class ListingEnv(CountdownEnv):
    """Lists actions that depend on the turns left."""

    def reset(self, task: Mapping[str, Any]) -> StepResult:
        return self._with_list(super().reset(task))

    def step(self, action_text: str) -> StepResult:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self._with_list(super().step(action_text))

    def _with_list(self, result: StepResult) -> StepResult:
        return replace(result, info={**result.info, "admissible": admissible(self.left)})


def compose(situation: Situation) -> str:
    """All fields, told apart by their order alone."""
    past = [text for pair in situation.past for text in pair]
    return "-".join([situation.first, *past, "n" * situation.step, situation.observation, *situation.admissible])


def expected_ids(trajectory: Trajectory, turn: int, count: int) -> list[int]:
    """The prompt of a turn with the last `count` turns."""
    turns = trajectory.turns
    situation = Situation(
        first=turns[0].observation,
        past=[(past.observation, past.response) for past in turns[max(turn - count, 0) : turn]],
        step=turn + 1,
        observation=turns[turn].observation,
        admissible=admissible(trajectory.task.payload["turns"] - turn),
    )
    return ByteChat().prompt_ids([{"role": "user", "content": compose(situation)}])


@pytest.mark.parametrize("mode", ["lockstep", "continuous"])
def test_each_prompt_is_composed_from_the_episode_so_far(sampler, params, mode):
    config = replace(SINGLE, mode=mode)
    trajectories, _ = Rollout(sampler, ByteChat(), LocalPool(12, ListingEnv), config, compose=compose)(
        params, TASKS, jax.random.key(7)
    )
    for t in trajectories:
        assert t.turns[0].observation == "start" + "x" * (t.task.payload["turns"] % 3)  # not the prompt
        for k, turn in enumerate(t.turns):
            assert turn.observation_ids.tolist() == expected_ids(t, k, 2)
            ids = np.concatenate([turn.observation_ids, turn.response_ids])
            table = log_probabilities(params, ids)[len(turn.observation_ids) - 1 : -1]
            drawn = table[np.arange(len(turn.response_ids)), turn.response_ids]
            np.testing.assert_allclose(drawn, turn.logprobs, atol=2e-5)


def test_a_prompt_that_leaves_a_response_too_little_room_shows_fewer_turns(sampler, params):
    config = replace(SINGLE, context_tokens=52)
    limit = config.context_tokens - config.response_tokens
    rollout = Rollout(sampler, ByteChat(), LocalPool(12, ListingEnv), config, compose=compose)
    trajectories, _ = rollout(params, TASKS, jax.random.key(7))
    counts = set()
    for t in trajectories:
        for k, turn in enumerate(t.turns):
            fitting = [n for n in range(min(k, 2), -1, -1) if len(expected_ids(t, k, n)) <= limit]
            assert turn.observation_ids.tolist() == expected_ids(t, k, fitting[0] if fitting else 0)
            counts.add((min(k, 2), fitting[0] if fitting else None))
    assert {(2, 2), (2, 1)} <= counts


@pytest.mark.parametrize("style", ["chat", "single"])
def test_a_demonstration_has_the_prompts_of_a_policy_that_responds_the_same(sampler, params, style):
    config = replace(SINGLE, prompt_style=style, context_tokens=72)
    rollout = Rollout(sampler, ByteChat(), LocalPool(12, ListingEnv), config, compose=compose)
    trajectories, _ = rollout(params, TASKS, jax.random.key(7))
    for t in trajectories:
        again = partial(next, iter([turn.response for turn in t.turns]))
        shown = demonstrate(ListingEnv(), lambda result, again=again: again(), t.task, ByteChat(), config, compose)
        assert [turn.observation_ids.tolist() for turn in shown.turns] == [
            turn.observation_ids.tolist() for turn in t.turns
        ]
        assert [turn.observation for turn in shown.turns] == [turn.observation for turn in t.turns]


def test_a_resumed_run_goes_on_bit_for_bit(sampler):
    config = replace(SINGLE, carry_min_groups=CARRY.carry_min_groups, carry_max_age=CARRY.carry_max_age)
    attempts, versions = group_attempts(tasks, KEY, config), [POLICY.init(jax.random.key(step)) for step in range(3)]
    make = lambda: Rollout(sampler, ByteChat(), LocalPool(12, ListingEnv), config, compose=compose)
    resumed = lambda rollout, carried: (make(), from_record(json.loads(json.dumps(record(carried))), attempts))
    expected = all_of(play_carried(sampler, versions, config, rollout=make()))
    assert sum(len(carried["episodes"]) for *_, carried in expected) > 5
    assert all_of(play_carried(sampler, versions, config, rollout=make(), between=resumed)) == expected


def test_what_a_single_message_needs_is_missed(sampler, params):
    with pytest.raises(ValueError, match="set rollout.context to 'window'"):
        replace(CONFIG, prompt_style="single")
    with pytest.raises(ValueError, match="expected compose with rollout.prompt_style 'single', got None"):
        Rollout(sampler, ByteChat(), LocalPool(12), SINGLE)
    unlisted = Rollout(sampler, ByteChat(), LocalPool(12), SINGLE, compose=compose)
    with pytest.raises(EnvError, match="got None; start servers of --env.urls with --send-admissible"):
        unlisted(params, TASKS, jax.random.key(7))
    text = StepResult("a", info={"admissible": "go, stop"})
    with pytest.raises(EnvError, match="expected the environment's admissible actions, a list, .* got 'go, stop'"):
        full_prompt(ByteChat(), [], text, SINGLE, compose)
