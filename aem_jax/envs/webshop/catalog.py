"""A shop's products, search index and goals as memory-mapped files: one copy for all workers of a host.

The first process that needs a catalog creates its folder. The folder's name is a hash of the sources.
"""

import fcntl
import hashlib
import json
import logging
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

from aem_jax.envs.webshop.goals import Goal, draw_prices, goal_from_json, human_goals, in_order, synthetic_goals
from aem_jax.envs.webshop.products import Product, product_from_json, read_products
from aem_jax.envs.webshop.ranking import MappedTexts, Ranking, build_ranking, load_ranking
from aem_jax.files import read_json, write_text

log = logging.getLogger(__name__)

_DECIDES = ("analysis", "catalog", "goals", "products", "ranking", "stemmer")
"""Modules of this package that determine the content of the files. A change in one of them gives a new folder."""
_FACTS = "catalog.json"
"""File with the catalog's id, and the size and hash of every other file. It is written last."""
_READ_BYTES = 64 * 2**20
SEARCH_LIMIT = 50
"""Maximum number of products that a search returns."""
FIELDS = ("category", "query", "attributes")
"""Fields of a product that `Catalog.where` finds products by."""


@dataclass(frozen=True)
class ShopData:
    """The source data of a shop, in the format of WebShop's own files.

    Attributes:
        items: `items_shuffle*.json`.
        annotations: `items_ins_v2*.json`.
        instructions: `items_human_ins.json`.
    """

    items: Sequence[Mapping[str, Any]]
    annotations: Mapping[str, Mapping[str, Any]]
    instructions: Mapping[str, Sequence[Mapping[str, Any]]]


class Catalog:
    """Read access to a shop's files. Only the latest products and searches are cached in memory.

    Attributes:
        id: 12 hex digits of a hash over products, prices and goals.
        prices: float64 [D], dollars.
        goals: all goals, in the order of the original's numbers.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self.id: str = read_json(folder / _FACTS)["facts"]["id"]
        self.prices: np.ndarray = np.load(folder / "prices.npy", mmap_mode="r").view(np.ndarray)
        self._products = _mapped_lines(folder, "products")
        self.goals: Sequence[Goal] = _Goals(_mapped_lines(folder, "goals"))
        self._asins = np.load(folder / "asins.npy", mmap_mode="r").view(np.ndarray)
        self._ranking: Ranking = load_ranking(folder)
        self._by_asin = np.load(folder / "by-asin.npy", mmap_mode="r").view(np.ndarray)
        self.product: Callable[[int], Product] = lru_cache(maxsize=128)(self._read)
        """Number -> product."""
        self.search: Callable[[str], tuple[int, ...]] = lru_cache(maxsize=256)(self._search)
        """Query -> numbers of at most `SEARCH_LIMIT` products, best first."""
        self.where: Callable[[str, str], tuple[int, ...]] = _Fields(folder)
        """(field, value) -> numbers of all products with that value in one of `FIELDS`, in the shop's order."""

    def __len__(self) -> int:
        return len(self._products)

    def find(self, asin: str) -> int:
        """Returns the number of a product.

        Raises:
            ValueError: the shop does not have this product.
        """
        at = int(np.searchsorted(self._asins, asin, sorter=self._by_asin))
        if at == len(self) or self._asins[self._by_asin[at]] != asin:
            raise ValueError(f"expected a product of shop {self.id}, got {asin!r}; tasks and shop must belong together")
        return int(self._by_asin[at])

    def _read(self, number: int) -> Product:
        try:
            return product_from_json(json.loads(self._products[number]))
        except (ValueError, LookupError, TypeError, AttributeError) as error:  # a damaged large catalog
            raise ValueError(
                f"expected product {number} in {self._folder}, got {type(error).__name__}: {error}; remove the folder, "
                "and it is made again"
            ) from None

    def _search(self, query: str) -> tuple[int, ...]:
        return tuple(self._ranking.search(query, SEARCH_LIMIT).tolist())


def open_catalog(folder: Path, sources: Mapping[str, Any], load: Callable[[], ShopData]) -> Catalog:
    """Opens the catalog for `sources`. The first process builds it, and other processes wait for that one.

    Args:
        folder: parent folder of the catalogs.
        sources: plain JSON that determines the catalog: `goals` (human or synthetic), `seed`, and the inputs of `load`.
        load: reads or generates the data; called only if the catalog does not exist or is damaged.

    Raises:
        ValueError: the folder cannot be written, or the data is not in WebShop's format.
    """
    code = hash_of(Path(__file__).with_name(f"{name}.py") for name in _DECIDES)
    key = hashlib.sha256(json.dumps([code, sources], sort_keys=True).encode()).hexdigest()[:16]
    place = folder / key
    if _damage(place) is not None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with open(folder / f"{key}.lock", "w", encoding="utf-8") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if (damage := _damage(place)) is not None:
                    if damage:
                        log.warning("the shop's index in %s is made again: %s", place, damage)
                    for draft in folder.glob(f"{key}-*"):  # of processes that were killed: the lock is ours
                        shutil.rmtree(draft, ignore_errors=True)
                    _make(place, load(), sources["goals"], sources["seed"])
        except OSError as error:
            raise ValueError(f"expected to write the shop's index to {folder}: {error}; set shop.cache") from None
    return Catalog(place)


