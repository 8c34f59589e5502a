"""The endpoint over HTTP, with a rollout that answers by script: keys, errors, streams, limits, cancelled requests."""

import http.client
import json
import threading
import urllib.parse
from contextlib import contextmanager

import numpy as np
import pytest

from aem_jax.envs.protocol import EnvError
from aem_jax.gateway.requests import SampledAs
from aem_jax.gateway.server import MAX_BODY_BYTES
from aem_jax.gateway.session import Limits

from . import agents
from .scripted import CHAT, STOP, EpisodesGateway, Rollout, sample

LIMITS = Limits(max_requests=4, context_tokens=64)
HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def gateway():
    gateway = EpisodesGateway(CHAT, SampledAs(), LIMITS)
    yield gateway
    gateway.close()


@contextmanager
def episode(gateway):
    key, session = gateway.open_session()
    yield key, session
    session.fail(EnvError("over"))
    gateway.close_session(key)


def post(gateway, key, body, path="/chat/completions"):
    return agents.post(path, body, key, gateway.url)


def refused(gateway, key, body, path="/chat/completions") -> agents.Refused:
    with pytest.raises(agents.Refused) as caught:
        post(gateway, key, body, path)
    assert set(caught.value.error) == {"message", "type", "param", "code"}
    return caught.value


def test_without_a_key_of_an_episode_nothing_is_answered(gateway):
    for key in ("", "episode-unknown", "x" * 10000):
        error = refused(gateway, key, {"messages": HELLO})
        assert error.status == 401 and error.error["code"] == "invalid_api_key"
    with episode(gateway) as (key, session), episode(gateway) as (other, _):
        session.fail(EnvError("over"))
        assert refused(gateway, key, {"messages": HELLO}).status == 401
        assert refused(gateway, key, {"reward": 1}, "/episode/reward").status == 401
        assert post(gateway, other, {"reward": 1}, "/episode/reward") == {"status": "ok"}
    assert refused(gateway, other, {"messages": HELLO}).status == 401


def test_other_paths(gateway):
    where = urllib.parse.urlsplit(gateway.url)

    def get(path, key=""):
        connection = http.client.HTTPConnection(where.hostname, where.port)
        connection.request("GET", path, headers={"Authorization": f"Bearer {key}"})
        response = connection.getresponse()
        return response.status, json.loads(response.read())

    assert get("/health") == (200, {"status": "ok"})
    assert get("/v1/models")[0] == 401
    with episode(gateway) as (key, _):
        assert get("/v1/models", key)[1]["data"][0]["id"] == "policy"
    status, body = get("/v1/completions")
    assert status == 404 and "expected one of POST /v1/chat/completions" in body["error"]["message"]
    assert get("/v1/chat/completions")[0] == 405


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({}, "messages", "messages must be a list of at least one message, got None"),
        ({"messages": []}, "messages", "got []"),
        ({"messages": [{"role": "robot"}]}, "messages[0].role", "must be one of system, developer, user"),
        ({"messages": [{"role": "user", "content": 7}]}, "messages[0].content", "must be a text"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages[0].content[0]",
            "got 'image_url'; the policy reads text alone",
        ),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id", "must be a text, got None"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{}]}]},
            "messages[0].tool_calls[0].function.name",
            "must be a text",
        ),
        ({"messages": HELLO, "temperature": 0.2}, "temperature", "must be 1, as the run samples, got 0.2"),
        ({"messages": HELLO, "temperature": "hot"}, "temperature", "must be a number"),
        ({"messages": HELLO, "temperature": 10**400}, "temperature", "must be a number"),
        ({"messages": HELLO, "top_p": 0.9}, "top_p", "must be 1"),
        ({"messages": HELLO, "n": 2}, "n", "must be 1, got 2"),
        ({"messages": HELLO, "logit_bias": {"1": 5}}, "logit_bias", "leave it out"),
        ({"messages": HELLO, "response_format": {"type": "json_object"}}, "response_format", "leave it out"),
        ({"messages": HELLO, "top_k": 3}, "top_k", "is not supported, got 3"),
        ({"messages": HELLO, "tool_choice": "required"}, "tool_choice", "must be 'auto' or 'none'"),
        (
            {"messages": HELLO, "parallel_tool_calls": False},
            "parallel_tool_calls",
            "must be true, got False; the",
        ),
        ({"messages": HELLO, "parallel_tool_calls": "no"}, "parallel_tool_calls", "must be true or false, got 'no'"),
        ({"messages": HELLO, "tools": [{"type": "function"}]}, "tools[0]", "must be {'type': 'function'"),
        ({"messages": HELLO, "max_tokens": 0}, "max_tokens", "at least 1, got 0"),
        ({"messages": HELLO, "stop": [""]}, "stop", "must be a text or a list of texts"),
        ({"messages": HELLO, "stream": 1}, "stream", "must be true or false"),
        (
            {"messages": [{"role": "user", "content": "x" * 80}]},
            "messages",
            "at most 63 tokens (--rollout.context-tokens)",
        ),
    ],
)
def test_what_cannot_be_served_is_refused(gateway, body, param, message):
    with episode(gateway) as (key, _):
        error = refused(gateway, key, body)
    assert error.status == 400 and error.error["param"] == param and message in error.error["message"]


