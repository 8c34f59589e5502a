"""Products as the shop shows them, read from WebShop's files (`items_shuffle*.json`, `items_ins_v2*.json`)."""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

NO_PRICE = 100.0
"""What a product without a price costs."""
NO_ATTRIBUTES = ("DUMMY_ATTR",)
"""Attributes of a product that nobody annotated, as WebShop has them."""


@dataclass(frozen=True, slots=True)
class Product:
    """One product.

    Attributes:
        asin: its id, at most ten characters.
        title: what it is called.
        category: one of WebShop's five, such as `beauty`.
        query: what one would search for to find its kind, lower case.
        kind: its place in the shop's tree, `a › b › c`.
        description: full description.
        bullets: features, one line each.
        prices: dollars; one, or the least and the most.
        price_tag: as shown, `$5.0` or `$5.0 to $7.5`.
        options: option name -> its values, in the order in which they are shown; lower case.
        attributes: what it is annotated with; a goal's attributes are matched against these.
        image: address of a picture; the shop never loads it.
    """

    asin: str
    title: str
    category: str
    query: str
    kind: str
    description: str
    bullets: tuple[str, ...]
    prices: tuple[float, ...]
    price_tag: str
    options: Mapping[str, tuple[str, ...]]
    attributes: tuple[str, ...]
    image: str

    def search_text(self) -> str:
        """What the search engine reads of it: title, description, first feature and options, in lower case."""
        options = ", and ".join(f"{name}: {', '.join(values)}" for name, values in self.options.items())
        return " ".join([self.title, self.description, self.bullets[0] if self.bullets else "", options]).lower()

    def to_json(self) -> dict[str, Any]:
        """The product as a JSON mapping."""
        return asdict(self)


def product_from_json(fields: Mapping[str, Any]) -> Product:
    """The inverse of `Product.to_json`."""
    options = {name: tuple(values) for name, values in fields["options"].items()}
    lists = {name: tuple(fields[name]) for name in ("bullets", "prices", "attributes")}
    return Product(**{**fields, "options": options, **lists})


def read_products(
    items: Iterable[Mapping[str, Any]], annotations: Mapping[str, Mapping[str, Any]]
) -> Iterator[Product]:
    """Cleans products as WebShop does; leaves out those without a proper id, and later ones of an id seen before.

    Args:
        items: entries of `items_shuffle*.json`; `files.read_files` checks them.
        annotations: `items_ins_v2*.json`, asin -> {attributes, …}.

    Raises:
        ValueError: a price is none.
    """
    seen = set()
    for item in items:
        asin = item["asin"]
        if not has_id(asin) or asin in seen:
            continue
        seen.add(asin)
        bullets = item["small_description"]
        prices = prices_of(item.get("pricing") or "")
        yield Product(
            asin=asin,
            title=item["name"],
            category=item["category"],
            query=item["query"].lower().strip(),
            kind=item["product_category"],
            description=item["full_description"] or "",
            bullets=tuple(bullets) if isinstance(bullets, list) else (bullets or "",),
            prices=prices,
            price_tag=" to ".join(f"${price}" for price in prices),
            options=_options(item.get("customization_options") or {}),
            attributes=tuple(annotations.get(asin, {}).get("attributes", NO_ATTRIBUTES)),
            image=item["images"][0] if item.get("images") else "",
        )


def has_id(asin: str) -> bool:
    """Whether it is an id that WebShop sells a product under: at most ten characters, and not `nan`."""
    return asin != "nan" and len(asin) <= 10


def prices_of(text: str) -> tuple[float, ...]:
    """`$5.00$7.50` -> (5.0, 7.5); the shop knows a price or a range, and no more.

    Raises:
        ValueError: there is a dollar sign and no number behind it, or one beyond all floats.
    """
    numbers = [re.sub(r"[^\d.]", "", part) for part in text.split("$")[1:]]
    try:
        prices = tuple(float(number) for number in numbers[:2]) or (NO_PRICE,)
        if not all(map(math.isfinite, prices)):
            raise ValueError
        return prices
    except ValueError:
        raise ValueError(f"expected prices such as '$5.00' or '$5.00$7.50', got {text!r}") from None


def _options(customizations: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    return {
        name.lower(): tuple(each["value"].strip().replace("/", " | ").lower() for each in values)
        for name, values in customizations.items()
        if values is not None
    }
