"""The shop's products, read from WebShop's files (`items_shuffle*.json`, `items_ins_v2*.json`)."""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

NO_PRICE = 100.0
"""Price in dollars of a product without a price."""
NO_ATTRIBUTES = ("DUMMY_ATTR",)
"""Attributes of a product without annotation, as in WebShop."""


@dataclass(frozen=True, slots=True)
class Product:
    """One product.

    Attributes:
        asin: id of the product, at most ten characters.
        title: title of the product.
        category: one of WebShop's five categories, such as `beauty`.
        query: a search query for this kind of product, in lower case.
        kind: path in the shop's category tree, `a › b › c`.
        description: full description.
        bullets: features, one line each.
        prices: dollars; one price, or the lowest and the highest.
        price_tag: displayed price, `$5.0` or `$5.0 to $7.5`.
        options: option name -> its values, in the order of display, in lower case.
        attributes: annotated attributes; a goal's attributes are matched against them.
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
        """Returns the text for the search engine: title, description, first feature and options, in lower case."""
        options = ", and ".join(f"{name}: {', '.join(values)}" for name, values in self.options.items())
        return " ".join([self.title, self.description, self.bullets[0] if self.bullets else "", options]).lower()

    def to_json(self) -> dict[str, Any]:
        """The product as a JSON mapping."""
        return asdict(self)


def product_from_json(fields: Mapping[str, Any]) -> Product:
    """Makes a product from a JSON mapping; the inverse of `Product.to_json`."""
    options = {name: tuple(values) for name, values in fields["options"].items()}
    lists = {name: tuple(fields[name]) for name in ("bullets", "prices", "attributes")}
    return Product(**{**fields, "options": options, **lists})


def read_products(
    items: Iterable[Mapping[str, Any]], annotations: Mapping[str, Mapping[str, Any]]
) -> Iterator[Product]:
    """Cleans products as WebShop does. Products without a valid id, and repetitions of an id, are skipped.

    Args:
        items: entries of `items_shuffle*.json`; `shop.read_files` checks them.
        annotations: `items_ins_v2*.json`, asin -> {attributes, …}.

    Raises:
        ValueError: a price is invalid.
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
    """Whether WebShop accepts the id of a product: it has at most ten characters, and is not `nan`."""
    return asin != "nan" and len(asin) <= 10


def prices_of(text: str) -> tuple[float, ...]:
    """Parses `$5.00$7.50` to (5.0, 7.5). The result is one price or a range; further prices are ignored.

    Raises:
        ValueError: a dollar sign is not followed by a number, or a number is beyond the range of floats.
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
        name.lower(): tuple(entry["value"].strip().replace("/", " | ").lower() for entry in values)
        for name, values in customizations.items()
        if values is not None
    }
