"""Opens the shop: WebShop's own files, or a generated shop. The first worker builds the index; all workers use it."""

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aem_jax.envs.webshop.catalog import Catalog, hash_of, open_catalog
from aem_jax.envs.webshop.files import read_files
from aem_jax.envs.webshop.generator.config import GeneratorConfig
from aem_jax.envs.webshop.generator.make import make_shop
from aem_jax.envs.webshop.goals import GOAL_SOURCES
from aem_jax.envs.webshop.tasks import HELD_OUT

_GENERATOR = Path(__file__).with_name("generator")
_SMALL = 1000
"""Number of products in the original's small files."""


@dataclass(frozen=True)
class ShopConfig:
    """The shop's products and the goals of its customers."""

    data: str = ""
    """Folder of WebShop's files: items_shuffle*.json, items_ins_v2*.json, items_human_ins.json. If empty, a shop is
    generated."""
    limit: int = 1000
    """Number of products to use from WebShop's files, from the first; 0 uses all. Up to 1000, the small files are
    preferred."""
    goals: str = "human"
    """human: instructions that people wrote; synthetic: a template, for every combination of options."""
    held_out: str = "products"
    """Unit that evaluation does not share with training. products: no training goal wants an evaluation product; goals:
    only the goals differ, and training goals may want the same products."""
    seed: int = 233
    """Seed for the prices of products with a price range, for price limits, and for the generated shop."""
    cache: str = ""
    """Folder for the index, which all workers of a host share; empty: $XDG_CACHE_HOME/aem_jax/webshop."""
    made: GeneratorConfig = GeneratorConfig()  # noqa: RUF009 (frozen)
    """Settings of the generated shop, which is used if data is empty."""

    def __post_init__(self) -> None:
        if self.limit < 0:
            raise ValueError(f"expected limit of at least 0 (all products), got {self.limit}")
        if self.goals not in GOAL_SOURCES:
            raise ValueError(f"expected goals of {', '.join(GOAL_SOURCES)}, got {self.goals!r}")
        if self.held_out not in HELD_OUT:
            raise ValueError(f"expected held_out of {', '.join(HELD_OUT)}, got {self.held_out!r}")


def open_shop(config: ShopConfig) -> Catalog:
    """Opens the catalog of a shop, and builds it if no process of this host has built it.

    Raises:
        ValueError: the files do not exist, are not WebShop's, or the cache cannot be written.
    """
    sources: dict[str, Any] = {"goals": config.goals, "seed": config.seed}
    if not config.data:
        sources |= {"made": dataclasses.asdict(config.made), "by": hash_of(sorted(_GENERATOR.glob("[!_]*.*")))}
        return open_catalog(_cache(config), sources, lambda: make_shop(config.made, config.seed))
    files = _files(config)
    stats = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files if path.exists()]
    sources |= {"files": stats, "limit": config.limit}
    return open_catalog(_cache(config), sources, lambda: read_files(*files, config.limit))


def _cache(config: ShopConfig) -> Path:
    if config.cache:
        return Path(config.cache).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "aem_jax" / "webshop"


def _files(config: ShopConfig) -> tuple[Path, Path, Path]:
    """Returns the paths of items, annotations and instructions. For synthetic goals, the last file may be missing."""
    folder = Path(config.data).expanduser()
    sizes = ("_1000", "") if 0 < config.limit <= _SMALL else ("", "_1000")
    found = []
    for name in ("items_shuffle", "items_ins_v2"):
        paths = [folder / f"{name}{size}.json" for size in sizes]
        path = next((each for each in paths if each.is_file()), None)
        if path is None:
            raise ValueError(f"expected WebShop's {paths[0].name} or {paths[1].name} in {folder}, found neither")
        found.append(path)
    human = folder / "items_human_ins.json"
    if config.goals == "human" and not human.is_file():
        raise ValueError(f"expected WebShop's {human.name} in {folder}, found none; or set shop.goals to synthetic")
    return found[0], found[1], human
