"""Starts, watches and restarts one environment server. A server that is given by its URL is not managed."""

import asyncio
import itertools
import logging
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from typing import Any

from aem_jax.envs.protocol import EnvError
from aem_jax.envs.serving.address import without_password
from aem_jax.envs.serving.process import ServerProcess, describe_exit

logger = logging.getLogger(__name__)

_LARGEST_PAUSE_S = 10.0


def pauses(first_s: float) -> Iterator[float]:
    """Yields seconds to wait between attempts, without end. They double up to ten."""
    return (min(first_s * 2**i, _LARGEST_PAUSE_S) for i in itertools.count())


class Supervisor:
    """Supervises one server.

    Args:
        index: the server's number in the pool.
        url: address of a server that is already running; empty for a server of the pool.
        launch: starts the process of a server of the pool, or raises EnvError.
        first_pause_s: pause after a failed start.
        on_failure: called with a description when the server fails, and with whether its sessions are lost.
        spawn: starts a task. Its owner cancels the tasks before it stops the supervisor.

    Attributes:
        up: set while the server accepts connections; always set for a server that is given by its URL.
        restarts: number of restarts.
        failure: the last failure.
    """

    def __init__(
        self,
        index: int,
        url: str,
        launch: Callable[[], Awaitable[ServerProcess]],
        first_pause_s: float,
        on_failure: Callable[["Supervisor", str, bool], None],
        spawn: Callable[[Coroutine[Any, Any, None]], None],
    ):
        self.index = index
        self.up = asyncio.Event()
        self.process: ServerProcess | None = None
        self.restarts = 0
        self.failure = ""
        self._url, self._launch, self._first_pause_s, self._on_failure = url, launch, first_pause_s, on_failure
        self._spawn = spawn

    def __str__(self) -> str:
        where = f"pid {self.process.pid}" if self.process else without_password(self._url)
        return f"environment server {self.index} ({where})"

    @property
    def url(self) -> str:
        """The current session endpoint."""
        return self._url or (f"ws://127.0.0.1:{self.process.port}/ws" if self.process else "")

    async def start(self) -> None:
        """Starts and watches the process of a server of the pool.

        Raises:
            EnvError: the process does not start.
        """
        if not self._url:
            self.process = await self._launch()
            self._spawn(self._watch(self.process))
        self.up.set()

    def failed(self, process: ServerProcess | None, failure: str) -> None:
        """Reports a failure, and restarts a server of the pool.

        Args:
            process: the process of the connection that failed. If it has been replaced, the failure is ignored.
            failure: description.
        """
        if process is not None and process is not self.process:
            return  # reported when it was replaced
        repeated = failure == self.failure and not process
        self.failure = failure
        restart = process is not None and self.up.is_set()
        if not repeated:
            self._on_failure(self, f"{self}: {failure}", restart)
        if restart:
            self.up.clear()
            self._spawn(self._restart())

    def note(self, failure: str) -> None:
        """Reports a failure that affects only its call."""
        self._on_failure(self, failure, False)

    async def stop(self) -> None:
        """Ends the process."""
        self.up.clear()
        if self.process:
            await self.process.stop(2.0)

    async def _watch(self, process: ServerProcess) -> None:
        status = await process.wait()
        await asyncio.sleep(0.02)  # its last output may still arrive
        self.failed(process, f"{describe_exit(status)}{process.tail()}")

    async def _restart(self) -> None:
        assert self.process
        await self.process.kill()
        for pause in pauses(self._first_pause_s):
            try:
                await self.start()
                self.restarts += 1
                logger.info("%s is up again", self)
                return
            except (EnvError, OSError) as error:
                self.failure = str(error)
                self.note(f"{self} could not be started again: {error}")
            await asyncio.sleep(pause)
