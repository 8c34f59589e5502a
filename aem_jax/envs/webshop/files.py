"""Reads and checks WebShop's files (`items_shuffle*.json`, `items_ins_v2*.json`, `items_human_ins.json`).

The fields that a shop is built from are checked here, so that errors can name the file and the position. Other fields
are not checked.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aem_jax.envs.webshop.catalog import ShopData
from aem_jax.envs.webshop.products import has_id, prices_of
from aem_jax.files import read_json


def read_files(items: Path, annotations: Path, instructions: Path, limit: int = 0) -> ShopData:
    """Reads the files.

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
    said = _json(instructions, dict) if instructions.is_file() else {}
    for index, item in enumerate(products):
        place = f"{items}[{index}]"
        _check_item(place, item)
        if (asin := item["asin"]) in notes:
            _check_annotation(f"{annotations}[{asin!r}]", notes[asin])
        place = f"{instructions}[{asin!r}]"
        for number, each in enumerate(_expect(place, said.get(asin, []), list)):
            _check_instruction(f"{place}[{number}]", each)
    if not any(has_id(item["asin"]) for item in products):
        raise ValueError(f"expected products to sell in {items}, got none with an id of at most ten characters")
    return ShopData(products, notes, said)


def _json(path: Path, form: type) -> Any:
    found = read_json(path)
    if not isinstance(found, form):
        raise ValueError(f"expected a JSON {_FORMS[form]} in {path}, got {_named(found)}")
    return found


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


def _check_instruction(place: str, said: Any) -> None:
    if not _field(place, said, "instruction_attributes", list, type(None)):
        return  # no attributes: it gives no goal
    _field(place, said, "instruction", str)
    for name in ("instruction_attributes", "instruction_options"):
        _texts(f"{place}: {name}", _field(place, said, name, list))


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
