"""A shop's products, search index and goals as files that are mapped: one copy for all workers of a host.

A folder of them is made once, by the first process that needs it, and named by a hash of what it was made from.
"""

import fcntl
import hashlib
import json
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from aem_jax.envs.webshop.fields import Fields, save_fields
from aem_jax.envs.webshop.goals import Goal, draw_prices, goal_from_json, human_goals, in_order, synthetic_goals
from aem_jax.envs.webshop.products import Product, product_from_json, read_products
from aem_jax.envs.webshop.ranking import Ranking, build_ranking, load_ranking

_DECIDES = ("analysis", "catalog", "fields", "goals", "products", "ranking", "stemmer")
"""Modules beside this one that decide what the files hold: changed ones make new folders."""
SEARCH_LIMIT = 50
"""Most products that a search finds."""


@dataclass(frozen=True)
class ShopData:
    """What a shop is made of, in the words of WebShop's own files.

    Attributes:
        items: `items_shuffle*.json`.
        annotations: `items_ins_v2*.json`.
        instructions: `items_human_ins.json`.
    """

    items: Sequence[Mapping[str, Any]]
    annotations: Mapping[str, Mapping[str, Any]]
    instructions: Mapping[str, Sequence[Mapping[str, Any]]]


class Catalog:
    """A shop to look things up in; what it returns is read from its files and not kept, but for the latest products.

    Attributes:
        id: 12 hex digits of a hash over products, prices and goals.
        prices: float64 [D], dollars.
        goals: all of them, in their order.
    """

    def __init__(self, folder: Path):
        facts = json.loads((folder / "catalog.json").read_text(encoding="utf-8"))
        self.id: str = facts["id"]
        self.prices: np.ndarray = np.load(folder / "prices.npy", mmap_mode="r").view(np.ndarray)
        self._products = _MappedLines(folder, "products")
        self.goals: Sequence[Goal] = _Goals(_MappedLines(folder, "goals"))
        self._asins = np.load(folder / "asins.npy", mmap_mode="r").view(np.ndarray)
        self._ranking: Ranking = load_ranking(folder)
        self._by_asin = np.load(folder / "by-asin.npy", mmap_mode="r").view(np.ndarray)
        self.product: Callable[[int], Product] = lru_cache(maxsize=128)(self._read)
        """Number -> product."""
        self.search: Callable[[str], tuple[int, ...]] = lru_cache(maxsize=256)(self._search)
        """Query -> numbers of at most 50 products, best first."""
        self.where: Callable[[str, str], tuple[int, ...]] = Fields(folder)
        """(field, value) -> numbers of all products with that category, query or attribute, in the shop's order."""

    def __len__(self) -> int:
        return len(self._products)

    def find(self, asin: str) -> int:
        """The number of a product.

        Raises:
            ValueError: the shop has no such product.
        """
        at = int(np.searchsorted(self._asins, asin, sorter=self._by_asin))
        if at == len(self) or self._asins[self._by_asin[at]] != asin:
            raise ValueError(f"expected a product of shop {self.id}, got {asin!r}; tasks and shop must belong together")
        return int(self._by_asin[at])

    def _read(self, number: int) -> Product:
        return product_from_json(json.loads(self._products[number]))

    def _search(self, query: str) -> tuple[int, ...]:
        return tuple(self._ranking.search(query, SEARCH_LIMIT).tolist())


def open_catalog(folder: Path, sources: Mapping[str, Any], load: Callable[[], ShopData]) -> Catalog:
    """The catalog made from `sources`, made first if no process has done so yet; others wait for the one that does.

    Args:
        folder: where catalogs are kept, each in a folder of its own.
        sources: what decides the catalog, plain JSON: `goals` (human or synthetic), `seed`, and whatever `load` reads.
        load: reads or makes the data; called only if the catalog is not there.

    Raises:
        ValueError: the folder cannot be written, or the data is not WebShop's.
    """
    code = hash_of(Path(__file__).with_name(f"{name}.py") for name in _DECIDES)
    key = hashlib.sha256(json.dumps([code, sources], sort_keys=True).encode()).hexdigest()[:16]
    place = folder / key
    if not (place / "catalog.json").exists():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with open(folder / f"{key}.lock", "w", encoding="utf-8") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not (place / "catalog.json").exists():
                    _make(place, load(), sources["goals"], sources["seed"])
        except OSError as error:
            raise ValueError(f"expected to write the shop's index to {folder}: {error}; set shop.cache") from None
    return Catalog(place)


def hash_of(files: Iterable[Path]) -> str:
    """SHA-256 over what the files hold, one after the other, as hex digits."""
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _make(place: Path, data: ShopData, kind: str, seed: int) -> None:
    products = list(read_products(data.items, data.annotations))
    if not products:
        raise ValueError("expected products to sell, got none with an id of at most ten characters")
    rng = random.Random(seed)
    prices = draw_prices(products, rng)
    if kind == "human":
        goals = human_goals(products, prices, data.instructions, rng)
    else:
        goals = synthetic_goals(products, prices, data.annotations, rng)
    draft = Path(tempfile.mkdtemp(prefix=f"{place.name}-", dir=place.parent))
    try:
        digest = hashlib.sha256()
        _write_lines(draft, "products", (each.to_json() for each in products), digest)
        _write_lines(draft, "goals", (each.to_json() for each in in_order(goals)), digest)
        digest.update(np.asarray(prices).tobytes())
        np.save(draft / "prices.npy", np.asarray(prices, np.float64))
        asins = [each.asin for each in products]
        np.save(draft / "asins.npy", np.asarray(asins))
        ranking = build_ranking(asins, (each.search_text() for each in products))
        ranking.save(draft)
        np.save(draft / "by-asin.npy", np.argsort(ranking.order))
        save_fields(draft, products)
        (draft / "catalog.json").write_text(
            json.dumps({"id": digest.hexdigest()[:12], "sources": len(products)}), encoding="utf-8"
        )
        shutil.rmtree(place, ignore_errors=True)  # what a process that died here left behind
        os.rename(draft, place)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _write_lines(folder: Path, name: str, rows: Iterable[Mapping[str, Any]], digest: Any) -> None:
    ends = [0]
    with open(folder / f"{name}.jsonl", "wb") as file:
        for row in rows:
            line = json.dumps(row, ensure_ascii=False).encode() + b"\n"
            digest.update(line)
            file.write(line)
            ends.append(ends[-1] + len(line))
    np.save(folder / f"{name}-ends.npy", np.asarray(ends, np.int64))


class _MappedLines(Sequence[bytes]):
    """The lines of a file, mapped."""

    def __init__(self, folder: Path, name: str):
        path = folder / f"{name}.jsonl"
        self._ends = np.load(folder / f"{name}-ends.npy", mmap_mode="r").view(np.ndarray)
        # an empty file cannot be mapped
        self._text = np.memmap(path, np.uint8, "r").view(np.ndarray) if path.stat().st_size else np.empty(0, np.uint8)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, item):
        if not 0 <= item < len(self):
            raise IndexError(item)
        return self._text[int(self._ends[item]) : int(self._ends[item + 1])].tobytes()


class _Goals(Sequence[Goal]):
    def __init__(self, lines: Sequence[bytes]):
        self._lines = lines

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, item):
        if isinstance(item, slice):
            return [self[i] for i in range(*item.indices(len(self)))]
        return goal_from_json(json.loads(self._lines[item]))
