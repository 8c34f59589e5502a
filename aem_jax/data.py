"""Training tasks in order: shuffled, repeated, a fixed number a step. Order is grain's part, groups the rollout's."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import grain

from aem_jax.trajectory import Task


class TaskGroups(Iterator[list[Task]]):
    """Endless lists of tasks, each of which becomes a rollout group.

    Every pass over the tasks has an order of its own, decided by the seed and the pass alone; a step may reach over the
    end of a pass. No task is left out or comes twice in a pass.
    """

    def __init__(self, tasks: Sequence[Task], num_groups: int, *, seed: int):
        """See `task_groups`."""
        if not tasks:
            raise ValueError("expected at least one task, got none; does the split have games?")
        if num_groups < 1:
            raise ValueError(f"expected num_groups ≥ 1, got {num_groups}")
        order = grain.MapDataset.source(list(tasks)).seed(seed).shuffle().repeat()
        steps = order.batch(num_groups, batch_fn=list)
        # Tasks lie in memory: threads would only make the end of the process less certain.
        self._steps = iter(steps.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)))

    def __next__(self) -> list[Task]:
        return next(self._steps)

    def get_state(self) -> dict[str, Any]:
        """Where the iterator stands, for JSON."""
        return dict(self._steps.get_state())

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Goes to where `get_state` was called, on the same tasks, num_groups and seed."""
        self._steps.set_state(dict(state))


def task_groups(tasks: Sequence[Task], num_groups: int, *, seed: int, start: int = 0) -> TaskGroups:
    """Tasks of step `start`, `start` + 1, …

    Args:
        tasks: the split to train on.
        num_groups: tasks of one step.
        seed: decides the order.
        start: the first step to give; the same lists come as from an iterator that was advanced that far.

    Raises:
        ValueError: there is no task, or num_groups or start is too small.
    """
    if start < 0:
        raise ValueError(f"expected start ≥ 0, got {start}")
    groups = TaskGroups(tasks, num_groups, seed=seed)
    groups.set_state({**groups.get_state(), "next_index": start})
    return groups
