"""WebShop's reward of a purchase, from 0 to 1.

reward = r_type · (attributes matched + options matched + [price ≤ limit]) / (attributes + options + 1)
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache

from rapidfuzz.fuzz import token_set_ratio
from rapidfuzz.utils import default_process

from aem_jax.envs.webshop.goals import Goal
from aem_jax.envs.webshop.products import Product
from aem_jax.envs.webshop.taggers import Tagger

_COLOURS_TEXT = (
    "alabaster apricot aqua ash asphalt azure banana beige black blue blush bordeaux bronze brown burgundy camel "
    "camo caramel champagne charcoal cheetah chestnut chocolate christmas coffee cognac copper coral cranberry "
    "cream crystal dark denim eggplant elephant espresso fuchsia gold granite grape graphite grass gray green grey "
    "heather indigo ivory ivy khaki lavender lemon leopard light lilac lime magenta maroon mauve merlot midnight "
    "mint mocha multicolor mushroom mustard natural navy nude olive orange peach pewter pink plum purple rainbow "
    "red rose royal rust sand sapphire seashell silver skull slate steel stone stonewash sunflower tan taupe teal "
    "tiger turquoise violet walnut wheat white wine yellow"
)
COLOURS = tuple(_COLOURS_TEXT.split())
"""WebShop's own list of colours (MIT licence). The first one that an option contains replaces the whole option."""

_LATIN_1 = dict.fromkeys(range(128, 256))  # dropped before words are compared; other letters are kept


@dataclass(frozen=True)
class Score:
    """The reward of a purchase, and its parts.

    Attributes:
        reward: 0 to 1.
        type: r_type, one of 0, 0.1, 0.5 and 1.
        attributes: number of the goal's attributes that the product has.
        options: number of the goal's options that were chosen.
        affordable: whether the price is at most the limit.
    """

    reward: float
    type: float
    attributes: int
    options: int
    affordable: bool


def score(product: Product, price: float, chosen: Iterable[str], goal: Goal, nouns: Tagger) -> Score:
    """Scores a purchase.

    Args:
        product: the bought product.
        price: its price, in dollars.
        chosen: values of the chosen options.
        goal: the customer's goal.
        nouns: the tagger.
    """
    kind = type_match(product, goal, nouns)
    attributes = sum(has_attribute(product, wanted) for wanted in goal.attributes)
    options = matched_options(chosen, goal.options)
    affordable = price <= goal.price_limit
    parts = len(goal.attributes) + len(goal.options) + 1
    return Score((attributes + options + affordable) / parts * kind, kind, attributes, options, affordable)


def type_match(product: Product, goal: Goal, nouns: Tagger) -> float:
    """Returns r_type: 1 for the right kind of product, 0.5 or 0.1 for a doubtful kind, 0 for another kind.

    The kind is right if the queries are equal, if the category paths share two parts, or if the title contains more
    than a fifth of the goal's nouns. If the title contains less than a tenth of the nouns, r_type is 0.1; if it
    contains none, r_type is 0. These two cases take precedence.
    """
    wanted = nouns(goal.title)
    common = set(nouns(product.title)) & set(wanted)
    share = len(common) / len(wanted) if wanted else 0.2
    parts = [{part.strip() for part in kind.split("›")} for kind in (product.kind, goal.kind)]
    right = product.query == goal.query or len(parts[0] & parts[1]) >= 2 or share > 0.2
    if share == 0:
        return 0.0
    if share < 0.1:
        return 0.1
    return 1.0 if right else 0.5


def has_attribute(product: Product, wanted: str) -> bool:
    """Whether an attribute of the product is similar to the wanted one, or the product's texts contain it."""
    return (
        any(alike(own, wanted) for own in product.attributes)
        or wanted in product.title.lower()
        or wanted in " ".join(product.bullets).lower()
        or wanted in product.description.lower()
    )


def matched_options(chosen: Iterable[str], wanted: Iterable[str] | Mapping[str, str]) -> int:
    """Counts the wanted options that were chosen. Colours are compared by their plain names.

    Synthetic goals contain options as `name -> value`. As in the original, name and value are compared together.
    """
    pairs = wanted.items() if isinstance(wanted, Mapping) else wanted
    own = [plain_colour(option) for option in chosen]
    return sum(any(alike(mine, plain_colour(option)) for mine in own) for option in pairs)


def plain_colour(option: str | tuple[str, str]) -> str:
    """Returns the colour in an option's text, the alphabetically first of several; without a colour, the text itself.

    `navy blue` -> `blue`. In a (name, value) pair, only a complete name or value counts as a colour.
    """
    return next((colour for colour in COLOURS if colour in option), str(option))


@lru_cache(maxsize=4096)
def alike(one: str, other: str) -> bool:
    """Whether two texts have a rounded `token_set_ratio` above 85 of 100. It ignores order and repetition of words."""
    return round(token_set_ratio(_plain(one), _plain(other))) > 85


def _plain(text: str) -> str:
    return default_process(text.translate(_LATIN_1))
