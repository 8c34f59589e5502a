"""Generates a shop from a seed: products, annotations and instructions. `kinds.toml` contains the kinds of products."""

import random
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aem_jax.envs.webshop.catalog import ShopData
from aem_jax.envs.webshop.generator.config import CATEGORIES, GeneratorConfig


@dataclass(frozen=True)
class ThingKind:
    """One kind of product.

    Attributes:
        query: its name, which is also a search query.
        tree: path in the shop's category tree, `a › b › c`.
        attributes: possible attributes.
        uses: possible uses, for titles.
        options: option name -> possible values.
        prices: minimum and maximum price, dollars.
    """

    query: str
    tree: str
    attributes: tuple[str, ...]
    uses: tuple[str, ...]
    options: Mapping[str, tuple[str, ...]]
    prices: tuple[float, float]


def _kind(row: Mapping[str, Any]) -> ThingKind:
    options = {name: tuple(values) for name, values in row["options"].items()}
    lists = {name: tuple(row[name]) for name in ("attributes", "uses", "prices")}
    return ThingKind(query=row["query"], tree=row["tree"], options=options, **lists)


_DATA = tomllib.loads(Path(__file__).with_name("kinds.toml").read_text(encoding="utf-8"))

KINDS: Mapping[str, tuple[ThingKind, ...]] = {name: tuple(_kind(row) for row in _DATA[name]) for name in CATEGORIES}
"""Category -> its kinds of products."""
BRANDS: tuple[str, ...] = tuple(_DATA["brands"])
MANNERS: tuple[str, ...] = tuple(_DATA["manners"])
"""Praising words of titles."""
REMARKS: tuple[str, ...] = tuple(_DATA["remarks"])
"""Sentences at the end of descriptions."""

_SIGNS = "0123456789ABCDEFGHJKLMNPQRSTUVWXYZ"
_WISHES = (
    "i am looking for a {attributes} {thing}{options}",
    "i need a {thing} that is {listed}{options}",
    "find me {attributes} {thing}{options}",
    "i want to buy a {attributes} {thing}{options}",
    "i'm shopping for a {thing} which is {listed}{options}",
    "can you get me a {thing}{options}? it should be {listed}",
    "looking for {attributes} {thing}{options}",
    "my friend would like a {thing}{options}, and it has to be {listed}",
)
_CHOICES = (
    lambda name, value: f"{name}: {value}",
    lambda name, value: f"in {value}" if name == "color" else f"{name} {value}",
    lambda name, value: f"the {name} should be {value}",
)


def make_shop(config: GeneratorConfig, seed: int) -> ShopData:
    """Generates a shop in WebShop's format.

    Args:
        config: settings.
        seed: other seeds give other products and instructions.
    """
    rng = random.Random(f"shop/{seed}")
    kinds = [
        (category, kind) for category in config.categories for kind in KINDS[category][: config.kinds_per_category]
    ]
    items, annotations, instructions = [], {}, {}
    for asin in _asins(config, rng):
        category, kind = rng.choice(kinds)
        attributes = rng.sample(kind.attributes, rng.randint(*config.attributes))
        options = _options(kind, config, rng)
        items.append(_item(asin, category, kind, attributes, options, config, rng))
        wishes = [_wish(kind, attributes, options, config, rng) for _ in range(config.goals_per_product)]
        annotations[asin] = {
            "attributes": attributes,
            "instruction": f"Find me {', '.join(attributes[:3])} {kind.query}",
            "instruction_attributes": attributes[:3],
        }
        different = {wish["instruction"]: wish for wish in wishes}
        instructions[asin] = [{"asin": asin, **wish} for wish in different.values()]
    return ShopData(items, annotations, instructions)


def _asins(config: GeneratorConfig, rng: random.Random) -> list[str]:
    """Draws different ids: ten characters as in WebShop, or a few digits with `brief`, which are easier to copy."""
    if config.brief:
        width = len(str(config.products - 1))
        return [f"{number:0{width}d}" for number in rng.sample(range(config.products), config.products)]
    asins: dict[str, None] = {}
    while len(asins) < config.products:
        asins["B" + "".join(rng.choices(_SIGNS, k=9))] = None
    return list(asins)


def _options(kind: ThingKind, config: GeneratorConfig, rng: random.Random) -> dict[str, list[str]]:
    names = list(kind.options)[: config.max_options]
    chosen = {}
    for name in names if config.brief else [name for name in names if rng.random() < 0.85]:
        values = kind.options[name]
        count = min(len(values), config.option_values)
        chosen[name] = rng.sample(values, rng.randint(min(2, count), count))
    return chosen


def _item(
    asin: str,
    category: str,
    kind: ThingKind,
    attributes: Sequence[str],
    options: dict[str, list[str]],
    config: GeneratorConfig,
    rng: random.Random,
) -> dict[str, Any]:
    brand, manner, use = rng.choice(BRANDS), rng.choice(MANNERS), rng.choice(kind.uses)
    rest = ", ".join(attributes[2:]) or "well made"
    if config.brief:
        title = f"{' '.join(attributes)} {kind.query}"
    else:
        title = f"{brand} {manner} {kind.query.title()}, {', '.join(attributes[:2]).title()}, for {use}"
    about = f"The {kind.query} by {brand} is {rest} and made to last. {' '.join(rng.sample(REMARKS, 2))}"
    return {
        "asin": asin,
        "name": title,
        "category": category,
        "query": kind.query,
        "product_category": kind.tree,
        "full_description": about,
        "small_description": [
            f"{attributes[0].capitalize()}: a {manner.lower()} {kind.query} for {use.lower()}",
            f"Made with care; {rest}",
            rng.choice(REMARKS),
        ],
        "pricing": _pricing(kind, config, rng),
        "images": [f"https://example.invalid/{asin}.jpg"],
        "customization_options": {
            name.title(): [{"value": value, "image": None} for value in values] for name, values in options.items()
        },
    }


def _pricing(kind: ThingKind, config: GeneratorConfig, rng: random.Random) -> str:
    """Draws one price, sometimes a range, sometimes none."""
    low = rng.uniform(*kind.prices)
    drawn = rng.random()
    if config.brief or drawn < 0.65:
        return f"${low:.2f}"
    return f"${low:.2f}${low * rng.uniform(1.1, 1.6):.2f}" if drawn < 0.95 else ""


def _wish(
    kind: ThingKind,
    attributes: Sequence[str],
    options: dict[str, list[str]],
    config: GeneratorConfig,
    rng: random.Random,
) -> dict[str, Any]:
    """Writes an instruction that the product satisfies."""
    asked = rng.sample(list(attributes), rng.randint(*config.asked))
    # some instructions leave out an option
    chosen = {name: rng.choice(values) for name, values in options.items() if config.brief or rng.random() < 0.9}
    if config.brief:
        text = " ".join([*chosen.values(), *asked, kind.query])
    else:
        phrase = rng.choice(_CHOICES)
        choices = "".join(f", and {phrase(name, value)}" for name, value in chosen.items()).replace(", and", ",", 1)
        listed = " and ".join(asked)
        text = rng.choice(_WISHES).format(attributes=", ".join(asked), listed=listed, thing=kind.query, options=choices)
        text = re.sub(r"\ba (?=[aeio])", "an ", text)
    return {"instruction": text, "instruction_attributes": asked, "instruction_options": list(chosen.values())}
