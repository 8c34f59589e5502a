"""Which goals are trained on and which are evaluated: splits that share no product, from one shop.

A goal belongs to the split of the product that it was written for, and that is drawn from the product's id alone. So no
product is wanted in two splits, whatever the seed, and a product keeps its split when a shop is restocked.
"""

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

from aem_jax.envs.webshop.catalog import Catalog

SPLITS: Mapping[str, tuple[int, int]] = {"test": (0, 10), "valid": (10, 20), "train": (20, 100)}
"""Split -> which of a hundred parts of all products it has."""


@dataclass(frozen=True)
class GoalTask:
    """One goal to shop for.

    Attributes:
        id: stable name, unique inside its source.
        kind: the category of the product wanted.
        payload: JSON mapping for the environment.
    """

    id: str
    kind: str
    payload: Mapping[str, Any]


class GoalTasks(Sequence[GoalTask]):
    """Goals of a catalog as tasks; read when looked at.

    Args:
        catalog: the shop.
        split: for the tasks' ids.
        numbers: of the goals.
    """

    def __init__(self, catalog: Catalog, split: str, numbers: Sequence[int]):
        self._catalog, self.split, self.numbers = catalog, split, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, item: int) -> GoalTask: ...
    @overload
    def __getitem__(self, item: slice) -> "GoalTasks": ...
    def __getitem__(self, item: int | slice) -> "GoalTask | GoalTasks":
        if isinstance(item, slice):
            return GoalTasks(self._catalog, self.split, self.numbers[item])
        number = self.numbers[item]
        goal = self._catalog.goals[number]
        return GoalTask(f"{self.split}-{number}", goal.category, {"goal": goal.to_json(), "shop": self._catalog.id})


def split_of(asin: str) -> str:
    """The split of the goals of a product."""
    part = int.from_bytes(hashlib.sha256(f"webshop/{asin}".encode()).digest()[:8]) % 100
    return next(name for name, (low, high) in SPLITS.items() if low <= part < high)


def goal_tasks(catalog: Catalog, split: str) -> GoalTasks:
    """All goals of a split, in the shop's order of goals, which is a shuffled one: any prefix is a fair sample.

    Left out are goals in the very words of one of an earlier split of `SPLITS`: two products may be alike.

    Raises:
        ValueError: no such split, or no goal in it.
    """
    if split not in SPLITS:
        raise ValueError(f"expected split to be one of {', '.join(SPLITS)}, got {split!r}")
    names = list(SPLITS)
    place = names.index(split)
    said = [(names.index(split_of(goal.asin)), goal.instruction) for goal in catalog.goals]
    known = {instruction for at, instruction in said if at < place}
    numbers = [number for number, (at, instruction) in enumerate(said) if at == place and instruction not in known]
    if not numbers:
        raise ValueError(f"expected goals of split {split} in shop {catalog.id}, found none among {len(catalog.goals)}")
    return GoalTasks(catalog, split, numbers)


def training_tasks(catalog: Catalog, seed: int = 0) -> GoalTasks:
    """The goals to train on, in an order of this seed."""
    tasks = goal_tasks(catalog, "train")
    numbers = list(tasks.numbers)
    random.Random(f"training order/{seed}").shuffle(numbers)
    return GoalTasks(catalog, "train", numbers)


def eval_set(catalog: Catalog, split: str, size: int) -> tuple[GoalTasks, str]:
    """A fixed set of goals, and a name that changes when anything in one of them or in the shop changes.

    Args:
        catalog: the shop.
        split: `valid` or `test`.
        size: number of goals; at most all there are.

    Returns:
        The tasks, and `<split>-<size>-<first 6 hex digits of the SHA-256 over the goals and the shop's id>`.
    """
    if size < 1:
        raise ValueError(f"expected size >= 1, got {size}")
    tasks = goal_tasks(catalog, split)[:size]
    digest = hashlib.sha256(catalog.id.encode())
    for task in tasks:
        digest.update(json.dumps(task.payload, sort_keys=True).encode())
    return tasks, f"{split}-{len(tasks)}-{digest.hexdigest()[:6]}"
