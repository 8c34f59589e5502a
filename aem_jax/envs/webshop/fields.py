"""Memory-mapped index from categories, queries and attributes to products, which avoids reading every product."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from aem_jax.envs.webshop.products import Product

FIELDS = ("category", "query", "attributes")


def save_fields(folder: Path, products: Iterable[Product]) -> None:
    """Writes the index of a shop's products, which must be in the shop's order."""
    found: dict[int, list[int]] = {}
    for number, product in enumerate(products):
        for field in FIELDS:
            own = getattr(product, field)
            for value in dict.fromkeys((own,) if isinstance(own, str) else own):
                found.setdefault(_key(field, value), []).append(number)
    keys = sorted(found)
    np.save(folder / "fields-keys.npy", np.asarray(keys, np.uint64))
    np.save(folder / "fields-ends.npy", np.cumsum([0, *(len(found[key]) for key in keys)], dtype=np.int64))
    np.save(folder / "fields-numbers.npy", np.asarray([number for key in keys for number in found[key]], np.int32))


class Fields:
    """The memory-mapped index that `save_fields` wrote."""

    def __init__(self, folder: Path):
        self._keys, self._ends, self._numbers = (
            np.load(folder / f"fields-{name}.npy", mmap_mode="r").view(np.ndarray)
            for name in ("keys", "ends", "numbers")
        )

    def __call__(self, field: str, value: str) -> tuple[int, ...]:
        """Returns the numbers of all products with a value in one of `FIELDS`, in the shop's order."""
        key = np.uint64(_key(field, value))
        at = int(np.searchsorted(self._keys, key))
        if at == len(self._keys) or self._keys[at] != key:
            return ()
        return tuple(self._numbers[self._ends[at] : self._ends[at + 1]].tolist())


def _key(field: str, value: str) -> int:
    """Returns 64 bits of a hash. Of thirty million shops with a million values each, about one has a collision."""
    return int.from_bytes(hashlib.sha256(f"{field}/{value}".encode(errors="surrogatepass")).digest()[:8])
