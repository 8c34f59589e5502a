"""What is done ahead of its use, in the background: opening workspaces, and fetching images."""

import contextlib
import logging
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from aem_jax.envs.swe.sandbox.workspace import SandboxError

STARTS = 2
"""Workspaces that are opened at one time."""
IDLE_S = 600.0
"""Seconds after which an unused workspace gives its place to another one."""
_log = logging.getLogger(__name__)


class Warm(Protocol):
    """What a pool keeps: a workspace, or what has one."""

    @property
    def is_alive(self) -> bool:
        """Whether it can still be used."""
        ...

    def close(self) -> None:
        """Ends it."""
        ...


W = TypeVar("W", bound=Warm)


@dataclass(frozen=True)
class _Item(Generic[W]):
    future: Future[W]
    since: float


class WarmPool(Generic[W]):
    """At most `size` workspaces. They hold no reservation: idle ones take little of a host.

    They are closed with their owner. A killed process leaves none behind, because a workspace ends with its process.

    Args:
        owner: the runtime that uses the pool.
        size: the most workspaces.
    """

    def __init__(self, owner: object, size: int):
        weakref.finalize(owner, self.close)
        self._size = size
        self._items: list[tuple[Hashable, _Item[W]]] = []  # the oldest first
        self._lock = threading.Lock()
        self._executor = ThreadPoolExecutor(STARTS, thread_name_prefix="warm") if size else None

    def prepare(self, key: Hashable, make: Callable[[], W], count: int = 1) -> None:
        """Opens a workspace in the background, if there are fewer than `count` for the key and the pool is not full."""
        with self._lock:
            if self._executor is None or sum(key == other for other, _ in self._items) >= count:
                return
            unused = None
            if len(self._items) >= self._size:
                if time.monotonic() - self._items[0][1].since < IDLE_S:
                    return
                _, unused = self._items.pop(0)
            self._items.append((key, _Item(self._executor.submit(make), time.monotonic())))
        if unused is not None:
            _close(unused)

    def take(self, key: Hashable, make: Callable[[], W]) -> W:
        """Returns a workspace of a key, or one from `make` if there is none that works.

        Raises:
            SandboxError: of `make`.
        """
        with self._lock:
            at = next((at for at, (other, _) in enumerate(self._items) if other == key), None)
            item = None if at is None else self._items.pop(at)[1]
        if item is None or item.future.cancel():
            return make()
        try:
            workspace = item.future.result()
        except SandboxError as error:
            _log.warning("a workspace could not be opened ahead: %s", error)
            return make()
        if workspace.is_alive:
            return workspace
        workspace.close()
        return make()

    def close(self) -> None:
        """Closes the workspaces; later ones are not opened ahead."""
        with self._lock:
            items, self._items = self._items, []
            executor, self._executor = self._executor, None
        for _, item in items:
            _close(item)
        if executor is not None:
            executor.shutdown()


def _close(item: _Item) -> None:
    if not item.future.cancel():
        with contextlib.suppress(SandboxError):
            item.future.result().close()


T = TypeVar("T")


class Prefetch(Generic[T]):
    """Fetches images of upcoming tasks in the background, one after another. The thread does not keep a process alive.

    Args:
        fetch: (task, when its list was given, seconds since the epoch) -> whether there is room for more.
    """

    def __init__(self, fetch: Callable[[T, float], bool]):
        self._fetch, self._began = fetch, 0.0
        self._queue: deque[T] = deque()
        self._lock = threading.Lock()
        self._runs = False

    def __call__(self, tasks: Iterable[T]) -> None:
        """Replaces the tasks that are still to be fetched; returns at once."""
        with self._lock:
            self._queue, self._began = deque(tasks), time.time()
            if self._runs or not self._queue:
                return
            self._runs = True
        threading.Thread(target=self._work, name="prefetch", daemon=True).start()

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._queue:
                    self._runs = False
                    return
                task, began = self._queue.popleft(), self._began
            try:
                more = self._fetch(task, began)
            except (SandboxError, ValueError, OSError) as error:  # the environment that needs it will tell why
                _log.info("an image was not fetched ahead: %s", error)
                continue
            with self._lock:
                if not more and began == self._began:
                    self._queue.clear()
