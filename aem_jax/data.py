"""Training tasks in order: shuffled, repeated, a fixed number a round. Order is grain's part, groups the rollout's."""

from collections.abc import Callable, Sequence

import grain
import numpy as np

from aem_jax.trajectory import Task


def task_groups(tasks: Sequence[Task], num_groups: int, *, seed: int) -> Callable[[int, int], list[Task]]:
    """Tasks of each step and round, each becoming a rollout group: a pure function, so there is no state to save.

    The rounds 0 of steps 0, 1, … go through the tasks: every pass has an order of its own, decided by the seed and the
    pass alone, no task is left out or comes twice in a pass, and a step may reach over the end of one. So do the rounds
    1, in other orders, and so on: whether a step needs a second round changes nothing for the steps after it.

    Args:
        tasks: the split to train on.
        num_groups: tasks of one round.
        seed: decides the orders.

    Returns:
        tasks_of(step, round) -> list of num_groups tasks.

    Raises:
        ValueError: there is no task, or num_groups is too small; a step or round below 0.
    """
    if not tasks:
        raise ValueError("expected at least one task, got none; does the split have games?")
    if num_groups < 1:
        raise ValueError(f"expected num_groups ≥ 1, got {num_groups}")
    source = grain.MapDataset.source(tasks)

    def tasks_of(step: int, round: int) -> list[Task]:
        if step < 0 or round < 0:
            raise ValueError(f"expected step ≥ 0 and round ≥ 0, got {step} and {round}")
        own = int(np.random.SeedSequence((seed, round)).generate_state(1)[0]) if round else seed
        # None is what a filter would leave; there is none
        return source.seed(own).shuffle().repeat().batch(num_groups, batch_fn=list)[step] or []

    return tasks_of