def _damage(place: Path) -> str | None:
    """Describes the damage of a catalog's files. Empty: the files do not exist. None: the files are intact.

    Catalogs up to `_READ_BYTES` are checked by hash. For larger ones, only the file sizes are compared.
    """
    path = place / _FACTS
    if not path.exists():
        return ""
    try:
        record = read_json(path)
        if record["hash"] != _hash_of_facts(record["facts"]):
            return f"expected in {_FACTS} what was written, got something else"
        written = record["facts"]["files"]
        for name, (size, _) in written.items():
            file = place / name
            if not file.is_file() or file.stat().st_size != size:
                return f"expected {size} bytes in {name}, got {file.stat().st_size if file.is_file() else 'no file'}"
        if sum(size for size, _ in written.values()) <= _READ_BYTES:
            changed = next((name for name, (_, digest) in written.items() if hash_of([place / name]) != digest), None)
            return None if changed is None else f"expected in {changed} what was written, got something else"
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        return f"expected a catalog's facts in {path}, got {type(error).__name__}: {error}"
    return None


def _hash_of_facts(facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def hash_of(files: Iterable[Path]) -> str:
    """Returns the SHA-256 over the concatenated content of the files, as hex digits."""
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            hashlib.file_digest(file, lambda: digest)
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
        _write_lines(draft, "products", (product.to_json() for product in products), digest)
        _write_lines(draft, "goals", (goal.to_json() for goal in in_order(goals)), digest)
        digest.update(np.asarray(prices).tobytes())
        np.save(draft / "prices.npy", np.asarray(prices, np.float64))
        asins = [product.asin for product in products]
        np.save(draft / "asins.npy", np.asarray(asins))
        ranking = build_ranking(asins, (product.search_text() for product in products))
        ranking.save(draft)
        np.save(draft / "by-asin.npy", np.argsort(ranking.order))
        _save_fields(draft, products)
        files = {path.name: [path.stat().st_size, hash_of([path])] for path in sorted(draft.iterdir())}
        facts = {"id": digest.hexdigest()[:12], "files": files}
        write_text(draft / _FACTS, json.dumps({"facts": facts, "hash": _hash_of_facts(facts)}))
        shutil.rmtree(place, ignore_errors=True)  # leftovers of a process that died here
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


def _mapped_lines(folder: Path, name: str) -> MappedTexts:
    path = folder / f"{name}.jsonl"
    ends = np.load(folder / f"{name}-ends.npy", mmap_mode="r").view(np.ndarray)
    # an empty file cannot be mapped
    text = np.memmap(path, np.uint8, "r").view(np.ndarray) if path.stat().st_size else np.empty(0, np.uint8)
    return MappedTexts(text, ends)


class _Goals(Sequence[Goal]):
    def __init__(self, lines: Sequence[bytes]):
        self._lines = lines

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, item):
        if isinstance(item, slice):
            return [self[i] for i in range(*item.indices(len(self)))]
        return goal_from_json(json.loads(self._lines[item]))


def _save_fields(folder: Path, products: Iterable[Product]) -> None:
    """Writes the index of a shop's products, which must be in the shop's order."""
    numbers: dict[int, list[int]] = {}
    for number, product in enumerate(products):
        for field in FIELDS:
            own = getattr(product, field)
            for value in dict.fromkeys((own,) if isinstance(own, str) else own):
                numbers.setdefault(_field_key(field, value), []).append(number)
    keys = sorted(numbers)
    np.save(folder / "fields-keys.npy", np.asarray(keys, np.uint64))
    np.save(folder / "fields-ends.npy", np.cumsum([0, *(len(numbers[key]) for key in keys)], dtype=np.int64))
    np.save(folder / "fields-numbers.npy", np.asarray([number for key in keys for number in numbers[key]], np.int32))


class _Fields:
    """Index from categories, queries and attributes to products, which avoids reading every product."""

    def __init__(self, folder: Path):
        self._keys, self._ends, self._numbers = (
            np.load(folder / f"fields-{name}.npy", mmap_mode="r").view(np.ndarray)
            for name in ("keys", "ends", "numbers")
        )

    def __call__(self, field: str, value: str) -> tuple[int, ...]:
        """Returns the numbers of all products with a value in one of `FIELDS`, in the shop's order."""
        key = np.uint64(_field_key(field, value))
        at = int(np.searchsorted(self._keys, key))
        if at == len(self._keys) or self._keys[at] != key:
            return ()
        return tuple(self._numbers[self._ends[at] : self._ends[at + 1]].tolist())


def _field_key(field: str, value: str) -> int:
    """Returns 64 bits of a hash. Of thirty million shops with a million values each, about one has a collision."""
    return int.from_bytes(hashlib.sha256(f"{field}/{value}".encode(errors="surrogatepass")).digest()[:8])
