"""What a process knows of the others: how many there are, which one it is, and how to tell them something.

Every method that speaks to the others is collective: all processes call it, in the same order, and all return the same.
Alone, nothing is sent and nothing is encoded.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Hosts:
    """The processes of a run, as one of them sees them.

    Attributes:
        index: this process, from 0.
        count: how many there are.
        gather: what this process says -> what each of them said, in order. Collective.
    """

    index: int
    count: int
    gather: Callable[[bytes], list[bytes]]

    @property
    def is_first(self) -> bool:
        """Whether this is the one process that writes files and speaks to people."""
        return self.index == 0

    def gather_json(self, value: Any) -> list[Any]:
        """What each process says, of what JSON can hold."""
        if self.count == 1:
            return [value]
        return [json.loads(each) for each in self.gather(json.dumps(value).encode())]

    def largest(self, value: int) -> int:
        """The largest of all processes' values."""
        return max(self.gather_json(value))

    def of_first(self, value: Any) -> Any:
        """What process 0 says; the others' values are not looked at."""
        return self.gather_json(value if self.is_first else None)[0]

    def wait(self) -> None:
        """Until all processes are here."""
        if self.count > 1:
            self.gather(b"")

    def share(self, size: int, index: int | None = None) -> range:
        """Which of `size` things are this process's (or that of `index`): runs of neighbours, as even as can be."""
        index = self.index if index is None else index
        return range(-(-index * size // self.count), -(-(index + 1) * size // self.count))


ALONE = Hosts(0, 1, lambda data: [data])
"""A run of one process."""
