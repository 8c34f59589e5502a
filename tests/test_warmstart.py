"""Demonstrations have the same ids as a policy's episodes; batches are a function of seed and pass."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from aem_jax.envs.protocol import EnvError, Task
from aem_jax.envs.testing.echo import EchoEnv
from aem_jax.rollout import RolloutConfig
from aem_jax.trajectory import Ending, Trajectory, Turn
from aem_jax.warmstart import (
    WarmstartConfig,
    demonstrate,
    demonstrations,
    fitting,
    shuffled_batches,
    warn_of_long_responses,
)

from .rollout.fakes import STOP, ByteChat


def settings(**changes: Any) -> RolloutConfig:
    return replace(RolloutConfig(), **{"instruction": "", "max_turns": 3, **changes})


@pytest.mark.parametrize(
    ("name", "value"), [("episodes", -1), ("steps", 0), ("batch_episodes", 0), ("expert_noise", 2)]
)
def test_sizes_are_checked_before_anything_is_played(name, value):
    with pytest.raises(ValueError, match=rf"expected warmstart\.{name} .* got {value}"):
        WarmstartConfig(**{"episodes": 4, name: value})


def test_a_demonstration_has_the_ids_of_the_conversation():
    chat, actions = ByteChat(), iter(["no", "yes"])
    task = Task("t", "echo", {"word": "yes", "length": 5})
    config = settings(instruction="be brief", max_turns=5)
    episode = demonstrate(EchoEnv(), lambda result: next(actions), task, chat, config)
    assert episode.success and episode.ending is Ending.TERMINATED
    first, second = episode.turns
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "say yes"}]
    assert first.observation_ids.tolist() == chat.prompt_ids(messages)
    assert second.observation_ids.tolist() == chat.delta_ids("1: no")
    assert [turn.response_ids.tolist() for turn in episode.turns] == [
        [*chat.encode(word), STOP] for word in ("no", "yes")
    ]


@pytest.mark.parametrize("count", [0, 1, 5])
def test_a_windowed_demonstration_has_the_prompt_of_each_turn(count: int):
    chat, actions = ByteChat(), iter(["a", "b", "yes"])
    task = Task("t", "echo", {"word": "yes", "length": 5})
    config = settings(max_turns=5, context="window", window_turns=count)
    episode = demonstrate(EchoEnv(), lambda result: next(actions), task, chat, config)
    assert episode.success and episode.context == "window"
    said = [("user", "say yes"), ("assistant", "a"), ("user", "1: a"), ("assistant", "b"), ("user", "2: b")]
    messages = [{"role": role, "content": text} for role, text in said]
    wanted = {0: [messages[0], messages[4]], 1: [messages[0], *messages[2:]], 5: messages}[count]
    assert episode.turns[0].observation_ids.tolist() == chat.prompt_ids(messages[:1])
    assert episode.turns[2].observation_ids.tolist() == chat.prompt_ids(wanted)


def test_a_demonstration_at_the_turn_limit_is_truncated():
    task = Task("t", "echo", {"word": "yes", "length": 50})
    episode = demonstrate(EchoEnv(), lambda result: "no", task, ByteChat(), settings())
    assert (len(episode.turns), episode.ending, episode.success) == (3, Ending.TRUNCATED, False)


def test_a_broken_task_gives_no_demonstration_and_does_not_affect_others():
    tasks = [Task(f"t{n}", "echo", {"word": "yes", "fault": {"kind": "raise"} if n == 1 else None}) for n in range(3)]
    show = lambda tasks: list(
        demonstrations(EchoEnv(), lambda task: lambda result: "yes", tasks, ByteChat(), settings())
    )
    episodes = show(tasks)
    assert [episode and episode.success for episode in episodes] == [True, None, True]
    with pytest.raises(EnvError, match="every task broke its environment, t1 first: RuntimeError: scripted fault"):
        show(tasks[1:2])


def test_responses_that_a_policy_cannot_finish_are_warned_of(caplog):
    task, actions = Task("t", "echo", {"word": "yes", "length": 5}), iter(["a", "four", "yes"])
    episodes = [demonstrate(EchoEnv(), lambda result: next(actions), task, ByteChat(), settings(max_turns=5))]
    warn_of_long_responses(episodes, 5)  # each response ends with a stop token
    assert not caplog.records
    warn_of_long_responses(episodes, 3)
    assert (
        "2 of the 3 demonstrated responses are longer than rollout.response_tokens = 3 (the longest has 5"
        in caplog.text
    )


def test_demonstrations_that_are_too_long_are_cut_only_where_none_fits(caplog):
    def episode(*sizes):
        turns = tuple(Turn(np.ones(n, int), np.ones(1, int), np.zeros(1), np.zeros(1), 0.0, True) for n in sizes)
        return Trajectory(Task("t", "k", {}), 0, 0, turns, Ending.TERMINATED, success=True)

    short, long, longest = episode(3, 2), episode(3, 9), episode(10, 2)
    assert fitting([long, short, longest], 8) == [short] and not caplog.records
    (cut,) = fitting([long, longest], 8)  # not even the first turn of the last fits
    assert (cut.turns, cut.ending, cut.success) == (long.turns[:1], Ending.TRUNCATED, True)
    assert "all 2 demonstrations are longer than rollout.context_tokens = 8 (the shortest has 14" in caplog.text
    assert fitting([], 8) == []
    windowed = replace(long, context="window")
    assert fitting([windowed], 10) == [windowed]  # each turn is a sequence of its own
    assert fitting([windowed], 8)[0].turns == long.turns[:1]


def test_each_pass_has_every_item_once_in_another_order():
    items = list(range(10))
    batches = shuffled_batches(items, 4, seed=1)
    seen = [next(batches) for _ in range(5)]
    flat = [x for batch in seen for x in batch]
    assert sorted(flat[:10]) == sorted(flat[10:]) == items and flat[:10] != flat[10:]
    repeated = shuffled_batches(items, 4, seed=1)
    assert [next(repeated) for _ in range(5)] == seen
    assert next(shuffled_batches(items, 4, seed=2)) != seen[0]


def test_no_demonstrations_are_an_error():
    with pytest.raises(ValueError, match="expected at least one demonstration, got none"):
        next(shuffled_batches([], 4, seed=0))


@pytest.mark.parametrize("name", ["expert_noise", "expert_habit"])
@pytest.mark.parametrize("share", [-0.1, 1.5])
def test_a_share_of_errors_outside_0_and_1_is_refused(name: str, share: float):
    settings: dict[str, Any] = {name: share}
    with pytest.raises(ValueError, match=rf"expected warmstart.{name} in \[0, 1\], got {share}"):
        WarmstartConfig(**settings)
