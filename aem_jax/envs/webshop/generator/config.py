"""Settings of the generated shop."""

from dataclasses import dataclass

CATEGORIES = ("beauty", "fashion", "garden", "grocery", "electronics")


@dataclass(frozen=True)
class GeneratorConfig:
    """Settings of the generated shop. The default size is that of WebShop's small version."""

    products: int = 1000
    """Number of products."""
    goals_per_product: int = 3
    """Number of instructions per product, before repeated ones are removed."""
    categories: tuple[str, ...] = CATEGORIES
    """Categories of products: some of beauty, fashion, garden, grocery and electronics."""
    kinds_per_category: int = 5
    """Number of kinds of products in a category, at most five."""
    attributes: tuple[int, int] = (3, 6)
    """Minimum and maximum number of attributes of a product."""
    asked: tuple[int, int] = (1, 3)
    """Minimum and maximum number of attributes that an instruction requires."""
    option_values: int = 6
    """Maximum number of values of an option."""
    max_options: int = 2
    """Maximum number of options of a product."""
    brief: bool = False
    """Whether titles, ids and instructions are short and have a fixed form, for policies of a million parameters."""

    def __post_init__(self) -> None:
        for name in ("categories", "attributes", "asked"):  # JSON gives lists
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not self.categories or not set(self.categories) <= set(CATEGORIES):
            raise ValueError(f"expected categories of {', '.join(CATEGORIES)}, got {list(self.categories)}")
        most = {"products": 10**6, "goals_per_product": 100, "kinds_per_category": 5, "option_values": 12}
        for name, highest in (most | {"max_options": 2}).items():
            lowest = 0 if name == "max_options" else 1
            if not lowest <= getattr(self, name) <= highest:
                raise ValueError(f"expected {name} from {lowest} to {highest}, got {getattr(self, name)}")
        for name, highest in (("attributes", 6), ("asked", self.attributes[0])):
            bounds = getattr(self, name)
            if len(bounds) != 2 or not 1 <= bounds[0] <= bounds[1] <= highest:
                raise ValueError(f"expected {name} as (least, most) from 1 to {highest}, got {list(bounds)}")
