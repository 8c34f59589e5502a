"""The recorded shop, unpacked, and a shop of three products whose rewards can be worked out by hand."""

import lzma
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aem_jax.envs.webshop.catalog import Catalog, ShopData, open_catalog

GOLDEN = Path(__file__).parent / "golden" / "webshop"


def unpack(folder: Path) -> Path:
    """Writes the recorded shop and its transcripts to a folder."""
    for path in GOLDEN.glob("*.xz"):
        (folder / path.stem).write_bytes(lzma.decompress(path.read_bytes()))
    return folder


def item(asin: str, name: str, query: str, tree: str, **fields: Any) -> dict[str, Any]:
    """An entry of `items_shuffle*.json`."""
    return {
        "asin": asin,
        "name": name,
        "category": "garden",
        "query": query,
        "product_category": tree,
        "full_description": "",
        "small_description": ["good"],
        "pricing": "$20.00",
        "images": ["x.jpg"],
        "customization_options": {},
    } | fields


def _choose(**options: list[str]) -> Mapping[str, Any]:
    return {"customization_options": {name: [{"value": value} for value in values] for name, values in options.items()}}


LAMPS = "Home › Lighting › Lamps"
ITEMS = (
    item(
        "LAMP1", "Red Floor Lamp", "floor lamp", LAMPS, **_choose(Color=["Navy/Blue", "red"], Size=["small", "large"])
    ),
    item("LAMP2", "Floor Lamp Steel", "floor lamp", LAMPS, pricing="$30.00$50.00", full_description="Easy Clean shade"),
    item("TEA1", "Green Tea", "herbal tea", "Food › Tea", category="grocery", pricing=""),
    item("LAMP1", "A second lamp of the same id", "floor lamp", LAMPS),
    item("TOOLONGANID", "No id has eleven signs", "floor lamp", LAMPS),
)
ANNOTATIONS = {
    "LAMP1": {"attributes": ["steel frame"], "instruction": "Find me a lamp", "instruction_attributes": ["steel frame"]}
}
INSTRUCTIONS = {
    "LAMP1": [
        {
            "instruction": "i want a red floor lamp.",
            "instruction_attributes": ["steel frame", "easy clean"],
            "instruction_options": ["navy blue", "small"],
        },
        {"instruction": "nothing asked", "instruction_attributes": [], "instruction_options": []},
    ]
}
DATA = ShopData(ITEMS, ANNOTATIONS, INSTRUCTIONS)


def three_products(folder: Path, goals: str = "human") -> Catalog:
    """The catalog of the products above."""
    return open_catalog(folder, {"goals": goals, "seed": 0, "three": True}, lambda: DATA)
