"""Many environment sessions behind one object with futures; servers that die, hang or talk rubbish are put right here.

A background thread runs an asyncio loop. Every call has a deadline, counted while this process is awake: when it is
stopped, suspended or compiling with the interpreter held, the servers are not blamed. A failure costs the episodes on the
server concerned (their calls raise `EnvError`) and nothing else: an own server is killed and started again at once, a foreign one
is connected to again with growing pauses, and the next `reset` waits for that.
"""

import asyncio
import concurrent.futures
import itertools
import logging
import math
import threading
from collections import deque
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass
from typing import Any

from aem_jax.envs import protocol
from aem_jax.envs.client import CONNECTION_ERRORS, Connection, websocket_url
from aem_jax.envs.process import ServerProcess, describe_exit
from aem_jax.envs.protocol import (
    EnvError,
    RefusedError,
    StepResult,
    WireMapping,
    decode_result,
    encode_reset,
    step_encoder,
)
from aem_jax.envs.table import environment_spec

logger = logging.getLogger(__name__)

_TICK_S = 0.1
_CONNECT_TIMEOUT_S = 10.0
_LARGEST_PAUSE_S = 10.0


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
    pause_s: float = 0.25
    """First pause between two tries to start or reach a server; doubles up to 10 s."""
    send_admissible: bool = False
    """Whether own servers send the admissible actions with every observation."""
    wire: WireMapping = WireMapping()
    """Where the servers keep our words; the default suits own servers."""

    def __post_init__(self):
        for name in ("num_servers", "sessions_per_server"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} of at least 1, got {getattr(self, name)}")
        for name in ("reset_deadline_s", "step_deadline_s", "start_deadline_s", "restart_wait_s", "pause_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"expected {name} above 0 seconds, got {getattr(self, name)}")


@dataclass(frozen=True)
class PoolStats:
    """What happened so far.

    Attributes:
        calls: resets and steps begun.
        failed_calls: those that raised `EnvError`.
        restarts: own servers started again, by server.
        errors: the latest failures of servers, oldest first.
    """

    calls: int
    failed_calls: int
    restarts: tuple[int, ...]
    errors: tuple[str, ...]


class _Server:
    """One server and how it is doing. `up` is set while it may be connected to (always, if it is not ours)."""

    def __init__(self, index: int, url: str = ""):
        self.index, self.url = index, url
        self.process: ServerProcess | None = None
        self.up = asyncio.Event()
        self.restarts = 0
        self.failure = "not started"

    def __str__(self) -> str:
        return f"environment server {self.index} ({f'pid {self.process.pid}' if self.process else self.url})"


class _Session:
    """One session; `connection` is None until it is (again) connected, and then `failure` says why."""

    def __init__(self, index: int, server: _Server):
        self.index, self.server = index, server
        self.connection: Connection | None = None
        self.failure = "never reset"
        self.expires = math.inf
        self.busy = threading.Lock()

    def drop(self, failure: str) -> None:
        if self.connection:
            self.connection.abort()
            self.connection = None
            self.failure = failure


class EnvPool:
    """Environment sessions 0 … capacity − 1, each with at most one call under way.

    Args:
        config: where the environments run and how long anything may take.
        make: name and settings of the environment that own servers serve; with `config.urls` it is not looked at.

    Raises:
        ValueError: unknown environment or bad URL.
        EnvError: a server cannot be started or reached, or has too few sessions; says why.
    """

    def __init__(self, config: PoolConfig, make: tuple[str, Mapping[str, Any]] = ("echo", {})):
        self._config, self._make = config, make
        self._encode_step = step_encoder(config.wire)
        urls = [websocket_url(url) for url in config.urls]
        if not urls:
            environment_spec(make[0])
        self._servers = [_Server(i, url) for i, url in enumerate(urls or [""] * config.num_servers)]
        # Neighbouring sessions (one group's episodes, often) sit on different servers, so that a failure is spread.
        count = config.sessions_per_server * len(self._servers)
        self._sessions = [_Session(i, self._servers[i % len(self._servers)]) for i in range(count)]
        self._clock = 0.0  # seconds this process was awake, in ticks
        self._calls = self._failed_calls = 0
        self._errors: deque[str] = deque(maxlen=100)
        self._tasks: set[asyncio.Task] = set()
        self._closed = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="env-pool", daemon=True)
        self._thread.start()
        try:
            asyncio.run_coroutine_threadsafe(self._open(), self._loop).result()
        except BaseException:
            self.close()
            raise

    @property
    def capacity(self) -> int:
        """Number of sessions."""
        return len(self._sessions)

    @property
    def server_pids(self) -> tuple[int | None, ...]:
        """Process ids of the own servers as of now; None for foreign ones."""
        return tuple(server.process.pid if server.process else None for server in self._servers)

    def server_of(self, session: int) -> int:
        """Index of the server that a session lives on."""
        return self._sessions[session].server.index

    def reset(self, session: int, payload: Mapping[str, Any]) -> concurrent.futures.Future[StepResult]:
        """Starts an episode of the task `payload`; waits for the server's restart where there is one under way.

        Returns:
            A future that gives the first observation or raises `EnvError`.

        Raises:
            ValueError: no such session, or a call of it is still under way.
        """
        request = encode_reset(payload)
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
        if self._closed:
            return
        self._closed = True
        asyncio.run_coroutine_threadsafe(self._shut(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def __enter__(self) -> "EnvPool":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _submit(self, index: int, call) -> concurrent.futures.Future[StepResult]:
        if self._closed:
            raise ValueError("expected an open pool, got a closed one")
        if not 0 <= index < self.capacity:
            raise ValueError(f"expected a session from 0 to {self.capacity - 1}, got {index}")
        session = self._sessions[index]
        if not session.busy.acquire(blocking=False):
            raise ValueError(
                f"expected one call at a time on session {index}, got a second while the first is under way"
            )
        self._calls += 1
        return asyncio.run_coroutine_threadsafe(self._guard(session, call(session)), self._loop)

    # Everything below runs in the loop's thread.

    async def _guard(self, session: _Session, call: Coroutine[Any, Any, StepResult]) -> StepResult:
        try:
            return await call
        except EnvError:
            self._failed_calls += 1
            raise
        except asyncio.CancelledError:
            session.drop("its call was cancelled")  # or the reply would be taken for the next call's
            if self._closed:
                raise EnvError("the pool was closed") from None
            raise
        finally:
            session.busy.release()

    async def _reset(self, session: _Session, request: str) -> StepResult:
        limit = self._clock + self._config.restart_wait_s
        for pause in self._pauses():
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
            session.drop("the server closed the connection")
        for pause in self._pauses():
            while not server.up.is_set() and self._clock < limit:
                await asyncio.sleep(_TICK_S / 2)
            if session.connection:
                return
            if self._clock >= limit:
                raise EnvError(f"{server} did not come back in {self._config.restart_wait_s:g} s: {server.failure}")
            process = server.process
            try:
                session.connection = await Connection.open(self._url(server), timeout_s=_CONNECT_TIMEOUT_S)
                return
            except CONNECTION_ERRORS as error:
                self._server_failed(server, process, f"no connection: {type(error).__name__}: {error}")
            await asyncio.sleep(pause)

    async def _ask(self, session: _Session, request: str, deadline_s: float) -> StepResult:
        connection, server = session.connection, session.server
        if not connection:
            raise EnvError(f"session {session.index} has no episode, reset it: {session.failure}")
        process = server.process
        session.expires = self._clock + deadline_s
        try:
            return decode_result(await connection.ask(request), self._config.wire)
        except RefusedError as error:
            failure = f"session {session.index} on {server} refused: {error}"
            session.drop(failure)  # the next reset gets a fresh environment
            self._note(failure)
            raise
        except (EnvError, *CONNECTION_ERRORS) as error:
            if session.connection is connection:
                reason = str(error) if isinstance(error, EnvError) else f"{type(error).__name__}: {error}"
                failure = f"session {session.index}: {reason}"
                session.drop(f"{server}: {failure}")
                self._server_failed(server, process, failure)
            raise EnvError(session.failure) from None
        finally:
            session.expires = math.inf

    def _server_failed(self, server: _Server, process: ServerProcess | None, failure: str) -> None:
        """Begins to put a server right, unless `process`, which failed, has been replaced meanwhile."""
        server_name = str(server)
        server.failure = failure
        self._note(f"{server_name}: {failure}")
        if not process or process is not server.process or not server.up.is_set():
            return
        server.up.clear()
        for session in self._sessions:
            if session.server is server:
                session.drop(f"{server_name} is restarted: {failure}")
        self._spawn(self._restart(server))

    async def _restart(self, server: _Server) -> None:
        assert server.process
        await server.process.kill()
        for pause in self._pauses():
            try:
                await self._start(server)
                server.restarts += 1
                logger.info("%s is up again", server)
                return
            except (EnvError, OSError) as error:
                server.failure = str(error)
                self._note(f"{server} could not be restarted: {error}")
            await asyncio.sleep(pause)

    async def _start(self, server: _Server) -> None:
        config = self._config
        server.process = await ServerProcess.start(
            self._make[0],
            self._make[1],
            sessions=config.sessions_per_server,
            send_admissible=config.send_admissible,
            timeout_s=config.start_deadline_s,
        )
        server.up.set()
        self._spawn(self._watch(server, server.process))

    async def _watch(self, server: _Server, process: ServerProcess) -> None:
        status = await process.wait()
        if process is server.process and server.up.is_set():
            await asyncio.sleep(0)
            self._server_failed(server, process, f"{describe_exit(status)}{process.tail()}")

    async def _open(self) -> None:
        self._spawn(self._tick())
        if not self._config.urls:
            await _all(self._start(server) for server in self._servers)
        for server in self._servers:
            server.up.set()
        await _all(self._probe(session) for session in self._sessions)

    async def _probe(self, session: _Session) -> None:
        """Connects a session and sees that its server has room for it."""
        limit = self._clock + min(self._config.start_deadline_s, 5.0)
        for pause in self._pauses():
            await self._connect(session, limit)
            assert session.connection
            try:
                async with asyncio.timeout(self._config.start_deadline_s):
                    protocol.decode_data(await session.connection.ask(protocol.STATE_REQUEST), "state")
                return
            except RefusedError as error:
                if error.code == protocol.EXECUTION_ERROR:
                    return  # it has a session for us, and nothing to tell before the first reset
                failure = str(error)
            except (EnvError, *CONNECTION_ERRORS) as error:
                failure = f"{type(error).__name__}: {error}"
            session.drop(failure)
            if self._clock + pause > limit:
                wanted = self._config.sessions_per_server
                raise EnvError(
                    f"expected {wanted} sessions on {session.server}, got at session {session.index}: {failure}"
                )
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
                    failure = f"session {session.index}: no answer before the deadline"
                    session.expires = math.inf
                    session.drop(f"{session.server}: {failure}")
                    self._server_failed(session.server, session.server.process, failure)

    async def _shut(self) -> None:
        own = [server.process for server in self._servers if server.process]
        for server in self._servers:
            server.up.clear()
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        if not own:
            await asyncio.gather(
                *(s.connection.close() for s in self._sessions if s.connection and s.busy.acquire(blocking=False))
            )
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        for session in self._sessions:
            session.drop("the pool was closed")
        await asyncio.gather(*(process.stop(2.0) for process in own))

    def _url(self, server: _Server) -> str:
        return f"ws://127.0.0.1:{server.process.port}/ws" if server.process else server.url

    def _pauses(self):
        return (min(self._config.pause_s * 2**i, _LARGEST_PAUSE_S) for i in itertools.count())

    def _note(self, failure: str) -> None:
        logger.warning("%s", failure)
        self._errors.append(failure)

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(coroutine)
        self._tasks.add(task)  # the loop itself holds tasks weakly
        task.add_done_callback(self._tasks.discard)


async def _all(coroutines) -> None:
    """Awaits all; the first failure cancels the rest, and is raised when they have ended."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
