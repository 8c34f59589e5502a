"""One episode behind the endpoint: its requests, one at a time, and the rollout that answers them.

Requests come in the gateway's event loop; the rollout calls from its own thread. Event i is what the rollout sees after
i prompts: the next prompt, or the end. A client that goes away, or has all that it asked for, may send the next request
while the rollout is still at the response before; so an event also tells how much of that response was received.
"""

import asyncio
import bisect
import secrets
import threading
from collections.abc import AsyncGenerator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

from aem_jax.envs.protocol import EnvError, StepResult
from aem_jax.gateway.requests import ApiError, ChatRequest, Completion
from aem_jax.gateway.tool_calls import ToolFormat, calls_begin, parse_calls, tool_format
from aem_jax.gateway.tree import Placement, RequestTokenizer, TokenTree

Part: TypeAlias = tuple[str, list[tuple[str, float]]] | Completion
"""A piece of a response's text with the text and log-probability of its tokens, if asked for; at the end, all of it."""

MODEL = "policy"
"""Name of the policy in responses. Requests may name any model."""

_MAX_WAITING = 64
"""Requests of one episode that may wait for the one before them."""
_MAX_PROMPTS = 8
"""Requests for each response that an episode may have: most of them were cancelled."""


@dataclass(frozen=True)
class Limits:
    """Bounds of an episode.

    Attributes:
        max_requests: responses.
        context_tokens: tokens of a prompt and its response.
    """

    max_requests: int
    context_tokens: int


@dataclass
class _Prompt:
    """A request that the rollout has got, and its response so far (mutable)."""

    request: ChatRequest
    placement: Placement
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finished: bool = False
    grown: asyncio.Event = field(default_factory=asyncio.Event)
    received: int | None = None
    """Ids that the client received; None until it has all of them, or for ever if it has gone away."""
    valid: bool = True


