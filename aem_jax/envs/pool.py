"""Many environment sessions behind one object with futures; servers that die, hang or talk rubbish are put right.

A background thread runs an asyncio loop. Every call has a deadline, counted while this process is awake: when it is
stopped, suspended or compiling with the interpreter held, the servers are not blamed. A failure costs the episodes on
the server concerned (their calls raise `EnvError`) and nothing else: an own server is killed and started again at once,
a foreign one is connected to again with growing pauses, and the next `reset` waits for that.
"""

import asyncio
import concurrent.futures
import functools
import logging
import math
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from aem_jax.envs import protocol
from aem_jax.envs.client import CONNECTION_ERRORS, Connection, describe, websocket_url
from aem_jax.envs.process import ServerProcess
from aem_jax.envs.protocol import EnvError, RefusedError, StepResult, WireMapping
from aem_jax.envs.supervisor import Supervisor, Tasks, pauses
from aem_jax.envs.table import environment_spec

logger = logging.getLogger(__name__)

_TICK_S = 0.1
_CONNECT_TIMEOUT_S = 10.0
_PROBE_S = 5.0


@dataclass(frozen=True)
class PoolConfig:
    """Where the environments run and how long anything may take."""

    urls: tuple[str, ...] = ()
    """Servers to connect to (host:port or ws://…); empty: the pool starts its own."""
    num_servers: int = 2
    """Own server processes; a failure costs the sessions of one."""
    sessions_per_server: int = 32
    """Sessions on each server, own or foreign."""
    reset_deadline_s: float = 60.0
    """Seconds that a reset may take."""
    step_deadline_s: float = 30.0
    """Seconds that a step may take."""
    start_deadline_s: float = 60.0
    """Seconds until an own server must be up."""
    restart_wait_s: float = 60.0
    """Seconds that a reset waits for a failed server to come back before it fails itself."""
    first_pause_s: float = 0.25
    """Pause between the first two tries to start or reach a server; doubles up to 10 s."""
    send_admissible: bool = False
    """Whether own servers send the admissible actions with every observation."""
    wire: WireMapping = field(default_factory=WireMapping)
    """Where the servers keep our words; the default suits own servers."""

    def __post_init__(self):
        for name in ("num_servers", "sessions_per_server"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} of at least 1, got {getattr(self, name)}")
        for name in ("reset_deadline_s", "step_deadline_s", "start_deadline_s", "restart_wait_s", "first_pause_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"expected {name} above 0 seconds, got {getattr(self, name)}")


@dataclass(frozen=True)
class PoolStats:
    """What happened so far.

    Attributes:
        calls: resets and steps begun.
        failed_calls: those that raised `EnvError`.
        restarts: how often each own server was started again.
        errors: the latest 100 failures, oldest first.
    """

    calls: int
    failed_calls: int
    restarts: tuple[int, ...]
    errors: tuple[str, ...]


class _Session:
    """One session. `connection` is None until it is (again) connected; `failure` says why, `expires` when to end."""

    def __init__(self, index: int, server: Supervisor):
        self.index, self.server = index, server
        self.connection: Connection | None = None
        self.failure = "it was never reset"
        self.expires = math.inf
        self.future: concurrent.futures.Future[StepResult] | None = None

    def drop(self, failure: str) -> None:
        if self.connection:
            self.connection.abort()
            self.connection = None
            self.failure = failure


class EnvPool:
    """Environment sessions 0 … capacity − 1, each with at most one call under way.

    Args:
        config: where the environments run and how long anything may take.
        make: name and settings of the environment that own servers serve; not looked at when there are `config.urls`.

    Raises:
        ValueError: unknown environment or bad URL.
        EnvError: a server cannot be started or reached, or has too few sessions; says why.
    """

    def __init__(self, config: PoolConfig, make: tuple[str, Mapping[str, Any]]):
        self._config = config
        self._encode_step = protocol.step_encoder(config.wire)
        urls = [websocket_url(url) for url in config.urls]
        if not urls:
            environment_spec(make[0])
        launch = functools.partial(
            ServerProcess.start,
            *make,
            sessions=config.sessions_per_server,
            send_admissible=config.send_admissible,
            timeout_s=config.start_deadline_s,
        )
        self._servers = [
            Supervisor(index, url, launch, config.first_pause_s, self._on_failure)
            for index, url in enumerate(urls or [""] * config.num_servers)
        ]
        # Neighbouring sessions (one group's episodes, often) sit on different servers, so that a failure is spread.
        count = config.sessions_per_server * len(self._servers)
        self._sessions = [_Session(i, self._servers[i % len(self._servers)]) for i in range(count)]
        self._clock = 0.0  # seconds that this process was awake, in ticks
        self._calls = self._failed_calls = 0
        self._errors: deque[str] = deque(maxlen=100)
        self._lock = threading.Lock()
        self._closed = False
        self._loop = asyncio.new_event_loop()
        self._tasks = Tasks()
        self._thread = threading.Thread(target=self._loop.run_forever, name="env-pool", daemon=True)
        self._thread.start()
        self._opening = asyncio.run_coroutine_threadsafe(self._open(), self._loop)
        try:
            self._opening.result()
        except BaseException:
            self.close()
            raise

    @property
    def capacity(self) -> int:
        """Number of sessions."""
        return len(self._sessions)

    @property
    def server_pids(self) -> tuple[int, ...]:
        """Process ids of the own servers as of now; foreign ones have none."""
        return tuple(server.process.pid for server in self._servers if server.process)

    def server_of(self, session: int) -> int:
        """Index of the server that a session lives on."""
        return self._sessions[session].server.index

    def reset(self, session: int, payload: Mapping[str, Any]) -> concurrent.futures.Future[StepResult]:
        """Starts an episode of the task `payload`; waits for the server's restart where one is under way.

        Returns:
            A future that gives the first observation or raises `EnvError`. It cannot be cancelled; it has a deadline.

        Raises:
            ValueError: a payload that is not JSON, no such session, a call of it still under way, or a closed pool.
        """
        request = protocol.encode_reset(payload)
        return self._submit(session, lambda found: self._reset(found, request))

    def step(self, session: int, text: str) -> concurrent.futures.Future[StepResult]:
        """Gives the policy's response to an episode; futures and errors as in `reset`."""
        request = self._encode_step(text)
        return self._submit(session, lambda found: self._ask(found, request, self._config.step_deadline_s))

    def stats(self) -> PoolStats:
        """Counters and the latest errors, for metrics."""
        restarts = tuple(server.restarts for server in self._servers)
        return PoolStats(self._calls, self._failed_calls, restarts, tuple(self._errors))

    def close(self) -> None:
        """Ends own servers and all sessions; calls under way raise `EnvError`. Calling it twice is harmless."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._opening.cancel()  # where it was interrupted
        asyncio.run_coroutine_threadsafe(self._shut(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def __enter__(self) -> "EnvPool":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _submit(
        self, index: int, call: Callable[[_Session], Awaitable[StepResult]]
    ) -> concurrent.futures.Future[StepResult]:
        if not 0 <= index < self.capacity:
            raise ValueError(f"expected a session from 0 to {self.capacity - 1}, got {index}")
        session = self._sessions[index]
        future: concurrent.futures.Future[StepResult] = concurrent.futures.Future()
        future.set_running_or_notify_cancel()
        with self._lock:
            if self._closed:
                raise ValueError("expected an open pool, got a closed one")
            if session.future and not session.future.done():
                raise ValueError(f"expected one call at a time on session {index}, got one more while one is under way")
            session.future = future
            self._calls += 1
            self._loop.call_soon_threadsafe(lambda: self._tasks.spawn(self._answer(session, call, future)))
        return future

    # Everything below runs in the loop's thread.

    async def _answer(
        self,
        session: _Session,
        call: Callable[[_Session], Awaitable[StepResult]],
        future: concurrent.futures.Future[StepResult],
    ) -> None:
        try:
            result = await call(session)
        except Exception as error:
            self._failed_calls += 1
            future.set_exception(error)
        else:
            future.set_result(result)

    async def _reset(self, session: _Session, request: str) -> StepResult:
        limit = self._clock + self._config.restart_wait_s
        for pause in pauses(self._config.first_pause_s):
            await self._connect(session, limit)
            try:
                return await self._ask(session, request, self._config.reset_deadline_s)
            except RefusedError as error:
                # A session that was just cut may still be counted by its server; it is over in a moment.
                if error.code != protocol.CAPACITY_REACHED or self._clock + pause > limit:
                    raise
            await asyncio.sleep(pause)
        raise AssertionError("pauses never end")

    async def _connect(self, session: _Session, limit: float) -> None:
        server = session.server
        if session.connection and not session.connection.usable:
            session.drop(f"{server} closed the connection")
        for pause in pauses(self._config.first_pause_s):
            while not server.up.is_set() and self._clock < limit:
                await asyncio.sleep(_TICK_S / 2)
            if session.connection:
                return
            if self._clock >= limit:
                raise EnvError(f"{server} did not come back in time: {server.failure}")
            process = server.process
            try:
                session.connection = await Connection.open(server.url, timeout_s=_CONNECT_TIMEOUT_S)
                server.failure = ""
            except CONNECTION_ERRORS as error:
                server.failed(process, f"no connection: {describe(error)}")
                await asyncio.sleep(min(pause, max(limit - self._clock, 0.0)))

    async def _ask(self, session: _Session, request: str, deadline_s: float) -> StepResult:
        connection, server = session.connection, session.server
        if not connection:
            raise EnvError(f"session {session.index} has no episode, reset it: {session.failure}")
        process = server.process
        session.expires = self._clock + deadline_s
        try:
            return protocol.decode_result(await connection.ask(request), self._config.wire)
        except RefusedError as error:
            session.drop(f"{server} refused: {error}")  # the next reset gets a fresh environment
            self._on_failure(server, f"session {session.index}: {session.failure}", lost=False)
            raise
        except (EnvError, *CONNECTION_ERRORS) as error:
            if session.connection is connection:
                failure = str(error) if isinstance(error, EnvError) else describe(error)
                session.drop(f"{server}: {failure}")
                server.failed(process, failure)
            raise EnvError(f"session {session.index}: {session.failure}") from None
        finally:
            session.expires = math.inf

    def _on_failure(self, server: Supervisor, failure: str, lost: bool) -> None:
        logger.warning("%s", failure)
        self._errors.append(failure)
        for session in self._sessions:
            if lost and session.server is server:
                session.drop(failure)

    async def _open(self) -> None:
        self._tasks.spawn(self._tick())
        await _all(server.start() for server in self._servers)
        await _all(self._probe(session) for session in self._sessions)

    async def _probe(self, session: _Session) -> None:
        """Connects a session and sees that its server has room for it."""
        limit = self._clock + _PROBE_S
        for pause in pauses(self._config.first_pause_s):
            await self._connect(session, limit)
            assert session.connection
            try:
                async with asyncio.timeout(self._config.reset_deadline_s):
                    protocol.decode_data(await session.connection.ask(protocol.STATE_REQUEST), "state")
                return
            except RefusedError as error:
                if error.code == protocol.EXECUTION_ERROR:
                    return  # it has a session for us, and no state to tell before the first reset
                failure = str(error)
            except (EnvError, *CONNECTION_ERRORS) as error:
                failure = describe(error)
            session.drop(failure)
            if self._clock + pause > limit:
                count = self._config.sessions_per_server
                raise EnvError(f"expected {count} sessions on {session.server}; session {session.index} got {failure}")
            await asyncio.sleep(pause)

    async def _tick(self) -> None:
        """Advances the clock, never by more than two ticks at once, and ends the calls whose time is over."""
        last = self._loop.time()
        while True:
            await asyncio.sleep(_TICK_S)
            now = self._loop.time()
            self._clock += min(now - last, 2 * _TICK_S)
            last = now
            for session in self._sessions:
                if session.expires <= self._clock:
                    session.expires = math.inf
                    failure = f"session {session.index} had no answer before its deadline"
                    session.drop(f"{session.server}: {failure}")
                    session.server.failed(session.server.process, failure)

    async def _shut(self) -> None:
        await self._tasks.cancel()
        closing = EnvError("the pool was closed")
        for session in self._sessions:
            if session.future and not session.future.done():
                session.future.set_exception(closing)
                session.drop(str(closing))
        await asyncio.gather(*(session.connection.close() for session in self._sessions if session.connection))
        await asyncio.gather(*(server.stop() for server in self._servers))
        if rest := asyncio.all_tasks() - {asyncio.current_task()}:
            await asyncio.wait(rest, timeout=2.0)  # a start that was interrupted puts its process away


async def _all(awaitables: Iterable[Awaitable[None]]) -> None:
    """Awaits all, and raises the first failure when the others have ended too: nothing is left half started."""
    results = await asyncio.gather(*awaitables, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
