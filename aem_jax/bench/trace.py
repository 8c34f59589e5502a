"""A profile of one call as text: the time of its operations, and the time in which the device had none.

The profiler's file contains planes (one for each device, and the host's), and planes contain lines of events. Of a
device only operations count. On a CPU they run in the host's threads, so the shares are those of the threads' time.
"""

import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from aem_jax.bench.page import number

TOP = 15
_LINES = ("XLA Ops", "Stream")
"""Prefixes of a device's lines of operations: the first one that a device has counts. GPUs have streams."""
Event = tuple[str, float, float]
"""Name, start and end in nanoseconds."""


@dataclass(frozen=True)
class Operation:
    """All runs of one operation.

    Attributes:
        name: the compiler's.
        seconds: total time.
        count: number of runs.
    """

    name: str
    seconds: float
    count: int


@dataclass(frozen=True)
class Profile:
    """Operations of the first device.

    Attributes:
        operations: the longest first.
        busy: seconds in which an operation ran.
        span: seconds from the start of the first operation to the end of the last one.
    """

    operations: tuple[Operation, ...]
    busy: float
    span: float


def profile(call: Callable[[], Any], folder: str, what: str) -> str:
    """Records one call into `folder`/`what`; returns its profile as text.

    Never raises: if the profiler does not work here, the text gives the reason.
    """
    where = Path(folder).expanduser() / what
    try:
        with jax.profiler.trace(str(where)):
            call()
        newest = max(where.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
        # The first read in jaxlib 0.12 creates a deprecated type, and aborts the process if warnings are errors.
        with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
            return as_text(what, read_profile(jax.profiler.ProfileData.from_file(str(newest))))
    except Exception as error:
        return f"{what}: no profile ({type(error).__name__}: {str(error).strip().partition(chr(10))[0]})"


def read_profile(data: Any) -> Profile:
    """Reads the operations of the first device from the profiler's data (`jax.profiler.ProfileData`).

    Raises:
        ValueError: there are none.
    """
    planes = list(data.planes)
    devices = (_device_lines(plane) for plane in planes if plane.name.startswith("/device:"))
    lines = next(filter(None, devices), [])
    lines = lines or [line for plane in planes if plane.name.startswith("/host:CPU") for line in _host_lines(plane)]
    seconds: dict[str, float] = defaultdict(float)
    count: dict[str, int] = defaultdict(int)
    for line in lines:
        for name, own in own_times(line):
            seconds[name] += own / 1e9
            count[name] += 1
    spans = [(start, end) for line in lines for _, start, end in line]
    if not spans:
        raise ValueError("expected operations in the profile, got none")
    return Profile(
        tuple(Operation(name, seconds[name], count[name]) for name in sorted(seconds, key=lambda name: -seconds[name])),
        busy=covered(spans) / 1e9,
        span=(max(end for _, end in spans) - min(start for start, _ in spans)) / 1e9,
    )


def own_times(line: Sequence[Event]) -> list[tuple[str, float]]:
    """Each event's time without the events inside it, so that a loop's time excludes its body."""
    times: list[list[Any]] = []
    enclosing: list[tuple[float, int]] = []
    for name, start, end in sorted(line, key=lambda event: (event[1], -event[2])):
        while enclosing and enclosing[-1][0] <= start:
            enclosing.pop()
        if enclosing:
            times[enclosing[-1][1]][1] -= min(end, enclosing[-1][0]) - start
        enclosing.append((end, len(times)))
        times.append([name, end - start])
    return [(name, own) for name, own in times]


def covered(spans: list[tuple[float, float]]) -> float:
    """Length of the union of intervals."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(end - max(start, reached), 0.0)
        reached = max(reached, end)
    return total


def as_text(what: str, profile: Profile) -> str:
    """The longest operations, one a line, and the share of time without any operation."""
    total = sum(operation.seconds for operation in profile.operations)
    idle, runs = 1 - profile.busy / profile.span, sum(operation.count for operation in profile.operations)
    lines = [
        f"{what}: {1e3 * profile.span:.3g} ms from first to last operation, none ran in {idle:.1%} of it; "
        f"{runs} runs of {len(profile.operations)} operations"
    ]
    lines += [
        f"  {operation.seconds / total:6.1%}  {1e3 * operation.seconds:9.3f} ms  {number(operation.count):>8} x  "
        f"{operation.name:.100}"
        for operation in profile.operations[:TOP]
    ]
    return "\n".join(lines)


def _device_lines(plane: Any) -> list[list[Event]]:
    """Operations of a device, line by line."""
    lines = list(plane.lines)
    for prefix in _LINES:
        if chosen := [line for line in lines if line.name.startswith(prefix)]:
            events = ([(event.name, event.start_ns, event.end_ns) for event in line.events] for line in chosen)
            return [line for line in events if line]
    return []


def _host_lines(plane: Any) -> list[list[Event]]:
    """Operations of a CPU; they have the compiler's names: `dot.3`, `fusion.12`."""
    lines = []
    for line in plane.lines:
        events = [(dict(event.stats), event.start_ns, event.end_ns) for event in line.events]
        lines.append([(str(stats["hlo_op"]), start, end) for stats, start, end in events if "hlo_op" in stats])
    return [line for line in lines if line]
