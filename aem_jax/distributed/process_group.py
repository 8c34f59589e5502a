"""The processes of a run as one of them sees them: its index, their number, and small collectives over JSON.

All processes call a collective, in the same order, and all get the same result. A single process sends and encodes
nothing.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ProcessGroup:
    """The processes of a run.

    Attributes:
        index: this process, from 0.
        count: number of processes.
        gather: this process's bytes -> the bytes of every process, in order. Collective.
    """

    index: int
    count: int
    gather: Callable[[bytes], list[bytes]]

    @property
    def is_first(self) -> bool:
        """Whether this process writes the run's files and prints."""
        return self.index == 0

    def gather_json(self, value: Any) -> list[Any]:
        """Every process's value, in order; values are what JSON can hold. Collective."""
        if self.count == 1:
            return [value]
        return [json.loads(data) for data in self.gather(json.dumps(value).encode())]

    def max(self, value: int) -> int:
        """The largest of the processes' values. Collective."""
        return max(self.gather_json(value))

    def broadcast(self, value: Any) -> Any:
        """Process 0's value; the others' values are ignored. Collective."""
        return self.gather_json(value if self.is_first else None)[0]

    def barrier(self) -> None:
        """Waits until all processes are here. Collective."""
        if self.count > 1:
            self.gather(b"")

    def shard(self, size: int, index: int | None = None) -> range:
        """This process's (or process `index`'s) part of `size` items: contiguous, and as even as possible."""
        index = self.index if index is None else index
        return range(-(-index * size // self.count), -(-(index + 1) * size // self.count))


SINGLE_PROCESS = ProcessGroup(0, 1, lambda data: [data])
"""A run of one process."""
