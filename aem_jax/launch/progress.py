"""Progress of a run: a live bar in a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

Report = Callable[[str, int, int, Mapping[str, Any]], None]
"""(phase, done, total, metrics): `done` of `total` units of a phase are finished; called after each."""

SHOWN = (
    ("success", "rollout/success", "{:.0%}"),
    ("return", "rollout/return", "{:.2f}"),
    ("entropy", "entropy/response", "{:.3f}"),
    ("loss", "learner/loss", "{:.4f}"),
    ("grad norm", "learner/grad_norm", "{:.2f}"),
    ("parity", "parity/max", "{:.0e}"),
)
"""Label, metric and format of the numbers to show, in this order; missing metrics are left out."""

SECONDS_BETWEEN_LINES = 5.0


@contextmanager
def open_progress(stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic) -> Iterator[Report]:
    """Opens the progress of a run: phase, step, success, entropy, time left.

    Args:
        stream: to write to; standard output by default. A terminal gets a live bar, anything else lines.
        clock: seconds since any fixed time.

    Yields:
        The function to call after each unit of work.
    """
    console = Console(file=stream or sys.stdout)
    if not console.is_terminal:
        yield plain_progress(stream or sys.stdout, clock)
        return
    columns = (
        SpinnerColumn(),
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[values]}"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}", style="cyan"),
    )
    with Progress(*columns, console=console) as bars:
        yield live_progress(bars, clock)


def live_progress(bars: Progress, clock: Callable[[], float]) -> Report:
    """One bar a phase; a finished phase keeps its bar and last numbers."""
    tasks: dict[str, Any] = {}
    time_left = left_timer(clock)

    def report(phase: str, done: int, total: int, metrics: Mapping[str, Any]) -> None:
        if phase not in tasks:
            for earlier in tasks.values():
                bars.stop_task(earlier)
                bars.update(earlier, left="")
            tasks[phase] = bars.add_task(phase, total=total, values="", left="")
        left = time_left(phase, done, total)
        bars.update(tasks[phase], completed=done, total=total, values=shown(metrics), left=left and f"{left} left")

    return report


def plain_progress(stream: TextIO, clock: Callable[[], float]) -> Report:
    """A line at the first and last unit of each phase, and every few seconds in between."""
    time_left = left_timer(clock)
    last: tuple[str, float] | None = None

    def report(phase: str, done: int, total: int, metrics: Mapping[str, Any]) -> None:
        nonlocal last
        left = time_left(phase, done, total)
        recent = last is not None and last[0] == phase and clock() - last[1] < SECONDS_BETWEEN_LINES
        if recent and done < total:
            return
        last = (phase, clock())
        parts = [f"{phase} {done}/{total}", shown(metrics), left and f"{left} left"]
        print("  ".join(part for part in parts if part), file=stream, flush=True)

    return report


def left_timer(clock: Callable[[], float]) -> Callable[[str, int, int], str]:
    """Time left of a phase, from the pace since its first report, so that a resumed phase is estimated correctly."""
    first: dict[str, tuple[int, float]] = {}

    def left(phase: str, done: int, total: int) -> str:
        start, since = first.setdefault(phase, (done, clock()))
        if done <= start or done >= total:
            return ""
        return clock_time((clock() - since) / (done - start) * (total - done))

    return left


def clock_time(seconds: float) -> str:
    """Seconds → `3:07`, or `1:02:09` from an hour on."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def shown(metrics: Mapping[str, Any]) -> str:
    """The metrics of `SHOWN`, as text."""
    values = [(label, metrics.get(name), form) for label, name, form in SHOWN]
    return "  ".join(f"{label} {form.format(float(value))}" for label, value, form in values if value is not None)