class Session:
    """The requests of one episode.

    Args:
        tokenizer: of the policy.
        limits: bounds of the episode.
        loop: the event loop of the requests.
        keeps_transcript: whether `transcript` is written.
    """

    def __init__(
        self,
        tokenizer: RequestTokenizer,
        limits: Limits,
        loop: asyncio.AbstractEventLoop,
        *,
        keeps_transcript: bool = True,
    ) -> None:
        self._keeps_transcript = keeps_transcript
        self._format: ToolFormat = tool_format(tokenizer.template)
        self._tokenizer, self._limits, self._loop = tokenizer, limits, loop
        self._tree = TokenTree(tokenizer, self._format)
        self._lock = threading.Lock()
        self._one_at_a_time = asyncio.Lock()
        self._waiting = 0
        self._prompts: list[_Prompt] = []
        self._events: list[Future[StepResult]] = [_future()]
        self._seen = 0  # prompts that the rollout has begun to answer
        self.at_limit: bool = False
        """Whether the latest request was refused because the episode is at a limit."""
        self.ended = False
        self.reward: dict[str, Any] | None = None
        """The reward that the agent posted; None if it has not."""
        self.transcript: list[dict[str, Any]] = []
        """Each answered request: its messages, and the message that answered it."""

    @property
    def is_new(self) -> bool:
        """Whether the rollout has got no prompt of it."""
        return not self._prompts

    @property
    def has_turns(self) -> bool:
        """Whether a client has received a response."""
        return len(self._tree) > 0

    # The rollout's side.

    def first(self) -> "Future[StepResult]":
        """The first prompt."""
        return self._events[0]

    def without_response(self) -> "Future[StepResult]":
        """The event after the prompt that the rollout begins to answer."""
        with self._lock:
            self._seen += 1
            return self._events[self._seen]

    def sampled(self, ids: np.ndarray, logprobs: np.ndarray) -> None:
        """Tokens of the response, in chunks."""
        with self._lock:
            prompt = self._prompts[self._seen - 1]
            prompt.ids += ids.tolist()
            prompt.logprobs += logprobs.tolist()
        self._notify(prompt)

    def finish(self) -> "Future[StepResult]":
        """The response is complete; returns the event after it."""
        with self._lock:
            prompt = self._prompts[self._seen - 1]
            prompt.finished = True
            event = self._events[self._seen]
        self._notify(prompt)
        return event

    def _notify(self, prompt: _Prompt) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(prompt.grown.set)

    # The end of the episode.

    def end(self, *, reward: float, success: bool, score: float | None) -> None:
        """Ends the episode with its reward, which counts for the last response that was received."""
        if len(self._tree) == 0:
            self.fail(EnvError("expected at least one request of the agent, got none before its end"))
            return
        info = {"won": success, **({} if score is None else {"score": score})}
        ending = {"truncated": True} if self.at_limit else {"terminated": True}
        with self._lock:
            if not self.ended:
                self.ended = True
                self._emit(StepResult("", reward=reward, info=info, **ending))
        self._notify_all()

    def fail(self, error: EnvError) -> None:
        """Ends the episode as an environment error. A second end does nothing."""
        with self._lock:
            if not self.ended:
                self.ended = True
                self._events[-1].set_exception(error)
        self._notify_all()

    def _notify_all(self) -> None:
        """Wakes the client that waits for its response."""
        if self._prompts:
            self._notify(self._prompts[-1])

    def _emit(self, result: StepResult) -> None:
        """Resolves the latest event with a result, and what became of the response before it."""
        before = self._prompts[-1] if self._prompts else None
        if before is None:
            response = {"received": True, "num_received": None, "valid_action": True}
        else:
            whole = before.received is not None and before.finished and before.received == len(before.ids)
            response = {
                "received": before.received is not None,
                "num_received": None if whole else before.received,
                "valid_action": before.valid,
            }
        info = {"won": False, **result.info, **response}
        event = self._events[-1]
        self._events.append(_future())
        event.set_result(StepResult(result.observation, result.reward, result.terminated, result.truncated, info))

    # The clients' side.

    def continues(self, request: ChatRequest) -> bool:
        """Whether a request goes on from a response of this session, and there is room for it."""
        with self._lock:
            is_full = len(self._tree) >= self._limits.max_requests
            return not (self.ended or is_full) and self._tree.continues(request)

    async def complete(self, request: ChatRequest) -> AsyncGenerator[Part]:
        """Answers a request: pieces of its text with their tokens, then all of it.

        Raises:
            ApiError: a limit is reached, the chat template refuses the messages, or the episode has ended.
        """
        if self._waiting >= _MAX_WAITING:
            raise ApiError(
                f"expected at most {_MAX_WAITING} requests of an episode at a time; wait for responses",
                status=429,
                code="rate_limit_exceeded",
            )
        self._waiting += 1
        try:
            async with self._one_at_a_time:
                async for part in self._answer(request):
                    yield part
        finally:
            self._waiting -= 1

    async def _answer(self, request: ChatRequest) -> AsyncGenerator[Part]:
        prompt = self._submit(request)
        text = _Text(self._tokenizer, self._format if request.tools else None, request.stop)
        sent_ids = 0
        while True:
            await prompt.grown.wait()
            prompt.grown.clear()
            with self._lock:
                ids, finished, ended = list(prompt.ids), prompt.finished, self.ended
            if ended and not finished:
                raise _over()
            piece, stopped_at = text.update(ids, finished)
            if stopped_at is not None:
                finished, ids = True, ids[:stopped_at]
            if finished:
                break
            if piece:
                yield piece, self._tokens(ids, prompt.logprobs, sent_ids) if request.logprobs else []
                sent_ids = len(ids)
        completion = self._completion(prompt, request, ids, text, stopped_at is not None)
        if piece:
            yield piece, self._tokens(ids, prompt.logprobs, sent_ids) if request.logprobs else []
        yield completion

    def _submit(self, request: ChatRequest) -> _Prompt:
        """Gives a request to the rollout."""
        limits = self._limits
        with self._lock:
            if self.ended:
                raise _over()
            if len(self._tree) >= limits.max_requests:
                self.at_limit = True
                raise ApiError(
                    f"expected at most {limits.max_requests} requests in an episode (--rollout.max-turns); end it",
                    status=403,
                    code="episode_limit_reached",
                )
            if len(self._prompts) >= _MAX_PROMPTS * limits.max_requests:
                raise ApiError(
                    f"expected at most {_MAX_PROMPTS * limits.max_requests} requests, cancelled ones included",
                    status=429,
                    code="rate_limit_exceeded",
                )
            try:
                placement = self._tree.place(request)
            except (ValueError, RecursionError) as error:
                raise ApiError(str(error), param="messages") from error
            length = len(placement.prompt_ids)
            if length >= limits.context_tokens:
                self.at_limit = True
                raise ApiError(
                    f"expected a prompt of at most {limits.context_tokens - 1} tokens (--rollout.context-tokens), got "
                    f"{length}; shorten the messages",
                    code="context_length_exceeded",
                    param="messages",
                )
            latest = len(self._tree) - 1
            info = {
                "prompt_ids": list(placement.prompt_ids),
                "max_tokens": request.max_tokens,
                "branches": int(len(self._tree) > 0 and placement.parent != latest),
                "rematched": placement.rematched,
            }
            prompt = _Prompt(request, placement)
            self.at_limit = False  # an agent may shorten its messages and go on
            self._emit(StepResult(placement.observation, info=info))
            self._prompts.append(prompt)
            return prompt

    def _completion(
        self, prompt: _Prompt, request: ChatRequest, ids: list[int], text: "_Text", stopped: bool
    ) -> Completion:
        """All of a response; from here on it counts as received."""
        content, calls, valid = text.text, [], True
        if request.tools:
            content, calls, valid = parse_calls(text.text, self._format, f"call_{len(self._tree)}_")
        closed = stopped or (bool(ids) and ids[-1] in self._tokenizer.stop_ids)
        completion = Completion(
            MODEL,
            content,
            calls,
            "tool_calls" if calls else "stop" if closed else "length",
            len(prompt.placement.prompt_ids),
            len(ids),
            self._tokens(ids, prompt.logprobs, 0) if request.logprobs else None,
        )
        with self._lock:
            prompt.received, prompt.valid = len(ids), valid
            self._tree.add(prompt.placement, ids, content, calls)
            if self._keeps_transcript:
                self.transcript.append({"messages": list(request.messages), "response": completion.message()})
        return completion

    def _tokens(self, ids: list[int], logprobs: list[float], first: int) -> list[tuple[str, float]]:
        return [
            (self._tokenizer.decode([token]), logprob)
            for token, logprob in zip(ids[first:], logprobs[first : len(ids)], strict=True)
        ]


