"""The endpoint: OpenAI's chat completions over HTTP, one key for each episode, in a thread beside the mesh."""

import asyncio
import itertools
import json
import socket
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Mapping
from concurrent.futures import Future
from contextlib import aclosing
from typing import Any, NamedTuple, Protocol, TypeGuard, TypeVar

import uvicorn
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from aem_jax.envs.serving.plain import number
from aem_jax.gateway.requests import ApiError, ChatRequest, Completion, SampledAs, chunk, parse_request
from aem_jax.gateway.session import MODEL, Part

MAX_BODY_BYTES = 16 * 2**20

T = TypeVar("T")


class Backend(Protocol):
    """What answers the requests of a gateway. All methods run in its loop."""

    def check(self, key: str) -> None:
        """Refuses a key.

        Raises:
            ApiError: the key is not one of its own.
        """
        ...

    def complete(self, key: str, request: ChatRequest) -> AsyncGenerator[Part]:
        """Answers a request; see `Session.complete`."""
        ...

    def reward(self, key: str, reward: Mapping[str, Any]) -> None:
        """Takes an episode's reward, as `parse_reward` returns it.

        Raises:
            ApiError: there are no rewards here.
        """
        ...


class Address(NamedTuple):
    """A reserved address: the host as it was given, and the bound socket."""

    host: str
    bound: socket.socket


def bind(host: str = "127.0.0.1", port: int = 0) -> Address:
    """Reserves an address. Clients are refused until a `Gateway` listens on it.

    Args:
        host: name or address of an interface of this host.
        port: 0: any free one.

    Raises:
        OSError: the address is taken, or is none of this host.
    """
    reserved = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections of an earlier process may linger
        reserved.bind((host, port))
    except OSError as error:
        reserved.close()
        raise OSError(error.errno, f"cannot listen on {host} port {port}: {error.strerror or error}") from error
    return Address(host, reserved)