def test_a_lenient_endpoint_answers_as_the_run_samples():
    gateway = EpisodesGateway(CHAT, SampledAs(lenient=True), LIMITS)
    try:
        with episode(gateway) as (key, session):
            Rollout(session, ["abc"])
            body = {"messages": HELLO, "temperature": 0.2, "top_k": 3, "tool_choice": "required"}
            body["parallel_tool_calls"] = False
            assert post(gateway, key, body)["choices"][0]["message"]["content"] == "abc"
    finally:
        gateway.close()


def test_bodies_that_are_no_requests(gateway):
    where = urllib.parse.urlsplit(gateway.url)

    def send(data):
        connection = http.client.HTTPConnection(where.hostname, where.port)
        connection.request("POST", "/v1/chat/completions", data, {"Authorization": f"Bearer {key}"})
        response = connection.getresponse()
        return response.status, json.loads(response.read())["error"]["message"]

    with episode(gateway) as (key, _):
        assert send(b"{") == (400, "expected a JSON body, got b'{'")
        assert send(b"[" * 100000)[0] == 400
        assert send(b"[]") == (400, "expected a JSON object, got list")
        assert send(b" " * (MAX_BODY_BYTES + 1))[0] == 413


def test_a_response_and_what_the_rollout_sees(gateway):
    with episode(gateway) as (key, session):
        rollout = Rollout(session, ["abcd", "ef"], closed=True)
        data = post(gateway, key, {"messages": HELLO, "max_tokens": 9, "logprobs": True})
        (choice,) = data["choices"]
        assert choice["message"] == {"role": "assistant", "content": "abcd"} and choice["finish_reason"] == "stop"
        tokens = [(entry["token"], entry["logprob"]) for entry in choice["logprobs"]["content"]]
        assert tokens == [(letter, -0.5) for letter in "abcd"] + [("", -0.5)]
        prompt = CHAT.prompt_ids(HELLO)
        assert data["usage"] == {"prompt_tokens": len(prompt), "completion_tokens": 5, "total_tokens": len(prompt) + 5}
        messages = [*HELLO, choice["message"], {"role": "user", "content": "go"}]
        assert post(gateway, key, {"messages": messages})["choices"][0]["message"]["content"] == "ef"
        rollout.join(20)
        first, second = rollout.results
        assert first.info["prompt_ids"] == prompt and first.info["max_tokens"] == 9
        response = [*CHAT.encode("abcd"), STOP]
        assert second.info["prompt_ids"] == [*prompt, *response, *CHAT.delta_ids("go")]
        assert (second.info["received"], second.info["num_received"]) == (True, None)
        assert (second.info["branches"], second.observation) == (0, "go")
        session.end(reward=0.5, success=True, score=None)
        last = rollout.event.result(20)
        assert (last.reward, last.terminated, last.won) == (0.5, True, True)


def test_each_response_has_an_id_of_its_own(gateway):
    """Clients merge messages of one id."""
    ids = []
    for stream in (False, True, False, True):  # in four episodes
        with episode(gateway) as (key, session):
            Rollout(session, ["abc"])
            answer = post(gateway, key, {"messages": HELLO, "stream": stream})
            ids += {chunk["id"] for chunk in events(answer)} if stream else [answer["id"]]
    assert len(ids) == len(set(ids)) == 4


def test_a_response_at_its_limit(gateway):
    with episode(gateway) as (key, session):
        Rollout(session, ["abcd"], closed=False)
        assert post(gateway, key, {"messages": HELLO})["choices"][0]["finish_reason"] == "length"


def events(lines):
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_a_stream(gateway):
    with episode(gateway) as (key, session):
        Rollout(session, ["abcdefgh"], pause=0.05)
        body = {"messages": HELLO, "stream": True, "stream_options": {"include_usage": True}, "logprobs": True}
        chunks = events(post(gateway, key, body))
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks[:-1]]
    assert deltas[0] == {"role": "assistant", "content": ""}
    pieces = [delta["content"] for delta in deltas if delta.get("content")]
    assert "".join(pieces) == "abcdefgh" and len(pieces) > 1  # as it is sampled
    assert chunks[-2]["choices"][0]["finish_reason"] == "stop"
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] == 9
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"} and len({c["id"] for c in chunks}) == 1
    logprobs = [entry["token"] for c in chunks[:-1] for entry in (c["choices"][0]["logprobs"] or {}).get("content", [])]
    assert "".join(logprobs) == "abcdefgh"


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_text_ends_the_response_at_once(gateway, stream):
    """The client goes on while the rollout is still at the response; its tokens behind the stop text do not count."""
    with episode(gateway) as (key, session):
        first = session.first()
        answers: list = []
        body = {"messages": HELLO, "stop": ["de"], "stream": stream}
        client = threading.Thread(target=lambda: answers.append(post(gateway, key, body)), daemon=True)
        client.start()
        first.result(20)
        after = session.without_response()
        for part in ("abc", "d", "efg"):
            session.sampled(np.array(CHAT.encode(part), np.int32), np.zeros(len(part), np.float32))
        client.join(20)  # the rollout has not finished the response
        if stream:
            deltas = [chunk["choices"][0]["delta"] for chunk in events(answers[0])]
            text = "".join(delta.get("content", "") for delta in deltas)
        else:
            text = answers[0]["choices"][0]["message"]["content"]
        assert text == "abc"
        messages = [*HELLO, {"role": "assistant", "content": "abc"}, {"role": "user", "content": "go"}]
        client = threading.Thread(
            target=lambda: answers.append(post(gateway, key, {"messages": messages})), daemon=True
        )
        client.start()
        info = after.result(20).info
        assert (info["received"], info["num_received"]) == (True, 5)
        assert info["prompt_ids"] == [
            *CHAT.prompt_ids(HELLO),
            *CHAT.encode("abcde"),
            *CHAT.delta_ids("go", closed=False),
        ]
        assert session.finish() is after  # the rollout ends the response late
        sample(session, "x")
        client.join(20)
        assert answers[1]["choices"][0]["message"]["content"] == "x"