class Episodes:
    """Sessions by key: a request without the key of an episode under way is refused."""

    def __init__(self, tokenizer: RequestTokenizer, limits: Limits) -> None:
        self._tokenizer, self._limits = tokenizer, limits
        self._sessions: dict[str, Session] = {}

    def open(self, loop: asyncio.AbstractEventLoop) -> tuple[str, Session]:
        """A new episode's key and session."""
        key, session = f"episode-{secrets.token_urlsafe(24)}", Session(self._tokenizer, self._limits, loop)
        self._sessions[key] = session
        return key, session

    def close(self, key: str) -> None:
        """Forgets an episode, which has ended."""
        self._sessions.pop(key, None)

    def __len__(self) -> int:
        return len(self._sessions)

    def check(self, key: str) -> None:
        """See `server.Backend`."""
        session = self._sessions.get(key)
        if session is None or session.ended:
            raise ApiError(
                "expected the key of an episode under way as bearer token (OPENAI_API_KEY), got "
                f"{'another one' if key else 'none'}",
                status=401,
                code="invalid_api_key",
            )

    def complete(self, key: str, request: ChatRequest) -> AsyncGenerator[Part]:
        """See `server.Backend`."""
        self.check(key)  # the episode may have ended while the request was read
        return self._sessions[key].complete(request)

    def reward(self, key: str, reward: Mapping[str, Any]) -> None:
        """See `server.Backend`."""
        self.check(key)
        self._sessions[key].reward = dict(reward)


class _Text:
    """The text of a growing response, held back where it may still change or is no content (mutable)."""

    def __init__(self, tokenizer: RequestTokenizer, format: ToolFormat | None, stop: tuple[str, ...]) -> None:
        self._format: ToolFormat | None = format
        self._tokenizer, self._stop = tokenizer, stop
        self._sent = 0
        self._without_stop = 0  # ids that were searched: their text has no stop text
        self.text = ""

    def update(self, ids: list[int], finished: bool) -> tuple[str, int | None]:
        """The piece that can be sent, and the number of ids up to a stop text, if there is one."""
        text = self._tokenizer.decode(ids)
        stopped_at = None
        cut = min((at for at in (text.find(stop) for stop in self._stop) if at >= 0), default=-1)
        if cut >= 0:
            # Bisection: decoding every prefix would take seconds in the event loop.
            has_stop = lambda count: any(stop in self._tokenizer.decode(ids[:count]) for stop in self._stop)
            stopped_at = bisect.bisect_left(range(len(ids)), True, self._without_stop + 1, key=has_stop)
            text, finished = text[:cut], True
        else:
            self._without_stop = len(ids)
        self.text, end = text, len(text)
        has_calls = self._format is not None and not (finished and not parse_calls(text, self._format, "")[1])
        if self._format is not None and has_calls:  # or may have; white space before a call is no content
            end = len(text[: calls_begin(text, self._format)].rstrip())
        if not finished:
            end = min(end, len(text.rstrip("�")), len(text) - self._may_stop(text))
        piece, self._sent = text[self._sent : end], max(self._sent, end)
        return piece, stopped_at

    def _may_stop(self, text: str) -> int:
        """Characters at the end of a text that may begin a stop text."""
        ends = (n for stop in self._stop for n in range(1, len(stop)) if text.endswith(stop[:n]))
        return max(ends, default=0)


def _future() -> "Future[StepResult]":
    future: Future[StepResult] = Future()
    future.set_running_or_notify_cancel()
    return future


def _over() -> ApiError:
    return ApiError(
        "expected the key of an episode under way, got one of an ended episode", status=401, code="invalid_api_key"
    )
