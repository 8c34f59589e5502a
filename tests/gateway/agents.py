"""Agents for tests: each function plays one episode through the endpoint, with the standard library alone."""

import http.client
import json
import os
import random
import signal
import socket
import sys
import time
import urllib.parse
import urllib.request
import zlib
from typing import Any

from tests.rollout.countdown import CountdownEnv


class Refused(Exception):
    """A response that is an error.

    Attributes:
        status: HTTP status.
        error: OpenAI's error.
    """

    def __init__(self, status: int, error: dict[str, Any]):
        super().__init__(f"{status}: {error}")
        self.status, self.error = status, error


def post(path: str, body: Any, key: str | None = None, url: str | None = None) -> Any:
    """Sends a request to the endpoint."""
    where = urllib.parse.urlsplit(url or os.environ["OPENAI_BASE_URL"])
    connection = http.client.HTTPConnection(where.hostname or "", where.port, timeout=120)
    headers = {"Authorization": f"Bearer {os.environ['OPENAI_API_KEY'] if key is None else key}"}
    connection.request("POST", where.path + path, json.dumps(body), headers)
    response = connection.getresponse()
    text = response.read().decode()
    connection.close()
    if body.get("stream") and response.status == 200:
        return [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    data = json.loads(text)
    if response.status != 200:
        raise Refused(response.status, data["error"])
    return data


def chat(messages: list[Any], **settings: Any) -> dict[str, Any]:
    """The message that the policy answers."""
    return post("/chat/completions", {"model": "policy", "messages": messages, **settings})["choices"][0]["message"]


def play(task: Any, answer=chat) -> float:
    """Plays the game of `CountdownEnv` as a conversation."""
    env = CountdownEnv()
    result, total = env.reset(task), 0.0
    messages = [{"role": "user", "content": result.observation}]
    while not result.done:
        message = answer(messages)
        result = env.step(message["content"])
        total += result.reward
        messages += [message, {"role": "user", "content": result.observation}]
    return total


def through_a_proxy(task: Any) -> float:
    """Plays with a client that reads the proxy of its environment, as those of `openai` and `requests` do."""

    def answer(messages: list[Any]) -> dict[str, Any]:
        url, headers = os.environ["OPENAI_BASE_URL"], {"Authorization": f"Bearer {os.environ['OPENAI_API_KEY']}"}
        data = json.dumps({"messages": messages}).encode()
        with urllib.request.urlopen(urllib.request.Request(f"{url}/chat/completions", data, headers)) as response:
            return json.load(response)["choices"][0]["message"]

    return play(task, answer)


def as_streams(task: Any) -> float:
    """The same, with streamed responses."""

    def answer(messages: list[Any]) -> dict[str, Any]:
        events = post("/chat/completions", {"model": "policy", "messages": messages, "stream": True})
        assert events.pop() == "[DONE]"
        deltas = [json.loads(event)["choices"][0]["delta"] for event in events]
        return {"role": "assistant", "content": "".join(delta.get("content") or "" for delta in deltas)}

    return play(task, answer)


def forgetful(task: Any) -> float:
    """Sends the first and the latest message alone, so that every request begins a branch."""
    return play(task, lambda messages: chat([messages[0], *messages[-1:]] if len(messages) > 1 else messages))


def long_prompt(task: Any) -> float:
    """A first prompt that is longer than a row of the prompt cache."""
    messages = [{"role": "user", "content": "abcdefgh" * (2 + task["turns"])}]
    for _ in range(2):
        messages += [chat(messages), {"role": "user", "content": "go"}]
    return 1.0


def two_agents(task: Any) -> float:
    """Two conversations in one episode, in turns."""
    first, second = ([{"role": "user", "content": name}] for name in ("one", "two"))
    for _ in range(2):
        for messages in (first, second):
            messages += [chat(messages), {"role": "user", "content": "go"}]
    return 1.0


def cancels(task: Any) -> float:
    """Gives up every other request before its response."""

    def answer(messages: list[Any]) -> dict[str, Any]:
        cancel({"messages": messages})
        return chat(messages)

    return play(task, answer)


def cancel(body: Any, key: str | None = None, url: str | None = None) -> None:
    """Sends a request, and closes the connection."""
    where = urllib.parse.urlsplit(url or os.environ["OPENAI_BASE_URL"])
    data = json.dumps(body).encode()
    with socket.create_connection((where.hostname, where.port)) as connection:
        head = (
            f"POST {where.path}/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n"
            f"Authorization: Bearer {key or os.environ['OPENAI_API_KEY']}\r\n\r\n"
        )
        connection.sendall(head.encode() + data)
        time.sleep(0.005)


def stops(task: Any) -> float:
    """Wants the responses up to their first vowel."""
    return play(task, lambda messages: chat(messages, stop=["a", "e", "i", "o", "u"]))


def chaotic(task: Any) -> float:
    """Plays with its own name in every message, and may be killed, frozen, cut off or crash at any request.

    The reward is a checksum of what it got.
    """
    rng = random.Random(f"{task['seed']}/{os.getpid()}")
    messages, got = [{"role": "user", "content": task["name"]}], []
    for _ in range(task["turns"]):
        fate = rng.random()
        if fate < 0.02:
            os.kill(os.getpid(), signal.SIGKILL)
        elif fate < 0.03:
            os.kill(os.getpid(), signal.SIGSTOP)
        elif fate < 0.05:
            raise RuntimeError("broken on purpose")
        elif fate < 0.25:
            cancel({"messages": messages})
        elif fate < 0.35:
            messages = messages[-1:]
        message = chat(messages, **({"max_tokens": 2} if rng.random() < 0.3 else {}))
        got.append(message["content"])
        messages += [message, {"role": "user", "content": task["name"]}]
    return float(zlib.crc32(" ".join(got).encode()) % 1000)


def crashes(task: Any) -> float:
    """Ends with an error after a request."""
    chat([{"role": "user", "content": "hello"}])
    sys.exit("I give up")


def asks_nothing(task: Any) -> float:
    """Ends without a request."""
    return 1.0


def hangs(task: Any) -> None:
    """Never ends."""
    chat([{"role": "user", "content": "hello"}])
    time.sleep(600)


def never_ends(task: Any) -> float:
    """Asks until it is refused, which ends it with an error."""
    messages = [{"role": "user", "content": "hello"}]
    while True:
        messages += [chat(messages), {"role": "user", "content": "go"}]


def asks_too_often(task: Any) -> float:
    """Asks until it is refused, and ends well; with a time, after that time."""
    try:
        never_ends(task)
    except Refused:
        time.sleep(task.get("seconds", 0))
    return 1.0


def broken_judge(task: Any, transcript: Any) -> float:
    """A reward that cannot be computed."""
    raise ConnectionError("the judge is down")


def says_nothing(task: Any) -> None:
    """Ends without a reward."""
    chat([{"role": "user", "content": "hello"}])


def posts_reward(task: Any) -> None:
    """Posts its reward."""
    chat([{"role": "user", "content": "hello"}])
    post("/episode/reward", {"reward": 0.25, "success": True, "score": 0.5})


if __name__ == "__main__":
    print("some output")
    print(json.dumps({"reward": play(json.load(sys.stdin))}))
