"""A pool of environment sessions with futures, which recovers from servers that die, hang or send malformed replies.

A background thread runs an asyncio loop. Every call has a deadline. Only time in which this process is awake counts, so
no server fails because this process is stopped, suspended, or compiling with the interpreter lock held. A failure
affects only the episodes on its server, whose calls raise `EnvError`. The pool kills and restarts its own servers at
once, and reconnects to other servers with growing pauses. The next `reset` waits for the server.
"""

import asyncio
import concurrent.futures
import functools
import logging
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping
from typing import Any

from aem_jax.envs.protocol import EnvError, StepResult
from aem_jax.envs.registry import check_name
from aem_jax.envs.serving.address import bearer, websocket_url
from aem_jax.envs.serving.config import PoolConfig, PoolStats
from aem_jax.envs.serving.field_mapping import decode_step, encode_reset, step_encoder
from aem_jax.envs.serving.pool_session import Clock, PoolSession
from aem_jax.envs.serving.process import ServerProcess
from aem_jax.envs.serving.supervisor import Supervisor

__all__ = ["EnvPool", "PoolConfig", "PoolStats"]

logger = logging.getLogger(__name__)


class EnvPool:
    """Environment sessions 0 … capacity − 1, each with at most one pending call.

    Args:
        config: where the environments run, and their deadlines.
        make: name and settings of the environment that the pool's own servers serve; unused with `config.urls` or
            `config.command`.

    Raises:
        ValueError: unknown environment, bad URL, or no token where `config` names one.
        EnvError: a server cannot be started or reached, or has too few sessions; with the reason.
    """

    def __init__(self, config: PoolConfig, make: tuple[str, Mapping[str, Any]]):
        self._config = config
        self._encode_step = step_encoder(config.field_mapping)
        urls = [websocket_url(url) for url in config.urls]
        headers = bearer(config.token_variable)
        if config.command:
            launch = functools.partial(ServerProcess.start_command, config.command, timeout_s=config.start_deadline_s)
        else:
            if not urls:
                check_name(make[0])  # not imported: only its server loads an environment's packages
            launch = functools.partial(
                ServerProcess.start,
                *make,
                sessions=config.sessions_per_server,
                send_admissible=config.send_admissible,
                timeout_s=config.start_deadline_s,
            )
        self._servers = [
            Supervisor(index, url, launch, config.first_pause_s, self._on_failure, self._spawn)
            for index, url in enumerate(urls or [""] * config.num_servers)
        ]
        # Neighbouring sessions, often of one group, are on different servers, so that a failure is spread.
        count = config.sessions_per_server * len(self._servers)
        self._clock = Clock()
        self._sessions = [
            PoolSession(i, self._servers[i % len(self._servers)], config, self._clock, headers) for i in range(count)
        ]
        self._pending: dict[int, concurrent.futures.Future[StepResult]] = {}
        self._calls = self._failed_calls = 0
        self._errors: deque[str] = deque(maxlen=100)
        self._lock = threading.Lock()
        self._closed = False
        self._loop = asyncio.new_event_loop()
        self._tasks: set[asyncio.Task[None]] = set()
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
        """Current process ids of the servers that the pool started."""
        return tuple(server.process.pid for server in self._servers if server.process)

    def server_of(self, session: int) -> int:
        """Index of a session's server."""
        return self._sessions[session].server.index

    def reset(self, session: int, payload: Mapping[str, Any]) -> concurrent.futures.Future[StepResult]:
        """Starts an episode of the task `payload`. If the server is being restarted, the call waits for it.

        Returns:
            A future of the first result, or of an `EnvError`. It has a deadline and cannot be cancelled.

        Raises:
            ValueError: the payload is not JSON, the session does not exist or is busy, or the pool is closed.
        """
        request = encode_reset(payload)
        return self._submit(session, lambda chosen: chosen.reset(request))

    def step(self, session: int, text: str) -> concurrent.futures.Future[StepResult]:
        """Sends a response of the policy to an episode. The future and the errors are those of `reset`."""
        request = self._encode_step(text)
        return self._submit(session, lambda chosen: chosen.call(request, self._config.step_deadline_s, decode_step))

    def waits(self, session: int) -> bool:
        """Whether the pending call of a session waits for room on the server's host, which other episodes hold."""
        return self._sessions[session].waits

    def release(self, session: int) -> None:
        """Ends an episode that the server has not ended, so that what it holds on the server's host is free.

        Raises:
            ValueError: the session has a pending call.
        """
        with self._lock:
            if session in self._pending and not self._pending[session].done():
                raise ValueError(f"expected no pending call on session {session} when it is released, got one")
            if not self._closed:
                self._loop.call_soon_threadsafe(self._spawn, self._sessions[session].release())

    def stats(self) -> PoolStats:
        """Returns counters and the latest errors, for metrics."""
        restarts = tuple(server.restarts for server in self._servers)
        return PoolStats(self._calls, self._failed_calls, restarts, tuple(self._errors))

    def close(self) -> None:
        """Ends all sessions and the pool's own servers; pending calls raise `EnvError`. A second call does nothing."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._opening.cancel()  # if the constructor was interrupted
        asyncio.run_coroutine_threadsafe(self._shut(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def __enter__(self) -> "EnvPool":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _submit(
        self, index: int, call: Callable[[PoolSession], Awaitable[StepResult]]
    ) -> concurrent.futures.Future[StepResult]:
        if not 0 <= index < self.capacity:
            raise ValueError(f"expected a session from 0 to {self.capacity - 1}, got {index}")
        session = self._sessions[index]
        future: concurrent.futures.Future[StepResult] = concurrent.futures.Future()
        future.set_running_or_notify_cancel()
        with self._lock:
            if self._closed:
                raise ValueError("expected an open pool, got a closed one")
            if index in self._pending and not self._pending[index].done():
                raise ValueError(f"expected one call at a time on session {index}, got one more while one is under way")
            self._pending[index] = future
            self._calls += 1
            self._loop.call_soon_threadsafe(self._spawn, self._run_call(session, call, future))
        return future

    # Everything below runs in the loop's thread.

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """Starts a task, and keeps it until it ends: the event loop itself holds only weak references."""
        task = self._loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run_call(
        self,
        session: PoolSession,
        call: Callable[[PoolSession], Awaitable[StepResult]],
        future: concurrent.futures.Future[StepResult],
    ) -> None:
        try:
            result = await call(session)
        except Exception as error:
            self._failed_calls += 1
            future.set_exception(error)
        else:
            future.set_result(result)

    def _on_failure(self, server: Supervisor, failure: str, lost: bool) -> None:
        logger.warning("%s", failure)
        self._errors.append(failure)
        for session in self._sessions:
            if lost and session.server is server:
                session.drop(failure, lost=True)

    async def _open(self) -> None:
        self._spawn(self._keep_deadlines())
        await _all(server.start() for server in self._servers)
        await _all(session.probe() for session in self._sessions)

    async def _keep_deadlines(self) -> None:
        while True:
            await self._clock.advance()
            for session in self._sessions:
                session.end_if_expired()

    async def _shut(self) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for index, future in self._pending.items():
            if not future.done():
                future.set_exception(EnvError("the pool was closed"))
                self._sessions[index].drop("the pool was closed")
        await asyncio.gather(*(session.close() for session in self._sessions))
        await asyncio.gather(*(server.stop() for server in self._servers))
        if rest := asyncio.all_tasks() - {asyncio.current_task()}:
            await asyncio.wait(rest, timeout=2.0)  # an interrupted start ends its process


async def _all(awaitables: Iterable[Awaitable[None]]) -> None:
    """Awaits all, then raises the first failure, so that nothing is left half started."""
    results = await asyncio.gather(*awaitables, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