class Gateway:
    """Serves the endpoint until it is closed.

    Args:
        backend: answers the requests.
        sampled: how it samples.
        address: from `bind`; by default any free port of this host.
    """

    def __init__(self, backend: Backend, sampled: SampledAs, address: Address | None = None) -> None:
        self._backend, self._sampled = backend, sampled
        self._numbers = itertools.count()  # of responses: clients tell them apart by their ids
        host, self._socket = address or bind()
        self._socket.listen(1024)
        shown = f"[{host}]" if ":" in host else host
        self.url: str = f"http://{shown}:{self._socket.getsockname()[1]}/v1"
        """Base URL of the API."""
        routes = [
            Route("/v1/chat/completions", self._complete, methods=["POST"]),
            Route("/v1/episode/reward", self._reward, methods=["POST"]),
            Route("/v1/models", self._models),
            Route("/health", self._health),
        ]
        handlers: Any = {ApiError: _refused, 404: _unknown, 405: _unknown}
        app = Starlette(routes=routes, exception_handlers=handlers)
        # log_config: uvicorn would replace the handlers of this process.
        settings = uvicorn.Config(app, log_config=None, access_log=False, lifespan="off", timeout_graceful_shutdown=1)
        self._server = uvicorn.Server(settings)
        self.loop: asyncio.AbstractEventLoop = asyncio.new_event_loop()
        """The event loop of the requests."""
        self._thread = threading.Thread(target=self._run, name="gateway", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        try:
            self.loop.run_until_complete(self._server.serve(sockets=[self._socket]))
        finally:
            self.loop.run_until_complete(self.loop.shutdown_asyncgens())
            self.loop.close()

    def submit(self, work: Coroutine[Any, Any, T]) -> "Future[T]":
        """Runs a coroutine in the gateway's loop."""
        return asyncio.run_coroutine_threadsafe(work, self.loop)

    def close(self) -> None:
        """Stops serving. A second call does nothing."""
        self._server.should_exit = True
        self._thread.join()
        self._socket.close()

    # Handlers.

    def _key(self, request: Request) -> str:
        """The key of a request, which the backend knows."""
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        key = key.strip() if scheme.lower() == "bearer" else ""
        self._backend.check(key)
        return key

    async def _complete(self, request: Request) -> Response:
        key = self._key(request)
        parsed = parse_request(await _body(request), self._sampled)
        parts, identity = self._backend.complete(key, parsed), f"chatcmpl-{next(self._numbers)}"
        if parsed.stream:
            first = await _unless_gone(request, anext(parts))  # errors come before the stream begins
            return StreamingResponse(_stream(identity, first, parts, parsed), media_type="text/event-stream")

        async def last() -> Completion:
            async with aclosing(parts):
                async for part in parts:
                    if isinstance(part, Completion):
                        return part
            raise AssertionError("a response ends with a completion")

        return JSONResponse((await _unless_gone(request, last())).body(identity))

    async def _reward(self, request: Request) -> Response:
        key = self._key(request)
        self._backend.reward(key, parse_reward(await _body(request), "the body"))
        return JSONResponse({"status": "ok"})

    async def _models(self, request: Request) -> Response:
        self._key(request)
        return JSONResponse({"object": "list", "data": [{"id": MODEL, "object": "model", "owned_by": "aem_jax"}]})

    async def _health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"})


def parse_reward(value: Any, where: str) -> dict[str, Any]:
    """The end of an episode: `reward`, and `success` and `score` where they are given.

    Args:
        value: a number, or a JSON mapping with `reward`.
        where: what to name in an error.

    Raises:
        ApiError: it is something else.
    """
    mapping = value if isinstance(value, dict) else {"reward": value}
    reward, success, score = (mapping.get(name) for name in ("reward", "success", "score"))
    if not _is_number(reward):
        raise ApiError(f"expected a finite number as reward in {where}, got {reward!r:.80}", param="reward")
    if success is not None and not isinstance(success, bool):
        raise ApiError(f"expected true or false as success in {where}, got {success!r:.80}", param="success")
    if score is not None and not _is_number(score):
        raise ApiError(f"expected a finite number as score in {where}, got {score!r:.80}", param="score")
    return {
        "reward": float(reward),
        "success": reward > 0 if success is None else success,
        "score": None if score is None else float(score),
    }


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and number(value) is not None  # a batch has float32


async def _body(request: Request) -> Any:
    """The JSON body of a request, of bounded size."""
    data = bytearray()
    try:
        async for part in request.stream():
            data += part
            if len(data) > MAX_BODY_BYTES:
                raise ApiError(f"expected a body of at most {MAX_BODY_BYTES} bytes, got more", status=413)
    except ClientDisconnect as error:
        raise ApiError("the client has gone away") from error
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        raise ApiError(f"expected a JSON body, got {bytes(data[:80])!r}") from None


async def _unless_gone(request: Request, work: Coroutine[Any, Any, T] | Any) -> T:
    """The result of some work, which is cancelled if the client goes away."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            task.cancel()
            await asyncio.wait({task})
            raise ApiError("the client has gone away")
        return task.result()
    finally:
        task.cancel()
        watch.cancel()


async def _stream(identity: str, first: Part, parts: AsyncGenerator[Part], request: ChatRequest) -> AsyncIterator[str]:
    """Server-sent events of a response."""
    event = lambda data: f"data: {json.dumps(data)}\n\n"
    yield event(chunk(identity, MODEL, {"role": "assistant", "content": ""}))
    try:
        async with aclosing(parts):
            part = first
            while not isinstance(part, Completion):
                text, tokens = part
                yield event(chunk(identity, MODEL, {"content": text}, logprobs=tokens or None))
                part = await anext(parts)
            for data in part.last_chunks(identity, request):
                yield event(data)
    except ApiError as error:
        yield event(error.body())
    yield "data: [DONE]\n\n"


async def _refused(request: Request, error: ApiError) -> Response:
    return JSONResponse(error.body(), status_code=error.status)


async def _unknown(request: Request, error: Exception) -> Response:
    status = getattr(error, "status_code", 404)
    known = "POST /v1/chat/completions, POST /v1/episode/reward, GET /v1/models and GET /health"
    return JSONResponse(
        ApiError(f"expected one of {known}, got {request.method} {request.url.path}", status=status).body(),
        status_code=status,
    )
