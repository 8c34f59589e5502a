"""Serves an environment over OpenEnv's WebSocket messages.

    python -m aem_jax.envs.serving.server alfworld --port 8765 --settings '{"max_steps": 30}'

At `ws://host:port/ws`, one connection is one session with one environment. The environment is created when the
connection opens. When it ends, the environment is closed, and only then another session can have its place. The server
sends exactly one reply to every request, in order. A client that asks for it is told before a reply that the request
waits for room (`protocol.waiting`). The server also serves GET /health, /metadata and /schema. OpenEnv's own server
uses FastAPI with 115 packages; this one needs only `websockets`.

A non-blocking environment runs in the event loop, because its step takes less time than a thread switch. A blocking
environment has one thread per session.
"""

import signal

if __name__ == "__main__":  # Ctrl-C prints no traceback while modules load
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import asyncio
import contextlib
import ctypes
import json
import logging
import os
import socket
import sys
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from websockets.asyncio.server import ServerConnection
from websockets.asyncio.server import serve as serve_websocket
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response

from aem_jax.envs import protocol
from aem_jax.envs.protocol import Environment, describe
from aem_jax.envs.registry import SERVED, environment_spec
from aem_jax.envs.serving.session import Session, encode_error
from aem_jax.envs.suite import EnvironmentSpec
from aem_jax.files import parse_mapping

logger = logging.getLogger("aem_jax.envs.serving.server")  # not __name__, which is __main__ in a process of its own

_CLOSE_S = 3.0
_PLACE_S = 30.0
"""Seconds after which the place of an ended session is free although its environment has not closed."""
_WAITING_S = 1.0
"""Seconds between two messages that a request waits for its turn."""


@dataclass(frozen=True)
class ServerConfig:
    """Where and how to serve."""

    host: str = "127.0.0.1"
    """Address to listen on. 0.0.0.0, or :: for IPv6, accepts other machines. There is no authentication, so other
    machines should be in your network."""
    port: int = 8765
    """Port to listen on; 0 takes a free one."""
    sessions: int = 64
    """Maximum number of sessions. Further sessions get the error CAPACITY_REACHED."""
    send_admissible: bool = False
    """Whether observations contain the list of admissible actions. It is long, and the policy does not need it."""
    with_parent: bool = False
    """Whether to end with the parent process. For pools."""

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ValueError(f"expected a port from 0 to 65535, got {self.port}")
        if self.sessions < 1:
            raise ValueError(f"expected at least one session, got {self.sessions}")


