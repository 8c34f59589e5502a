"""Settings of the shop that we make."""

from dataclasses import dataclass

CATEGORIES = ("beauty", "fashion", "garden", "grocery", "electronics")


@dataclass(frozen=True)
class GeneratorConfig:
    """What the shop sells. The defaults are as large as WebShop's small version."""

    products: int = 1000
    """Products."""
    goals_per_product: int = 3
    """Instructions written for each product, less those in the same words."""
    categories: tuple[str, ...] = CATEGORIES
    """Categories to sell, of beauty, fashion, garden, grocery and electronics."""
    kinds_per_category: int = 5
    """Kinds of things in each, at most five."""
    attributes: tuple[int, int] = (3, 6)
    """Least and most attributes of a product."""
    asked: tuple[int, int] = (1, 3)
    """Least and most attributes that an instruction asks for."""
    option_values: int = 6
    """Most values of an option."""
    max_options: int = 2
    """Most options of a product."""
    brief: bool = False
    """Short titles, ids and instructions, of always the same form: for policies of a million parameters."""

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
