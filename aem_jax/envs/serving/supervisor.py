"""Keeps one environment server up: starts it, notices its end, starts it again. Foreign ones it only names."""

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
    """Seconds to wait between tries: doubling, up to ten, for ever."""
    return (min(first_s * 2**i, _LARGEST_PAUSE_S) for i in itertools.count())


class Tasks:
    """Tasks that run beside their creator. The event loop itself holds tasks weakly, so somebody must hold them."""

    def __init__(self):
        self._tasks: set[asyncio.Task] = set()

    def spawn(self, coroutine: Coroutine[Any, Any, Any]) -> None:
        """Begins a task."""
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def cancel(self) -> None:
        """Ends them all, and waits until they have ended."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class Supervisor:
    """One server.

    Args:
        index: its number in the pool.
        url: where a foreign server listens; empty for an own one.
        launch: starts the process of an own server, or raises EnvError.
        first_pause_s: pause after a failed start.
        on_failure: called with a description when the server fails; `lost` says whether its sessions are lost with it.

    Attributes:
        up: set while connections make sense: always, for a foreign server.
        restarts: how often it was started again.
        failure: what went wrong last.
    """

    def __init__(
        self,
        index: int,
        url: str,
        launch: Callable[[], Awaitable[ServerProcess]],
        first_pause_s: float,
        on_failure: Callable[["Supervisor", str, bool], None],
    ):
        self.index = index
        self.up = asyncio.Event()
        self.process: ServerProcess | None = None
        self.restarts = 0
        self.failure = ""
        self._url, self._launch, self._first_pause_s, self._on_failure = url, launch, first_pause_s, on_failure
        self._tasks = Tasks()

    def __str__(self) -> str:
        where = f"pid {self.process.pid}" if self.process else without_password(self._url)
        return f"environment server {self.index} ({where})"

    @property
    def url(self) -> str:
        """Its session endpoint as of now."""
        return self._url or (f"ws://127.0.0.1:{self.process.port}/ws" if self.process else "")

    async def start(self) -> None:
        """Starts an own server, and watches it from then on.

        Raises:
            EnvError: it does not start.
        """
        if not self._url:
            self.process = await self._launch()
            self._tasks.spawn(self._watch(self.process))
        self.up.set()

    def failed(self, process: ServerProcess | None, failure: str) -> None:
        """Reports a failure. An own server is started again, unless `process`, which failed, was replaced meanwhile.

        Args:
            process: `self.process` as it was when the connection that failed was made.
            failure: what happened.
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
            self._tasks.spawn(self._restart())

    def note(self, failure: str) -> None:
        """Reports a failure that costs no more than the call it happened to."""
        self._on_failure(self, failure, False)

    async def stop(self) -> None:
        """Ends the process and everything that would start it again."""
        self.up.clear()
        await self._tasks.cancel()
        if self.process:
            await self.process.stop(2.0)

    async def _watch(self, process: ServerProcess) -> None:
        status = await process.wait()
        await asyncio.sleep(0.02)  # its last words may still be on their way
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