class _Server:
    """The sessions of one server."""

    def __init__(self, make: Callable[[], Environment], config: ServerConfig, *, blocking: bool):
        self._make, self._config, self._blocking = make, config, blocking
        self._active = 0
        self._stopped = asyncio.Event()

    def stop(self) -> None:
        """Ends the sessions without waiting for their environments to close."""
        self._stopped.set()

    async def handle(self, connection: ServerConnection) -> None:
        if self._active >= self._config.sessions:
            details = {"active_sessions": self._active, "max_sessions": self._config.sessions}
            message = f"Server at capacity: {self._active}/{self._config.sessions} sessions active"
            await connection.send(encode_error(protocol.CAPACITY_REACHED, message, **details))
            return
        self._active += 1
        executor = ThreadPoolExecutor(1) if self._blocking else None
        try:
            await self._serve_session(connection, executor)
        except ConnectionClosed:
            pass  # the client is gone, and its environment is closed
        finally:
            self._active -= 1
            if executor:
                executor.shutdown(wait=False)

    async def _serve_session(self, connection: ServerConnection, executor: ThreadPoolExecutor | None) -> None:
        loop = asyncio.get_running_loop()
        make = self._make_environment
        env = await loop.run_in_executor(executor, make) if executor else make()
        if isinstance(env, BaseException):
            await connection.send(encode_error(protocol.FACTORY_ERROR, describe(env)))
            return
        session = Session(env, send_admissible=self._config.send_admissible)
        thread = await loop.run_in_executor(executor, threading.get_ident) if executor else 0
        told = connection.request is not None and protocol.WAITING_HEADER in connection.request.headers
        try:
            async for raw in connection:
                if executor:
                    answering = loop.run_in_executor(executor, session.answer, raw)
                    while told and not (await asyncio.wait([answering], timeout=_WAITING_S))[0]:
                        if protocol.is_waiting(thread):
                            await connection.send(protocol.WAITING_MESSAGE)
                    reply = await answering
                else:
                    reply = session.answer(raw)
                if reply is None:
                    return
                await connection.send(reply)
        finally:
            if executor:
                await self._close(session, executor)
            else:
                session.close()

    async def _close(self, session: Session, executor: ThreadPoolExecutor) -> None:
        """Closes an environment before its place is free, because it may hold what the next one needs (a port, memory).

        The server does not wait for an environment that takes longer than `_PLACE_S`, or while it stops itself.
        """
        closing = asyncio.get_running_loop().run_in_executor(executor, session.close)  # after a request that still runs
        stopping = asyncio.ensure_future(self._stopped.wait())
        try:
            # unlike `wait_for`, `wait` does not cancel the closing of the environment when it is cancelled
            await asyncio.wait([closing, stopping], timeout=_PLACE_S, return_when=asyncio.FIRST_COMPLETED)
        finally:
            stopping.cancel()
        if not closing.done() and not self._stopped.is_set():
            logger.warning("an environment takes more than %g s to close; its place is given away", _PLACE_S)

    def _make_environment(self) -> Environment | BaseException:
        """Returns an environment, or the error. If raised, an exit in a thread would end the event loop."""
        try:
            return self._make()
        except BaseException as error:
            logger.warning("the environment could not be made", exc_info=True)
            return error


def _boolean(description: str) -> dict[str, Any]:
    return {"type": "boolean", "description": description}


ACTION_SCHEMA = {
    "title": "Action",
    "type": "object",
    "properties": {
        "text": {"type": "string", "description": "full text of the policy's response"},
        "metadata": {"type": "object"},
    },
    "required": ["text"],
    "additionalProperties": False,
}
OBSERVATION_SCHEMA = {
    "title": "Observation",
    "type": "object",
    "properties": {
        "text": {"type": "string", "description": "shown to the policy"},
        "won": _boolean("the task is solved"),
        "terminated": _boolean("the task ended the episode"),
        "truncated": _boolean("a limit ended the episode"),
        "valid_action": _boolean("the response was understood as an action"),
        "admissible": {"anyOf": [{"type": "array", "items": {"type": "string"}}, {"type": "null"}]},
        "info": {"type": "object", "description": "further facts of the environment"},
    },
    "required": ["text", "won", "terminated", "truncated", "valid_action", "admissible", "info"],
}
STATE_SCHEMA = {
    "title": "State",
    "type": "object",
    "properties": {"episode_id": {"type": ["string", "null"]}, "step_count": {"type": "integer", "minimum": 0}},
}


def _pages(name: str, description: str) -> Mapping[str, Any]:
    return {
        "/health": {"status": "healthy"},
        "/metadata": {"name": name, "description": description, "version": "1"},
        "/schema": {"action": ACTION_SCHEMA, "observation": OBSERVATION_SCHEMA, "state": STATE_SCHEMA},
    }


async def _run(
    name: str,
    make: Callable[[], Environment],
    spec: EnvironmentSpec,
    config: ServerConfig,
    ready: Callable[[int], None],
) -> None:
    pages = _pages(name, spec.description)

    def http(connection: ServerConnection, request: Request) -> Response | None:
        path = request.path.partition("?")[0]
        if path == "/ws":
            return None
        if path not in pages:
            return connection.respond(HTTPStatus.NOT_FOUND, f"expected /ws, {', '.join(pages)}\n")
        response = connection.respond(HTTPStatus.OK, json.dumps(pages[path]))
        del response.headers["Content-Type"]
        response.headers["Content-Type"] = "application/json"
        return response

    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        with contextlib.suppress(NotImplementedError, RuntimeError):  # on Windows; outside the main thread
            loop.add_signal_handler(number, stop.set)
    server = _Server(make, config, blocking=spec.blocking)
    # Compression costs more than it saves on such short texts. With a ping without a deadline, TCP detects vanished
    # clients, and a busy client does not count as dead.
    async with serve_websocket(
        server.handle,
        config.host.strip("[]"),  # an IPv6 address, with brackets or without
        config.port,
        process_request=http,
        compression=None,
        ping_interval=60,
        ping_timeout=None,
        close_timeout=2,
        max_size=protocol.MAX_MESSAGE_BYTES,
    ) as sockets:
        ready(next(iter(sockets.sockets)).getsockname()[1])
        await stop.wait()
        server.stop()
        last_resort = _end_in(seconds=5)  # in case an environment hangs
    if not spec.blocking:
        last_resort.cancel()  # a blocking environment may leave threads, which Python waits for


