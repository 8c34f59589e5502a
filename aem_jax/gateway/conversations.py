"""Requests of any clients as conversations on the slots of a rollout: a plain endpoint, without training.

A conversation keeps its slot while its requests continue one another, so only new messages are computed. A new one
takes a free slot, or that of the conversation that has waited longest.
"""

import asyncio
import hmac
import itertools
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import aclosing
from typing import Any

import numpy as np

from aem_jax.envs.protocol import EnvError, StepResult, Task
from aem_jax.gateway.requests import ApiError, ChatRequest
from aem_jax.gateway.session import Limits, Part, Session
from aem_jax.gateway.tree import RequestTokenizer
from aem_jax.rollout.episode import Attempt

_TASK = Task("conversation", "conversation", {})


class Conversations:
    """Both sides: the backend of a gateway, and the pool of a rollout.

    Args:
        tokenizer: of the policy.
        limits: bounds of a conversation; one with more requests moves to a new slot.
        capacity: conversations that keep their slots: the rollout's slots.
        key: that clients need; empty: any.
    """

    def __init__(self, tokenizer: RequestTokenizer, limits: Limits, capacity: int, key: str = "") -> None:
        self._tokenizer, self._limits, self.capacity, self._key = tokenizer, limits, capacity, key
        self.loop: asyncio.AbstractEventLoop | None = None
        """The gateway's event loop, set before the rollout begins."""
        self._free: deque[Session] = deque()
        self._idle: dict[Session, None] = {}  # those with requests, the longest idle first
        self._all: dict[int, Session] = {}
        self._waiting: deque[asyncio.Future[None]] = deque()
        self.is_closed: bool = False
        """Whether nothing more is answered."""

    # The backend.

    def check(self, key: str) -> None:
        """See `server.Backend`."""
        if self._key and not hmac.compare_digest(key.encode(), self._key.encode()):
            raise ApiError("expected the endpoint's key as bearer token", status=401, code="invalid_api_key")

    def reward(self, key: str, reward: Mapping[str, Any]) -> None:
        """See `server.Backend`."""
        raise ApiError("expected no reward: this endpoint does not train", status=404)

    async def complete(self, key: str, request: ChatRequest) -> AsyncGenerator[Part]:
        """See `server.Backend`."""
        session = await self._take(request)
        try:
            async with aclosing(session.complete(request)) as parts:
                async for part in parts:
                    yield part
        except ApiError as error:
            raise _closed() if self.is_closed else error from None
        finally:
            if not session.ended:
                if session.is_new:  # the request was refused
                    self._free.append(session)
                else:
                    self._idle[session] = None
                self._wake()

    async def _take(self, request: ChatRequest) -> Session:
        """The session that a request continues, or a free one."""
        continued = [session for session in self._idle if session.continues(request)]
        if continued:
            del self._idle[continued[-1]]
            return continued[-1]
        while self.is_closed or not self._free:
            if self.is_closed:
                raise _closed()
            if self._idle:
                session = next(iter(self._idle))
                del self._idle[session]
                session.end(reward=0.0, success=False, score=None)  # its slot begins anew
            turn = asyncio.get_running_loop().create_future()
            self._waiting.append(turn)
            try:
                await turn
            except asyncio.CancelledError:
                if not turn.cancelled():
                    self._wake()  # the next in turn takes what this one was woken for
                raise
        return self._free.popleft()

    def _wake(self) -> None:
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                return

    # The pool.

    def server_of(self, session: int) -> int:
        """Conversations do not fail together."""
        return session

    def reset(self, session: int, payload: Mapping[str, Any]) -> "Future[StepResult]":
        """A slot is free; the result is the first prompt of its conversation."""
        assert self.loop is not None
        begun = self._all[session] = Session(self._tokenizer, self._limits, self.loop, keeps_transcript=False)
        self.loop.call_soon_threadsafe(self._offer, begun)
        return begun.first()

    def _offer(self, session: Session) -> None:
        if self.is_closed:
            session.fail(EnvError("the endpoint is being closed"))
            return
        self._free.append(session)
        self._wake()

    def step(self, session: int, text: str) -> "Future[StepResult]":
        """The response is complete."""
        return self._all[session].finish()

    def sampled(self, session: int, ids: np.ndarray, logprobs: np.ndarray) -> None:
        """Tokens of the response, as they are sampled."""
        self._all[session].sampled(ids, logprobs)

    def without_response(self, session: int) -> "Future[StepResult]":
        """The next prompt of a conversation whose client no longer waits."""
        return self._all[session].without_response()

    def close(self) -> None:
        """Ends all conversations and waiting requests, so that the rollout ends. In the loop."""
        self.is_closed = True
        for session in self._all.values():
            session.fail(EnvError("the endpoint is being closed"))
        while self._waiting:
            self._wake()


def _closed() -> ApiError:
    return ApiError("the endpoint is being closed", status=503)


class Endless:
    """A queue of attempts that never ends, as `Job.queue`.

    Args:
        key: number of a conversation -> u32[2], key data that it samples with.
    """

    def __init__(self, key: Callable[[int], np.ndarray]) -> None:
        self._key, self._numbers = key, itertools.count()

    def __iter__(self) -> Iterator[Attempt]:
        number = next(self._numbers)
        yield Attempt(_TASK, number, 0, self._key(number))

    def __delitem__(self, index: int) -> None:
        pass

    def appendleft(self, attempt: Attempt) -> None:
        """A conversation that failed is not tried again: its clients have got an error."""
