"""A plain endpoint on the slots of a rollout: conversations keep their cache, give way to others, and end."""

import threading
from contextlib import contextmanager
from dataclasses import replace

import jax
import numpy as np
import pytest

from aem_jax.gateway.conversations import Conversations, Endless
from aem_jax.gateway.requests import SampledAs
from aem_jax.gateway.server import Gateway, bind
from aem_jax.gateway.session import Limits
from aem_jax.rollout import Rollout
from aem_jax.sampler import Sampler, SamplingConfig
from tests.rollout.fakes import CONFIG, POLICY, STOP

from . import agents
from .fakes import TREE, RequestChat

LIMITS = Limits(max_requests=3, context_tokens=96)
KEY = "secret"


@pytest.fixture(scope="module")
def greedy():
    return Sampler(POLICY, SamplingConfig(temperature=0.0), [STOP], capacity=96, slack=CONFIG.slack, windows=(32,))


@contextmanager
def endpoint(sampler, params, slots: int, key: str = KEY):
    conversations = Conversations(RequestChat(), LIMITS, slots, key)
    rollout = Rollout(sampler, RequestChat(), conversations, replace(TREE, num_slots=slots, group_size=1))
    gateway = Gateway(conversations, SampledAs(temperature=0.0), bind("localhost"))
    assert gateway.url.startswith("http://localhost:")  # as it was given: agents' NO_PROXY names it, too
    conversations.loop = gateway.loop
    attempts = Endless(lambda number: np.asarray(jax.random.key_data(jax.random.key(number))))
    thread = threading.Thread(target=rollout.serve, args=(params, attempts, lambda: conversations.is_closed))
    thread.start()
    try:
        yield gateway, rollout
    finally:
        gateway.loop.call_soon_threadsafe(conversations.close)
        thread.join(20)
        gateway.close()
        assert not thread.is_alive()


def ask(gateway, messages, key=KEY):
    return agents.post("/chat/completions", {"messages": messages}, key, gateway.url)["choices"][0]["message"]


def talk(gateway, name: str, requests: int) -> list[str]:
    messages, answers = [{"role": "user", "content": name}], []
    for _ in range(requests):
        message = ask(gateway, messages)
        answers.append(message["content"])
        messages += [message, {"role": "user", "content": "go"}]
    return answers


def talk_at_once(gateway, names) -> dict[str, list[str]]:
    answers: dict[str, list[str]] = {}
    ask_one = lambda name: answers.update({name: talk(gateway, name, 3)})
    threads = [threading.Thread(target=ask_one, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return answers


def test_conversations_in_turn_and_at_once_get_the_same_answers(greedy, params):
    names = ["one", "two", "three", "four", "five"]
    with endpoint(greedy, params, slots=5) as (gateway, _):
        alone = {name: talk(gateway, name, 3) for name in names}
    with endpoint(greedy, params, slots=5) as (gateway, _):
        assert talk_at_once(gateway, names) == alone
    assert len({tuple(answers) for answers in alone.values()}) > 1


def test_more_conversations_than_slots_take_turns(greedy, params):
    names = ["one", "two", "three", "four", "five"]
    with endpoint(greedy, params, slots=2) as (gateway, _):
        assert {name: len(answers) for name, answers in talk_at_once(gateway, names).items()} == dict.fromkeys(names, 3)


def test_a_conversation_keeps_its_slot_until_it_is_long(greedy, params):
    with endpoint(greedy, params, slots=4) as (gateway, rollout):
        slots = rollout._groups[0].episodes
        turns = lambda: sorted(len(episode.turns) + bool(episode.response) for episode in slots if episode is not None)
        first = talk(gateway, "one", 2)
        assert talk(gateway, "one", 2) == first  # the first request again: another conversation
        assert sum(turns()) == 4
        talk(gateway, "one", 5)  # the fourth request takes a new slot, with all of its messages


def test_a_key_may_be_needed(greedy, params):
    with endpoint(greedy, params, slots=2) as (gateway, _):
        for key in ("", "other"):
            with pytest.raises(agents.Refused, match="expected the endpoint's key"):
                ask(gateway, [{"role": "user", "content": "one"}], key)
        with pytest.raises(agents.Refused, match="does not train"):
            agents.post("/episode/reward", {"reward": 1}, KEY, gateway.url)
    with endpoint(greedy, params, slots=2, key="") as (gateway, _):
        assert ask(gateway, [{"role": "user", "content": "one"}], "")["role"] == "assistant"


def test_requests_that_are_refused_or_cancelled_free_their_slots(greedy, params):
    with endpoint(greedy, params, slots=2) as (gateway, _):
        for _ in range(5):
            agents.cancel({"messages": [{"role": "user", "content": "one"}]}, KEY, gateway.url)
            with pytest.raises(agents.Refused, match="at most 95 tokens"):
                ask(gateway, [{"role": "user", "content": "x" * 100}])
        assert talk(gateway, "one", 2)
