"""Training and evaluation goals of one shop, in splits that share no product, or share no goal.

A hash of a product's or goal's own words determines its split, independent of the seed. The split therefore stays the
same if the products of the shop change. With splits by product, no training goal was written for a held-out product,
or has the wish of a held-out goal. A held-out product may still satisfy a training goal: products are alike, and a goal
does not say everything. With splits by goal, training goals may have been written for the same products.
"""

import hashlib
import json
import random
from collections.abc import Callable, Mapping
from functools import partial

from aem_jax.envs.protocol import Task
from aem_jax.envs.suite import NumberedTasks, set_name
from aem_jax.envs.webshop.catalog import Catalog
from aem_jax.envs.webshop.goals import PRICE_TEXT, Goal


def _requirements(goal: Goal) -> list[list[str]]:
    """Returns the attributes and options of a goal, without their order."""
    options = goal.options.values() if isinstance(goal.options, Mapping) else goal.options
    return [sorted(goal.attributes), sorted(options)]


def wishes(goal: Goal) -> tuple[str, ...]:
    """Returns what a goal wants of any product, in two forms: its requirements of a kind of product, and its words.

    Neither contains the price limit, which is random.
    """
    return json.dumps([goal.kind, *_requirements(goal)]), PRICE_TEXT.sub("", goal.instruction)


HELD_OUT: Mapping[str, Callable[[Goal], str]] = {
    "products": lambda goal: goal.asin,
    "goals": lambda goal: json.dumps([goal.asin, *_requirements(goal)]),
}
"""Unit that no two splits share -> the text whose hash decides a goal's split."""
_SAME: Mapping[str, Callable[[Goal], tuple[str, ...]]] = {"products": wishes, "goals": lambda goal: (goal.instruction,)}
"""Unit that no two splits share -> texts by which two goals are the same. Splits by goal are the original's setting, in
which goals for the same product may differ in one option."""
SPLITS: Mapping[str, tuple[int, int]] = {"test": (0, 10), "valid": (10, 20), "train": (20, 100)}
"""Split -> its range among a hundred parts of all products, or goals."""


def split_of(goal: Goal, held_out: str = "products") -> str:
    """Returns the split of a goal."""
    part = int.from_bytes(hashlib.sha256(f"webshop/{HELD_OUT[held_out](goal)}".encode()).digest()[:8]) % 100
    return next(name for name, (low, high) in SPLITS.items() if low <= part < high)


def goal_tasks(catalog: Catalog, split: str, held_out: str = "products") -> NumberedTasks:
    """Returns all goals of a split in the shop's order, which is shuffled, so any prefix is a fair sample.

    Goals that want the same as a goal of an earlier split in `SPLITS` are skipped, because two products may be alike:
    with splits by product, goals with the same `wishes`; with splits by goal, goals with the same instruction.

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
    goals = [(names.index(split_of(goal, held_out)), _SAME[held_out](goal)) for goal in catalog.goals]
    known = {text for at, texts in goals if at < place for text in texts}
    numbers = [number for number, (at, texts) in enumerate(goals) if at == place and known.isdisjoint(texts)]
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