def serve(
    name: str, settings: Mapping[str, Any], config: ServerConfig, ready: Callable[[int], None] = lambda port: None
) -> None:
    """Serves an environment until SIGTERM or SIGINT. The call blocks.

    Args:
        name: an environment in `registry.SERVED`, or the path of one (see `registry.environment_spec`).
        settings: its config's fields.
        config: where and how to serve.
        ready: called with the port once connections are accepted.

    Raises:
        ValueError: the name is unknown, or a setting is invalid.
        OSError: the port is in use.
    """
    if config.with_parent:
        end_with_parent()
    spec = environment_spec(name)
    make = spec.factory(settings)
    _close(make())  # an environment that cannot be created fails here, not in the first session
    try:
        asyncio.run(_run(name, make, spec, config, ready))
    except socket.gaierror as error:
        raise OSError(f"expected a host of this machine to listen on, got {config.host!r}: {error}") from None


def _close(env: Environment) -> None:
    """Closes an environment in a thread, and waits for at most `_CLOSE_S` seconds."""
    closing = threading.Thread(target=Session(env, send_admissible=False).close, daemon=True)
    closing.start()
    closing.join(_CLOSE_S)
    if closing.is_alive():
        logger.warning("%s.close takes more than %g s; it is not waited for", type(env).__qualname__, _CLOSE_S)


def _end_in(*, seconds: float) -> threading.Timer:
    timer = threading.Timer(seconds, os._exit, (1,))
    timer.daemon = True
    timer.start()
    return timer


def end_with_parent() -> None:
    """Ends this process when stdin closes. On Linux, the kernel kills it too, even if it is stopped."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)

    parent = os.dup(0)
    with open(os.devnull, "rb") as nothing:  # an environment may read or close stdin
        os.dup2(nothing.fileno(), 0)

    def watch() -> None:
        while os.read(parent, 1024):
            pass
        os._exit(0)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


def _announcer() -> Callable[[int], None]:
    """Reserves stdout for one line with the port. The output of environments goes to stderr."""
    stdout = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def announce(port: int) -> None:
        with stdout:
            print(json.dumps({"port": port}), file=stdout)

    return announce


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="aem_jax.envs.serving.server", description="Serves an environment over WebSocket."
    )
    parser.add_argument("environment", help=" | ".join([*SERVED, "file.py:attribute", "module:attribute"]))
    parser.add_argument("--settings", default="{}", help="the environment's settings as a JSON mapping")
    parser.add_argument("--host", default=ServerConfig.host)
    parser.add_argument("--port", type=int, default=ServerConfig.port, help="0 takes a free one; it is printed as JSON")
    parser.add_argument("--sessions", type=int, default=ServerConfig.sessions, help="maximum number of sessions")
    parser.add_argument(
        "--send-admissible", action="store_true", help="send the admissible actions with every observation"
    )
    parser.add_argument("--with-parent", action="store_true", help="end when the parent process ends")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("websockets").setLevel(logging.WARNING)
    try:
        config = ServerConfig(
            options.host, options.port, options.sessions, options.send_admissible, options.with_parent
        )
        serve(options.environment, parse_mapping(options.settings, "settings"), config, _announcer())
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # during the start; later a signal handler ends the server in order
        return 128 + signal.SIGINT
    return 0


if __name__ == "__main__":
    sys.exit(main())
