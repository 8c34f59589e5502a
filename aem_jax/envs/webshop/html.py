"""The shop's pages as aem_jax's own HTML, for a person in a browser, or in short for an agent that reads HTML.

The pages load no external files. A product has a drawn tile in place of WebShop's picture.
"""

import hashlib
from functools import cache
from pathlib import Path
from typing import Any

import jinja2

from aem_jax.envs.webshop import pages
from aem_jax.envs.webshop.engine import Visit

_FOLDER = Path(__file__).with_name("templates")


@cache
def templates() -> jinja2.Environment:
    """Returns the template environment, with the values that all templates use."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals |= {"style": (_FOLDER / "style.css").read_text(encoding="utf-8"), "hue": hue, "pages": pages}
    return environment


def render_page(visit: Visit, address: str = "", following: str = "") -> str:
    """Renders the current page of a visit. Its buttons post an agent's action to an address.

    Args:
        visit: the visit.
        address: address that buttons post to; empty: the page's own address.
        following: `split/number` of the next customer, which the receipt offers.
    """
    return render("visit.html.j2", visit=visit, page=visit.page, address=address, following=following)


def render_observation(visit: Visit) -> str:
    """Renders the current page of a visit for an agent: without style, and without what WebShop's pages do not show.

    That is the product's kind and query, and the goal behind the instruction.
    """
    return render("visit.html.j2", visit=visit, page=visit.page, address="", following="", agent=True)


def render(name: str, **values: Any) -> str:
    """Renders a template with values."""
    return templates().get_template(name).render(values)


def hue(text: str) -> int:
    """Returns the hue of a product's tile, in degrees from 0 to 359. The same text gives the same hue."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:2]) % 360
