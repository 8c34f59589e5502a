"""Ctrl-C and SIGTERM: the first asks a run to stop after the current step, a second Ctrl-C ends the process at once.

A Python signal handler runs only when the main thread returns to the interpreter, which can take a minute during a long
compilation. So a thread also reads the signals from a wake-up pipe, which the C handler fills at once.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator

EXIT_AT_ONCE = 130


class StoppedError(Exception):
    """The run was asked to stop outside of the training steps.

    Attributes:
        exit_status: of the process.
    """

    def __init__(self, exit_status: int):
        super().__init__("the run was asked to stop")
        self.exit_status = exit_status


class StopRequest:
    """Whether the run has been asked to stop, and by which signal.

    Args:
        agree: this process's signal number -> the maximum over all processes, so that a signal to one stops all.
    """

    def __init__(self, agree: Callable[[int], int] = lambda number: number) -> None:
        self._event = threading.Event()
        self._agree = agree
        self._number = self._agreed = 0

    @property
    def requested(self) -> bool:
        """Whether this process has received a signal."""
        return self._event.is_set()

    def look(self) -> bool:
        """Whether the run has to stop. Collective: all processes call it at the same points and get the same answer."""
        self._agreed = self._agreed or self._agree(self._number)
        return bool(self._agreed)

    def check(self) -> None:
        """Stops the current phase if a process was asked to. Collective.

        Raises:
            StoppedError: a process was asked to stop.
        """
        if self.look():
            raise StoppedError(self.exit_status)

    @property
    def exit_status(self) -> int:
        """128 + the signal, as in shells: 130 for Ctrl-C, 143 for SIGTERM; 0 if no `look` has seen a signal."""
        return 128 + self._agreed if self._agreed else 0

    def signalled(self, number: int) -> bool:
        """Records the first signal; returns True for a later Ctrl-C, which ends the process at once."""
        if self.requested:
            return number == signal.SIGINT
        self._number = number
        self._event.set()
        return False


@contextlib.contextmanager
def undone_on_interrupt() -> Iterator[None]:
    """Raises KeyboardInterrupt on Ctrl-C while the block runs, so that its cleanup runs. Main thread only."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def stop_on_signals(
    agree: Callable[[int], int] = lambda number: number, says: str = "stopping"
) -> Iterator[StopRequest]:
    """Yields a request that SIGINT and SIGTERM set while the block runs; see its `agree`. Main thread only.

    `says` is printed at the first signal.
    """
    request = StopRequest(agree)
    numbers = (signal.SIGINT, signal.SIGTERM)
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    # Empty handlers: the wake-up pipe receives only signals that Python handles.
    before = {number: signal.signal(number, lambda *_: None) for number in numbers}
    wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    watcher = threading.Thread(target=_watch, args=(reader, request, says), name="signals", daemon=True)
    watcher.start()
    try:
        yield request
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(writer)  # ends the watcher
        watcher.join(timeout=1.0)
        os.close(reader)


def _watch(reader: int, request: StopRequest, says: str) -> None:
    while received := os.read(reader, 1):
        number = received[0]
        if number not in (signal.SIGINT, signal.SIGTERM):
            continue
        first = not request.requested
        if request.signalled(number):
            os._exit(EXIT_AT_ONCE)  # not sys.exit: the main thread may be deep inside a computation
        if first:
            print(f"\n{says}; Ctrl-C again quits at once", file=sys.stderr, flush=True)
