"""One session of a pool, in the event loop. It connects on demand, and every call has a deadline."""

import asyncio
import contextlib
import math
from collections.abc import Callable, Mapping

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidURI
from websockets.protocol import State

from aem_jax.envs import protocol
from aem_jax.envs.protocol import EnvError, LostError, RefusedError, StepResult, describe
from aem_jax.envs.serving.address import without_password
from aem_jax.envs.serving.client import CONNECT_OPTIONS, CONNECTION_ERRORS, check_size
from aem_jax.envs.serving.config import PoolConfig
from aem_jax.envs.serving.field_mapping import FieldMapping, decode_data, decode_result
from aem_jax.envs.serving.process import ServerProcess
from aem_jax.envs.serving.supervisor import Supervisor, pauses

_CONNECT_TIMEOUT_S = 10.0
_PROBE_S = 5.0
_EXIT_S = 0.1
_CLOSE_S = 1.0
_RELEASE_S = 5.0
"""Seconds in which a server closes the environment of a released session, before another session is opened."""
_WAITS_S = 3.0
"""A call waits for its turn until this time has passed without another message of the server, which repeats it every
second."""
_ROOM = (
    "; set --env.sessions-per-server to what one server has room for (1 for many of OpenEnv's), and have as many "
    "servers as that takes: --env.urls, or --env.num-servers where --env.command starts them"
)


class Clock:
    """Seconds in which this process was awake. A stop, a suspension or a long hold of the interpreter lock counts as
    two ticks.

    Attributes:
        now: seconds so far; deadlines are times of this clock.
    """

    tick_s = 0.1

    def __init__(self):
        self.now = 0.0

    async def advance(self) -> None:
        """Waits for the next tick."""
        loop = asyncio.get_running_loop()
        begin = loop.time()
        await asyncio.sleep(self.tick_s)
        self.now += min(loop.time() - begin, 2 * self.tick_s)


class Connection:
    """One open session, with one request at a time. Abort it after a request without a reply: a late reply would count
    as the reply to the next request."""

    def __init__(self, socket: ClientConnection):
        self._socket = socket

    @classmethod
    async def open(cls, url: str, *, timeout_s: float, headers: Mapping[str, str] | None = None) -> "Connection":
        """Connects. Raises one of `CONNECTION_ERRORS`, or ValueError for an invalid URL."""
        try:
            socket = await connect(url, additional_headers=headers, open_timeout=timeout_s, **CONNECT_OPTIONS)
        except InvalidURI as error:
            raise ValueError(f"expected a WebSocket URL, got {without_password(url)!r}: {error}") from None
        return cls(socket)

    @property
    def usable(self) -> bool:
        """Whether this side considers the connection open."""
        return self._socket.state is State.OPEN

    async def call(self, request: str, on_waiting: Callable[[], None] = lambda: None) -> str | bytes:
        """Sends one request and waits for its reply; `on_waiting` is called whenever the request waits for its turn."""
        with contextlib.suppress(ConnectionClosed):  # a full server sends its reason and closes: read it
            await self._socket.send(request)
        while (reply := await self._socket.recv()) == protocol.WAITING_MESSAGE:
            on_waiting()
        return reply

    async def close(self, *, wait_s: float = 0.0) -> None:
        """Sends the protocol's close message, then closes the socket.

        Args:
            wait_s: seconds to wait until the server itself ends the session, which frees the session's place.
        """
        try:
            async with asyncio.timeout(_CLOSE_S + wait_s):
                await self._socket.send(protocol.CLOSE_REQUEST)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(wait_s):
                        await self._socket.wait_closed()
                await self._socket.close()
        except CONNECTION_ERRORS:
            self.abort()

    def abort(self) -> None:
        """Cuts the connection at once, unless it is closed. A pending call raises ConnectionClosed."""
        if self._socket.state is not State.CLOSED:  # asyncio's transport cannot be aborted once it is closed
            self._socket.transport.abort()


