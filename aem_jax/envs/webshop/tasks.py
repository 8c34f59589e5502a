"""Training and evaluation goals of one shop, in splits that share no product, or share no goal.

A hash of a product's or goal's own words determines its split, independent of the seed. The split therefore stays the
same if the products of the shop change. With splits by product, no training goal wants a held-out product. With splits
by goal, a training goal may want one.
"""

import hashlib
import json
import random
from collections.abc import Callable, Mapping
from functools import partial

from aem_jax.envs.protocol import Task
from aem_jax.envs.suite import NumberedTasks, set_name
from aem_jax.envs.webshop.catalog import Catalog
from aem_jax.envs.webshop.goals import Goal


def _wanted(goal: Goal) -> str:
    """Returns the content of a goal, without the order of its words and without its price limit."""
    options = goal.options.values() if isinstance(goal.options, Mapping) else goal.options
    return json.dumps([goal.asin, sorted(goal.attributes), sorted(options)])


HELD_OUT: Mapping[str, Callable[[Goal], str]] = {"products": lambda goal: goal.asin, "goals": _wanted}
"""Unit that no two splits share -> the text whose hash decides a goal's split."""
SPLITS: Mapping[str, tuple[int, int]] = {"test": (0, 10), "valid": (10, 20), "train": (20, 100)}
"""Split -> its range among a hundred parts of all products, or goals."""


def split_of(goal: Goal, held_out: str = "products") -> str:
    """Returns the split of a goal."""
    part = int.from_bytes(hashlib.sha256(f"webshop/{HELD_OUT[held_out](goal)}".encode()).digest()[:8]) % 100
    return next(name for name, (low, high) in SPLITS.items() if low <= part < high)


def goal_tasks(catalog: Catalog, split: str, held_out: str = "products") -> NumberedTasks:
    """Returns all goals of a split in the shop's order, which is shuffled, so any prefix is a fair sample.

    Goals with the same instruction as a goal of an earlier split in `SPLITS` are skipped, because two products may be
    alike.

    Args:
        catalog: the shop.
        split: one of `SPLITS`.
        held_out: one of `HELD_OUT`.

    Raises:
        ValueError: the split does not exist or has no goal.
    """
    if split not in SPLITS:
        raise ValueError(f"expected split to be one of {', '.join(SPLITS)}, got {split!r}")
    names = list(SPLITS)
    place = names.index(split)
    goals = [(names.index(split_of(goal, held_out)), goal.instruction) for goal in catalog.goals]
    known = {instruction for at, instruction in goals if at < place}
    numbers = [number for number, (at, instruction) in enumerate(goals) if at == place and instruction not in known]
    if not numbers:
        raise ValueError(f"expected goals of split {split} in shop {catalog.id}, found none among {len(catalog.goals)}")
    return NumberedTasks(numbers, partial(_goal_task, catalog, split))


def _goal_task(catalog: Catalog, split: str, number: int) -> Task:
    goal = catalog.goals[number]
    return Task(f"{split}-{number}", goal.category, {"goal": goal.to_json(), "shop": catalog.id})


def training_tasks(catalog: Catalog, seed: int = 0, held_out: str = "products") -> NumberedTasks:
    """Returns the training goals, shuffled with the seed."""
    tasks = goal_tasks(catalog, "train", held_out)
    numbers = list(tasks.numbers)
    random.Random(f"training order/{seed}").shuffle(numbers)
    return NumberedTasks(numbers, tasks.make)


def eval_set(catalog: Catalog, split: str, size: int, held_out: str = "products") -> tuple[NumberedTasks, str]:
    """Returns a fixed set of goals, and a name that changes when the content of a goal or of the shop changes.

    Args:
        catalog: the shop.
        split: `valid` or `test`.
        size: number of goals. The set has at most all goals of the split.
        held_out: one of `HELD_OUT`.

    Returns:
        The tasks, and `<split>-<size>-<first 6 hex digits of the SHA-256 over the goals and the shop's id>`.
    """
    if size < 1:
        raise ValueError(f"expected size >= 1, got {size}")
    tasks = goal_tasks(catalog, split, held_out)[:size]
    goals = (json.dumps(task.payload, sort_keys=True).encode() for task in tasks)
    return tasks, set_name(split, len(tasks), (catalog.id.encode(), *goals))
