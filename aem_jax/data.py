"""The order of training tasks: shuffled, repeated, a fixed number each round, by grain."""

from collections.abc import Callable, Sequence

import grain
import numpy as np

from aem_jax.envs.protocol import Task


def task_groups(tasks: Sequence[Task], num_groups: int, *, seed: int) -> Callable[[int, int], list[Task]]:
    """Returns a pure function (step, round) -> tasks, one for each rollout group; there is no state to save.

    The rounds 0 of steps 0, 1, … iterate over passes of the tasks. Each pass is a permutation that depends on the seed
    and the pass alone; a step may span the end of one. The rounds 1 iterate likewise in other orders, and so on, so a
    second round in one step does not change the steps after it.

    Args:
        tasks: the training split.
        num_groups: tasks in one round.
        seed: of the orders.

    Returns:
        tasks_of(step, round) -> list of num_groups tasks.

    Raises:
        ValueError: no tasks, num_groups below 1, or a step or round below 0.
    """
    if not tasks:
        raise ValueError("expected at least one task, got none; does the split have games?")
    if num_groups < 1:
        raise ValueError(f"expected num_groups ≥ 1, got {num_groups}")
    source = grain.MapDataset.source(tasks)

    def tasks_of(step: int, round: int) -> list[Task]:
        if step < 0 or round < 0:
            raise ValueError(f"expected step ≥ 0 and round ≥ 0, got {step} and {round}")
        round_seed = int(np.random.SeedSequence((seed, round)).generate_state(1)[0]) if round else seed
        # grain's type allows None for filtered elements; nothing is filtered here
        return source.seed(round_seed).shuffle().repeat().batch(num_groups, batch_fn=list)[step] or []

    return tasks_of
