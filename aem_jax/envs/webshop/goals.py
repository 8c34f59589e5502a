"""The goals of WebShop's customers, drawn from annotated products with the original's method, but from a seed.

The original draws prices of products with a price range, and the price limits of goals, from Python's global random
state before it seeds that state. Two runs of one experiment therefore have different goals. Here, one seeded stream
draws them in the original's order. With seed 233, the goals equal those of the original when it is started with that
seed.
"""

import itertools
import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from aem_jax.envs.webshop.products import Product

PRICE_LIMITS = tuple(10.0 * i for i in range(1, 100))
NO_LIMIT = 1_000_000.0
PRICE_TEXT = re.compile(r",? and price lower than ([\d.]+) dollars")
"""The price limit in an instruction."""
ORDER_SEED = 233
"""Seed with which the original shuffles its goals, independent of all other randomness."""


@dataclass(frozen=True, slots=True)
class Goal:
    """A customer's goal.

    Attributes:
        asin: the product that the goal was written for; other products may satisfy it too.
        category: that product's category.
        query: that product's query.
        title: that product's title.
        kind: that product's path in the shop's category tree.
        instruction: the customer's instruction.
        attributes: required attributes of the purchase.
        options: option values to choose, or name -> value in synthetic goals.
        price_limit: maximum price in dollars.
    """

    asin: str
    category: str
    query: str
    title: str
    kind: str
    instruction: str
    attributes: tuple[str, ...]
    options: tuple[str, ...] | Mapping[str, str]
    price_limit: float

    def to_json(self) -> dict[str, Any]:
        """The goal as a JSON mapping."""
        return asdict(self)


def goal_from_json(fields: Mapping[str, Any]) -> Goal:
    """Makes a goal from a JSON mapping; the inverse of `Goal.to_json`.

    Raises:
        ValueError: a field is missing, unknown or of a wrong type.
    """
    try:
        goal = Goal(**fields)
    except TypeError as error:
        raise ValueError(f"expected a goal with the fields of {Goal.__name__}, got {fields!r:.200}: {error}") from None
    wrong = [name for name in ("asin", "query", "title", "kind", "instruction") if not isinstance(fields[name], str)]
    if wrong or not isinstance(goal.price_limit, (int, float)):
        raise ValueError(f"expected text in {wrong or 'everything'} and a number as price_limit, got {fields!r:.200}")
    if not _are_texts(goal.attributes):
        raise ValueError(f"expected attributes as a list of texts in a goal, got {goal.attributes!r:.200}")
    if isinstance(goal.options, Mapping):
        if not _are_texts([*goal.options, *goal.options.values()]):
            raise ValueError(f"expected options as a mapping of texts in a goal, got {goal.options!r:.200}")
        return replace(goal, attributes=tuple(goal.attributes), options=dict(goal.options))
    if not _are_texts(goal.options):
        raise ValueError(f"expected options as a list or a mapping of texts in a goal, got {goal.options!r:.200}")
    return replace(goal, attributes=tuple(goal.attributes), options=tuple(goal.options))


def _are_texts(values: Any) -> bool:
    return isinstance(values, (list, tuple)) and all(isinstance(value, str) for value in values)


def draw_prices(products: Sequence[Product], rng: random.Random) -> list[float]:
    """Returns the price of each product at purchase, in dollars: its price, or a draw from its price range."""
    drawn = []
    for product in products:
        first, *more = product.prices
        drawn.append(rng.uniform(first, more[0]) if more else first)
    return drawn


def human_goals(
    products: Sequence[Product],
    prices: Sequence[float],
    instructions: Mapping[str, Sequence[Mapping[str, Any]]],
    rng: random.Random,
) -> list[Goal]:
    """Makes goals from human-written instructions.

    Args:
        products: products, in the shop's order.
        prices: price of each product.
        instructions: `items_human_ins.json`, asin -> [{instruction, instruction_attributes, instruction_options}].
        rng: draws price limits.
    """
    goals = []
    for product, price in zip(products, prices):
        for entry in instructions.get(product.asin, ()):
            attributes = entry["instruction_attributes"]
            if attributes:
                limit, text = _price_limit(price, rng)
                options = tuple(entry["instruction_options"])
                goals.append(_goal(product, entry["instruction"].strip(".") + text, attributes, options, limit))
    return goals


def synthetic_goals(
    products: Sequence[Product],
    prices: Sequence[float],
    annotations: Mapping[str, Mapping[str, Any]],
    rng: random.Random,
) -> list[Goal]:
    """Makes goals from a template, for each annotated product and every combination of its options.

    Args:
        products: products, in the shop's order.
        prices: price of each product.
        annotations: `items_ins_v2*.json`, asin -> {instruction, instruction_attributes, …}.
        rng: draws price limits.
    """
    goals = []
    for product, price in zip(products, prices):
        note = annotations.get(product.asin, {})
        if note.get("instruction") is None or not note.get("instruction_attributes"):
            continue
        limit, text = _price_limit(price, rng)
        names = sorted(product.options)
        for values in itertools.product(*(product.options[name] for name in names)):
            options = dict(zip(names, values))
            chosen = ", and ".join(f"{name}: {value}" for name, value in options.items())
            instruction = f"{note['instruction']}{' with ' + chosen if chosen else ''}{text}"
            goals.append(_goal(product, instruction, note["instruction_attributes"], options, limit))
    return goals


GOAL_SOURCES: Mapping[str, Callable[..., list[Goal]]] = {"human": human_goals, "synthetic": synthetic_goals}
"""Name -> function that makes goals; `human` reads `items_human_ins.json`, `synthetic` reads `items_ins_v2*.json`."""


def in_order(goals: Iterable[Goal]) -> list[Goal]:
    """Sorts goals in the order in which the original numbers them."""
    goals = list(goals)
    random.Random(ORDER_SEED).shuffle(goals)
    return goals


def _price_limit(price: float, rng: random.Random) -> tuple[float, str]:
    """Draws a limit slightly above the price. Returns it with its text for the instruction."""
    above = [limit for limit in PRICE_LIMITS if limit > price][:4]
    if len(above) < 2:
        return NO_LIMIT, ""
    limit = max(rng.sample(above, 2))
    return limit, f", and price lower than {limit:.2f} dollars"


def _goal(
    product: Product,
    instruction: str,
    attributes: Sequence[str],
    options: tuple[str, ...] | Mapping[str, str],
    price_limit: float,
) -> Goal:
    return Goal(
        asin=product.asin,
        category=product.category,
        query=product.query,
        title=product.title,
        kind=product.kind,
        instruction=re.sub(r"\s*\n\s*", " ", instruction),  # pages and prompts have one line for it
        attributes=tuple(attributes),
        options=options,
        price_limit=price_limit,
    )