def test_a_cancelled_request_frees_the_episode(gateway):
    with episode(gateway) as (key, session):
        agents.cancel({"messages": HELLO}, key, gateway.url)
        session.first().result(20)
        after = session.without_response()
        session.sampled(np.array(CHAT.encode("abc"), np.int32), np.zeros(3, np.float32))
        answers: list = []
        client = threading.Thread(target=lambda: answers.append(post(gateway, key, {"messages": HELLO})), daemon=True)
        client.start()
        info = after.result(20).info
        assert (info["received"], info["branches"]) == (False, 0)
        assert info["prompt_ids"] == CHAT.prompt_ids(HELLO)
        assert session.finish() is after
        sample(session, "x")
        client.join(20)
        assert answers[0]["choices"][0]["message"]["content"] == "x"
        assert len(session.transcript) == 1


def test_parallel_requests_are_branches_one_after_the_other(gateway):
    with episode(gateway) as (key, session):
        rollout = Rollout(session, ["abc", "def", "ghi"], pause=0.01)
        answers: list = []
        ask = lambda name: answers.append(post(gateway, key, {"messages": [{"role": "user", "content": name}]}))
        clients = [threading.Thread(target=ask, args=(name,), daemon=True) for name in "xyz"]
        for client in clients:
            client.start()
        for client in clients:
            client.join(20)
        assert {a["choices"][0]["message"]["content"] for a in answers} == {"abc", "def", "ghi"}
        assert [result.info["branches"] for result in rollout.results] == [0, 1, 1]


def test_an_episode_has_a_number_of_requests(gateway):
    with episode(gateway) as (key, session):
        Rollout(session, ["a"] * 4)
        for _ in range(4):
            post(gateway, key, {"messages": HELLO})
        error = refused(gateway, key, {"messages": HELLO})
        assert error.status == 403 and error.error["code"] == "episode_limit_reached"
        assert "--rollout.max-turns" in error.error["message"]


def test_a_prompt_has_room_for_a_response(gateway):
    with episode(gateway) as (key, session):
        Rollout(session, ["a"])
        post(gateway, key, {"messages": HELLO})
        error = refused(gateway, key, {"messages": [{"role": "user", "content": "x" * 62}]})
        assert error.error["code"] == "context_length_exceeded" and session.at_limit


def test_an_agent_that_shortens_its_messages_is_no_longer_at_the_limit(gateway):
    with episode(gateway) as (key, session):
        rollout = Rollout(session, ["a", "b"])
        post(gateway, key, {"messages": HELLO, "parallel_tool_calls": True})
        refused(gateway, key, {"messages": [{"role": "user", "content": "x" * 62}]})
        post(gateway, key, {"messages": HELLO})
        session.end(reward=1.0, success=True, score=None)
        rollout.join(20)
        last = rollout.event.result(20)
    assert (last.terminated, last.truncated, last.reward) == (True, False, 1.0)


def test_a_client_of_an_episode_that_ends_is_refused(gateway):
    with episode(gateway) as (key, session):
        errors: list = []

        def ask():
            try:
                post(gateway, key, {"messages": HELLO})
            except agents.Refused as error:
                errors.append(error.status)

        client = threading.Thread(target=ask, daemon=True)
        client.start()
        session.first().result(20)
        session.fail(EnvError("over"))
        client.join(20)
        assert errors == [401]


@pytest.mark.parametrize(
    "reward",
    [
        *({}, {"reward": "much"}, {"reward": float("nan")}, {"reward": 1e39}, {"reward": 10**400}),
        *({"reward": 1, "success": "yes"}, {"reward": 1, "score": []}),
    ],
)
def test_a_reward_is_checked(gateway, reward):
    with episode(gateway) as (key, session):
        assert refused(gateway, key, reward, "/episode/reward").status == 400
        assert session.reward is None
