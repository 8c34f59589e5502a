"""Opens the shop: WebShop's own files, or a generated shop. The first worker builds the index; all workers use it.

The fields of WebShop's files that a shop is built from are checked here, so that errors can name the file and the
position. Other fields are not checked.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aem_jax.envs.webshop.catalog import Catalog, ShopData, hash_of, open_catalog
from aem_jax.envs.webshop.generator.config import GeneratorConfig
from aem_jax.envs.webshop.generator.make import make_shop
from aem_jax.envs.webshop.goals import GOAL_SOURCES
from aem_jax.envs.webshop.products import has_id, prices_of
from aem_jax.envs.webshop.tasks import HELD_OUT
from aem_jax.files import read_json, user_cache

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
    """Unit that evaluation does not share with training. products: no training goal was written for an evaluation
    product, or has the wish of an evaluation goal; goals: only the goals differ, and training goals may have been
    written for the same products."""
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
    return user_cache("webshop")


def _files(config: ShopConfig) -> tuple[Path, Path, Path]:
    """Returns the paths of items, annotations and instructions. For synthetic goals, the last file may be missing."""
    folder = Path(config.data).expanduser()
    sizes = ("_1000", "") if 0 < config.limit <= _SMALL else ("", "_1000")
    files = []
    for name in ("items_shuffle", "items_ins_v2"):
        paths = [folder / f"{name}{size}.json" for size in sizes]
        path = next((path for path in paths if path.is_file()), None)
        if path is None:
            raise ValueError(f"expected WebShop's {paths[0].name} or {paths[1].name} in {folder}, found neither")
        files.append(path)
    human = folder / "items_human_ins.json"
    if config.goals == "human" and not human.is_file():
        raise ValueError(f"expected WebShop's {human.name} in {folder}, found none; or set shop.goals to synthetic")
    return files[0], files[1], human


def read_files(items: Path, annotations: Path, instructions: Path, limit: int = 0) -> ShopData:
    """Reads and checks WebShop's files.

    Args:
        items: file with a list of products.
        annotations: file with asin -> {attributes, instruction, instruction_attributes}.
        instructions: file with asin -> [{instruction, instruction_attributes, instruction_options}]; optional.
        limit: number of products to use, from the first; 0 uses all.

    Raises:
        ValueError: a file has unexpected content; the message names the file and the position.
    """
    products = _json(items, list)[: limit or None]
    notes = _json(annotations, dict)
    human = _json(instructions, dict) if instructions.is_file() else {}
    for index, item in enumerate(products):
        place = f"{items}[{index}]"
        _check_item(place, item)
        if (asin := item["asin"]) in notes:
            _check_annotation(f"{annotations}[{asin!r}]", notes[asin])
        place = f"{instructions}[{asin!r}]"
        for number, entry in enumerate(_expect(place, human.get(asin, []), list)):
            _check_instruction(f"{place}[{number}]", entry)
    if not any(has_id(item["asin"]) for item in products):
        raise ValueError(f"expected products to sell in {items}, got none with an id of at most ten characters")
    return ShopData(products, notes, human)


def _json(path: Path, form: type) -> Any:
    try:
        content = read_json(path)
    except OSError as error:
        raise ValueError(f"expected to read WebShop's {path}: {error}") from None
    if not isinstance(content, form):
        raise ValueError(f"expected a JSON {_FORMS[form]} in {path}, got {_named(content)}")
    return content


def _check_item(place: str, item: Any) -> None:
    if not has_id(_field(place, item, "asin", str)):
        return  # without a valid id, the product is skipped and not checked
    for name in ("name", "category", "query", "product_category"):
        _field(place, item, name, str)
    _field(place, item, "full_description", str, type(None))
    bullets = _field(place, item, "small_description", list, str, type(None))
    if isinstance(bullets, list):
        _texts(f"{place}: small_description", bullets)
    if item.get("pricing"):
        try:
            prices_of(_field(place, item, "pricing", str))
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from None
    if item.get("images"):
        _expect(f"{place}: images[0]", _field(place, item, "images", list)[0], str)
    options = _field(place, item, "customization_options", dict) if item.get("customization_options") else {}
    for name, values in options.items():
        where = f"{place}: customization_options[{name!r}]"
        for number, value in enumerate(_expect(where, values, list, type(None)) or ()):
            _field(f"{where}[{number}]", value, "value", str)


def _check_annotation(place: str, note: Any) -> None:
    if "attributes" in _expect(place, note, dict):
        _texts(f"{place}: attributes", note["attributes"])
    if note.get("instruction") is not None:
        _field(place, note, "instruction", str)
    _texts(f"{place}: instruction_attributes", note.get("instruction_attributes") or [])


def _check_instruction(place: str, entry: Any) -> None:
    if not _field(place, entry, "instruction_attributes", list, type(None)):
        return  # no attributes: it gives no goal
    _field(place, entry, "instruction", str)
    for name in ("instruction_attributes", "instruction_options"):
        _texts(f"{place}: {name}", _field(place, entry, name, list))


_FORMS: Mapping[type, str] = {str: "text", list: "list", dict: "mapping", type(None): "null"}


def _field(place: str, entry: Any, name: str, *forms: type) -> Any:
    if name not in _expect(place, entry, dict):
        raise ValueError(f"{place}: expected an entry of WebShop's files, got one without {name!r}: {entry!r:.200}")
    return _expect(f"{place}: {name}", entry[name], *forms)


def _texts(place: str, values: Any) -> None:
    for number, value in enumerate(_expect(place, values, list)):
        _expect(f"{place}[{number}]", value, str)


def _expect(place: str, value: Any, *forms: type) -> Any:
    if not isinstance(value, forms):
        raise ValueError(f"{place}: expected {' or '.join(_FORMS[form] for form in forms)}, got {_named(value)}")
    return value


def _named(value: Any) -> str:
    return f"{type(value).__name__} {value!r:.80}"
