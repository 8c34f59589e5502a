"""Demonstrations are what a policy would have heard and said; batches are a function of seed and pass."""

import pytest

from aem_jax.envs.echo import EchoEnv
from aem_jax.trajectory import Ending, Task
from aem_jax.warmstart import demonstrate, shuffled_batches

from .rollout.fakes import STOP, ByteChat


def test_a_demonstration_is_the_conversation():
    chat, said = ByteChat(), iter(["no", "yes"])
    task = Task("t", "echo", {"word": "yes", "length": 5})
    found = demonstrate(EchoEnv(), lambda result: next(said), task, chat, instruction="be brief", max_turns=5)
    assert found.won and found.ending is Ending.TERMINATED
    first, second = found.turns
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "say yes"}]
    assert first.observation_ids.tolist() == chat.prompt_ids(messages)
    assert second.observation_ids.tolist() == chat.delta_ids("1: no")
    assert [turn.response_ids.tolist() for turn in found.turns] == [
        [*chat.encode(word), STOP] for word in ("no", "yes")
    ]


def test_a_demonstration_that_runs_out_is_truncated():
    task = Task("t", "echo", {"word": "yes", "length": 50})
    found = demonstrate(EchoEnv(), lambda result: "no", task, ByteChat(), instruction="", max_turns=3)
    assert (len(found.turns), found.ending, found.won) == (3, Ending.TRUNCATED, False)


def test_each_pass_sees_everything_once_in_another_order():
    items = list(range(10))
    batches = shuffled_batches(items, 4, seed=1)
    seen = [next(batches) for _ in range(5)]
    flat = [x for batch in seen for x in batch]
    assert sorted(flat[:10]) == sorted(flat[10:]) == items and flat[:10] != flat[10:]
    again = shuffled_batches(items, 4, seed=1)
    assert [next(again) for _ in range(5)] == seen
    assert next(shuffled_batches(items, 4, seed=2)) != seen[0]


def test_nothing_to_learn_from_is_an_error():
    with pytest.raises(ValueError, match="expected at least one demonstration, got none"):
        next(shuffled_batches([], 4, seed=0))
