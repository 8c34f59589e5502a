"""What the shop that we make sells, read from `kinds.toml`."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class ThingKind:
    """One kind of thing.

    Attributes:
        query: what one searches for, and calls it.
        tree: its place in the shop, `a › b › c`.
        attributes: what such a thing may be.
        uses: what titles say it is for.
        options: option name -> values to choose from.
        prices: dollars, least and most.
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

CATEGORIES = ("beauty", "fashion", "garden", "grocery", "electronics")
KINDS: Mapping[str, tuple[ThingKind, ...]] = {name: tuple(_kind(row) for row in _DATA[name]) for name in CATEGORIES}
"""Category -> the kinds of things in it."""
BRANDS: tuple[str, ...] = tuple(_DATA["brands"])
MANNERS: tuple[str, ...] = tuple(_DATA["manners"])
"""How titles praise a thing."""
REMARKS: tuple[str, ...] = tuple(_DATA["remarks"])
"""Sentences that descriptions end with."""
