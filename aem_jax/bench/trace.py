"""A profile of one call as text: which operations took how long, and how long the device had none.

The profiler's file holds planes (a device each, and the host's), these hold lines of events. Of a device the operations
count; on a CPU they run in the host's threads, between much else, so there the shares are those of the threads' time.
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
"""How the lines of a device begin that hold its operations: the first that there is counts. GPUs have streams."""
Event = tuple[str, float, float]
"""Name, start and end in nanoseconds."""


@dataclass(frozen=True)
class Operation:
    """All runs of one operation.

    Attributes:
        name: as the compiler calls it.
        seconds: together.
        count: how often it ran.
    """

    name: str
    seconds: float
    count: int


@dataclass(frozen=True)
class Profile:
    """Of the first device.

    Attributes:
        operations: the longest first.
        busy: seconds in which an operation ran.
        span: seconds from the first operation's start to the last one's end.
    """

    operations: tuple[Operation, ...]
    busy: float
    span: float


def profile(call: Callable[[], Any], folder: str, what: str) -> str:
    """Records one call into `folder`/`what`; what it found, as text.

    Never raises: a profiler that does not work here is what it then says.
    """
    where = Path(folder).expanduser() / what
    try:
        with jax.profiler.trace(str(where)):
            call()
        newest = max(where.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
        # jaxlib 0.12 makes a type that is deprecated on the first read, and aborts the process where that is an error.
        with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
            return as_text(what, read_profile(jax.profiler.ProfileData.from_file(str(newest))))
    except Exception as error:
        return f"{what}: no profile ({type(error).__name__}: {str(error).strip().partition(chr(10))[0]})"


def read_profile(data: Any) -> Profile:
    """Operations of the first device in the profiler's data (`jax.profiler.ProfileData`).

    Raises:
        ValueError: there are none.
    """
    planes = list(data.planes)
    lines = next(
        (found for plane in planes if plane.name.startswith("/device:") and (found := _device_lines(plane))), []
    )
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
    """Each event's time without that of the events inside it: a loop's is not its body's."""
    found: list[list[Any]] = []
    around: list[tuple[float, int]] = []
    for name, start, end in sorted(line, key=lambda event: (event[1], -event[2])):
        while around and around[-1][0] <= start:
            around.pop()
        if around:
            found[around[-1][1]][1] -= min(end, around[-1][0]) - start
        around.append((end, len(found)))
        found.append([name, end - start])
    return [(name, own) for name, own in found]


def covered(spans: list[tuple[float, float]]) -> float:
    """Length of the union of intervals."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(end - max(start, reached), 0.0)
        reached = max(reached, end)
    return total


def as_text(what: str, found: Profile) -> str:
    """The longest operations, one a line, and the gaps between all of them."""
    whole = sum(each.seconds for each in found.operations)
    idle, runs = 1 - found.busy / found.span, sum(each.count for each in found.operations)
    lines = [
        f"{what}: {1e3 * found.span:.3g} ms from first to last operation, none ran in {idle:.1%} of it; "
        f"{runs} runs of {len(found.operations)} operations"
    ]
    lines += [
        f"  {each.seconds / whole:6.1%}  {1e3 * each.seconds:9.3f} ms  {number(each.count):>8} x  {each.name:.100}"
        for each in found.operations[:TOP]
    ]
    return "\n".join(lines)


def _device_lines(plane: Any) -> list[list[Event]]:
    """Operations of a device, line by line."""
    lines = list(plane.lines)
    for start in _LINES:
        chosen = [line for line in lines if line.name.startswith(start)]
        if found := [[(event.name, event.start_ns, event.end_ns) for event in line.events] for line in chosen]:
            return [line for line in found if line]
    return []


def _host_lines(plane: Any) -> list[list[Event]]:
    """The same of a CPU, whose operations have the compiler's names: `dot.3`, `fusion.12`."""
    found = []
    for line in plane.lines:
        stats = [(dict(event.stats), event.start_ns, event.end_ns) for event in line.events]
        found.append([(str(each["hlo_op"]), start, end) for each, start, end in stats if "hlo_op" in each])
    return [line for line in found if line]
