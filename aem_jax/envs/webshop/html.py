"""The shop's pages as HTML of our own, for a person in a browser, or for an agent that reads HTML.

They need nothing from elsewhere: products have a drawn tile where WebShop has a picture.
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
    """The templates, with what they all use."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals |= {"style": (_FOLDER / "style.css").read_text(encoding="utf-8"), "hue": hue, "pages": pages}
    return environment


def render_page(visit: Visit, address: str = "", following: str = "") -> str:
    """The page that a visit is at; its buttons post to an address what an agent would say.

    Args:
        visit: the visit.
        address: where buttons post to; empty: the page's own address.
        following: `split/number` of the customer after this one, whom the receipt offers to serve.
    """
    return render("visit.html.j2", visit=visit, page=visit.page, address=address, following=following)


def render(name: str, **values: Any) -> str:
    """One of the templates, filled in."""
    return templates().get_template(name).render(values)


def hue(text: str) -> int:
    """A colour for a product's tile, degrees from 0 to 359, the same for the same text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:2]) % 360
