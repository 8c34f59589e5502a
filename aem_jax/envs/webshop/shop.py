"""Which shop: WebShop's own files, or one that we make; opened by every worker, indexed by the first."""

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
"""Products of the original's small files."""


@dataclass(frozen=True)
class ShopConfig:
    """What the shop sells and what its customers want."""

    data: str = ""
    """Folder of WebShop's files, items_shuffle*.json, items_ins_v2*.json, items_human_ins.json; empty: one is made."""
    limit: int = 1000
    """Products to take of WebShop's files, from the first; 0 takes all. Up to 1000 the small files are preferred."""
    goals: str = "human"
    """human: instructions that people wrote; synthetic: a template, for every combination of options."""
    held_out: str = "products"
    """What is evaluated and never trained on: products, or only goals, of products that others want too."""
    seed: int = 233
    """Draws the prices of products that have a range, price limits, and the shop that is made."""
    cache: str = ""
    """Folder for the index, which all workers of a host share; empty: $XDG_CACHE_HOME/aem_jax/webshop."""
    made: GeneratorConfig = GeneratorConfig()  # noqa: RUF009 (frozen)
    """The shop to make, without data."""

    def __post_init__(self) -> None:
        if self.limit < 0:
            raise ValueError(f"expected limit of at least 0 (all products), got {self.limit}")
        if self.goals not in GOAL_SOURCES:
            raise ValueError(f"expected goals of {', '.join(GOAL_SOURCES)}, got {self.goals!r}")
        if self.held_out not in HELD_OUT:
            raise ValueError(f"expected held_out of {', '.join(HELD_OUT)}, got {self.held_out!r}")


def open_shop(config: ShopConfig) -> Catalog:
    """The catalog of a shop, made first if no process of this host has made it.

    Raises:
        ValueError: the files are not there, or not WebShop's, or the cache cannot be written.
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
    """Paths of items, annotations and instructions; the last need not exist for synthetic goals."""
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