class PoolSession:
    """One session.

    Args:
        index: the session's number in the pool.
        server: the session's server.
        config: the pool's settings.
        clock: the pool's clock.
        headers: sent when connecting.
    """

    def __init__(
        self, index: int, server: Supervisor, config: PoolConfig, clock: Clock, headers: Mapping[str, str] | None = None
    ):
        self.index, self.server = index, server
        self._headers = {**(headers or {}), protocol.WAITING_HEADER: "1"}
        self._config, self._clock = config, clock
        self._connection: Connection | None = None
        self._closing: asyncio.Task[None] | None = None  # closes the connection that was released last
        self._process: ServerProcess | None = None  # that of the connection; the server may have restarted since
        self._failure = "it was never reset"  # why there is no connection
        self._lost = False  # whether the server failed, not this session
        self._expires = math.inf
        self._waited = -math.inf  # when the server last said that the pending call waits for its turn
        self._playing = False  # whether the server has an episode that it has not ended itself

    @property
    def waits(self) -> bool:
        """Whether the pending call waits for its turn on the server."""
        return self._clock.now - self._waited < _WAITS_S

    async def reset(self, request: str) -> StepResult:
        """Starts an episode; connects first if necessary.

        Raises:
            EnvError: the server failed, or was not up in time.
        """
        limit = self._clock.now + self._config.restart_wait_s
        for attempt, pause in enumerate(pauses(self._config.first_pause_s)):
            await self._connect(limit)
            try:
                return await self.call(request, self._config.reset_deadline_s, decode_result)
            except RefusedError as error:
                if error.code != protocol.CAPACITY_REACHED:
                    raise
                # For a moment, the server may still count a session that was just cut: the first refusal is no failure.
                final = self._clock.now + pause > limit
                if attempt or final:
                    self.server.note(f"session {self.index}: {self._failure}")
                if final:
                    raise
            await asyncio.sleep(pause)
        raise AssertionError("pauses never end")

    async def call(
        self, request: str, deadline_s: float, decode: Callable[[str | bytes, FieldMapping], StepResult]
    ) -> StepResult:
        """Sends a request, and reads the observation that the server replies with.

        Raises:
            LostError: the server failed, before or during this call, and is being restarted. Any session of the server
                may be the cause.
            EnvError: the server refused, there was no episode, or the request is too large to be sent.
        """
        connection, process, server = self._connection, self._process, self.server
        if not connection:
            kind = LostError if self._lost else EnvError
            raise kind(f"session {self.index} has no episode, reset it: {self._failure}")
        check_size(request)
        self._expires = self._clock.now + deadline_s

        def on_waiting() -> None:
            self._waited, self._expires = self._clock.now, self._clock.now + deadline_s

        try:
            result = decode(await connection.call(request, on_waiting), self._config.field_mapping)
            self._playing = not result.done
            return result
        except RefusedError as error:
            self.drop(f"{server} refused: {error}")  # the next reset gets a fresh environment
            if error.code != protocol.CAPACITY_REACHED:  # a reset may try again
                server.note(f"session {self.index}: {self._failure}")
            raise
        except (EnvError, *CONNECTION_ERRORS) as error:
            if process and isinstance(error, ConnectionClosed):
                await asyncio.sleep(_EXIT_S)  # if the server has ended, its exit status is known soon and says more
            if self._connection is connection:  # else it was dropped with its reason
                failure = str(error) if isinstance(error, EnvError) else describe(error)
                self.drop(f"{server}: {failure}")
                server.failed(process, failure)
            raise LostError(f"session {self.index}: {self._failure}") from None
        finally:
            self._expires, self._waited = math.inf, -math.inf

    async def probe(self) -> None:
        """Connects, and verifies that the server has capacity for the session.

        Raises:
            EnvError: the server is not reachable, or full.
        """
        limit = self._clock.now + _PROBE_S
        for pause in pauses(self._config.first_pause_s):
            await self._connect(limit)
            assert self._connection
            try:
                async with asyncio.timeout(self._config.reset_deadline_s):
                    decode_data(await self._connection.call(protocol.STATE_REQUEST), "state")
                return
            except RefusedError as error:
                if error.code == protocol.EXECUTION_ERROR:
                    return  # the session is open; there is no state before the first reset
                failure = f"{error}{_ROOM if error.code == protocol.CAPACITY_REACHED else ''}"
            except (EnvError, *CONNECTION_ERRORS) as error:
                failure = describe(error)
            self.drop(failure)
            if self._clock.now + pause > limit:
                count = self._config.sessions_per_server
                raise EnvError(f"expected {count} sessions on {self.server}; session {self.index} got {failure}")
            await asyncio.sleep(pause)

    def end_if_expired(self) -> None:
        """Fails the pending call if its deadline has passed."""
        if self._expires <= self._clock.now:
            self._expires = math.inf
            failure = f"session {self.index} had no answer before its deadline"
            self.drop(f"{self.server}: {failure}")
            self.server.failed(self._process, failure)

    def drop(self, failure: str, *, lost: bool = False) -> None:
        """Cuts the connection, and fails its pending call. `lost`: the server failed, not this session."""
        if self._connection:
            self._connection.abort()
            self._connection = None
            self._failure, self._lost = failure, lost

    async def release(self) -> None:
        """Ends an episode that the server has not ended, by closing the session; the next reset opens it again.

        Returns while the session closes. The next reset waits for that, because the server may have one place alone.
        """
        connection = self._connection
        if connection and self._playing:
            self._connection, self._playing, self._lost = None, False, False
            self._failure = "its episode was released"
            self._closing = asyncio.create_task(connection.close(wait_s=_RELEASE_S))

    async def close(self) -> None:
        """Closes the session on the server."""
        if self._closing:
            await asyncio.wait([self._closing], timeout=_CLOSE_S)
        if self._connection:
            await self._connection.close()

    async def _connect(self, limit: float) -> None:
        server = self.server
        if self._connection and not self._connection.usable:
            self.drop(f"{server} closed the connection")
        if self._closing:
            await asyncio.wait([self._closing])  # it has a time limit
            self._closing = None
        for pause in pauses(self._config.first_pause_s):
            while not server.up.is_set() and self._clock.now < limit:
                await asyncio.sleep(self._clock.tick_s / 2)
            if self._connection:
                return
            if self._clock.now >= limit:
                raise EnvError(f"{server} did not come back in time: {server.failure}")
            process = self._process = server.process
            try:
                self._connection = await Connection.open(
                    server.url, timeout_s=_CONNECT_TIMEOUT_S, headers=self._headers
                )
                server.failure = ""
            except CONNECTION_ERRORS as error:
                server.failed(process, f"no connection: {describe(error)}")
                await asyncio.sleep(min(pause, max(limit - self._clock.now, 0.0)))
