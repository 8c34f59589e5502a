"""The shop's pages as lists of pieces, and their two text formats for agents.

A page contains the same pieces of text in the same order as WebShop's HTML. `plain` joins them with ` [SEP] `. `rich`
puts each piece on its own line, and marks buttons and clicked buttons.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from aem_jax.envs.webshop.products import Product

PAGE_SIZE = 10
BUY, NEXT, PREVIOUS, BACK = "Buy Now", "Next >", "< Prev", "Back to Search"
SUB_PAGES = ("Description", "Features", "Reviews", "Attributes")
_HTML_SPACES = " \n\t\f\r"
_ESCAPED = {ord(sign): f"\\u{ord(sign):04x}" for sign in "<>&'"}  # as Flask writes JSON into HTML


class Kind(Enum):
    """Kind of a piece of a page."""

    TEXT = 0
    BUTTON = 1
    PRODUCT = 2
    OPTION = 3


Piece = tuple[Kind, str]


@dataclass(frozen=True)
class Page:
    """One page.

    Attributes:
        pieces: kind and text of each piece, in order.
        url: address of the page; contains search words and chosen options, as in WebShop.
        has_search_bar: whether the page has a search bar.
        name: `search`, `results`, `item`, `done`, or a sub-page's name.
        products: the products on the page.
        number: number of a page of results, from 1.
        total: number of products that the search found.
    """

    pieces: tuple[Piece, ...]
    url: str
    has_search_bar: bool = False
    name: str = ""
    products: tuple[Product, ...] = ()
    number: int = 0
    total: int = 0

    @property
    def clickables(self) -> list[str]:
        """Texts that can be clicked: buttons in lower case, then products in lower case, then options; each once."""
        buttons = [text.lower() for kind, text in self.pieces if kind is Kind.BUTTON]
        products = [text.lower() for kind, text in self.pieces if kind is Kind.PRODUCT]
        options = [text for kind, text in self.pieces if kind is Kind.OPTION]
        return list(dict.fromkeys(buttons + products + options))


def plain(page: Page) -> str:
    """Renders the page in WebShop's `text` mode."""
    return " [SEP] ".join(text.strip() for _, text in page.pieces)


def rich(page: Page, seen: Collection[str]) -> str:
    """Renders the page in WebShop's `text_rich` mode.

    Args:
        page: the page.
        seen: asins of the products opened since the last search page.
    """
    clicked, lines = "", []
    for kind, text in page.pieces:
        if kind is Kind.BUTTON:
            lines.append(f"[button] {text} [button_]\n")
        elif kind is Kind.OPTION:
            chosen = f'"{text}"' in page.url  # a quoted search word marks an option, too
            lines.append(
                f"  [clicked button] {text} [clicked button_]\n" if chosen else f"  [button] {text} [button_]\n"
            )
            clicked = f"You have clicked {text}.\n{clicked}" if chosen else clicked
        elif kind is Kind.PRODUCT:
            lines.append(
                f"\n[clicked button] {text} [clicked button_]\n" if text in seen else f"\n[button] {text} [button_]\n"
            )
        else:
            lines.append(text + "\n")
    return clicked + "".join(lines)


def search_page(instruction: str, url: str) -> Page:
    """Makes the page on which an episode starts."""
    texts = _texts("WebShop", "Instruction: ", instruction)
    return Page((*texts, (Kind.BUTTON, "Search")), url, has_search_bar=True, name="search")


def results_page(instruction: str | None, url: str, products: Sequence[Product], number: int, total: int) -> Page:
    """Makes one page of search results. Page numbers begin at 1 and may continue past the last product."""
    turns = [PREVIOUS, NEXT] if number > 1 else [NEXT]
    pieces = [*_head(instruction, BACK), *_texts(f"Page {number} (Total results: {total})"), *_buttons(*turns)]
    for product in products:
        pieces += [(Kind.PRODUCT, product.asin), *_texts(product.title, product.price_tag)]
    return Page(tuple(pieces), url, name="results", products=tuple(products), number=number, total=total)


def item_page(instruction: str | None, url: str, product: Product, *, show_attributes: bool = False) -> Page:
    """Makes the page of a product with its options."""
    pieces = _head(instruction, BACK, PREVIOUS)
    for name, values in product.options.items():
        pieces += [*_texts(name), *((Kind.OPTION, value) for _, value in _texts(*values))]
    pieces += _texts(product.title, f"Price: {product.price_tag}", "Rating: N.A.")  # the original loads no reviews
    pieces += _buttons(*(SUB_PAGES if show_attributes else SUB_PAGES[:3]), BUY)
    return Page(tuple(pieces), url, name="item", products=(product,))


def sub_page(instruction: str | None, url: str, product: Product, name: str) -> Page:
    """Makes a page with a product's description, features, reviews (always empty) or attributes."""
    pieces = _head(instruction, BACK, PREVIOUS)
    if name == "Description":
        pieces += _texts(product.description)
    elif name == "Features":
        pieces += _texts(*(f" {bullet}" for bullet in product.bullets))
    elif name == "Attributes":
        attributes = (f" {attribute}" for attribute in product.attributes)
        pieces += _texts(*attributes, product.category, product.query, product.kind)
    return Page(tuple(pieces), url, name=name, products=(product,))


def done_page(url: str, product: Product, chosen: Mapping[str, str], reward: float) -> Page:
    """Makes the receipt. As in the original, most of its fields are None."""
    options = json.dumps(dict(sorted(chosen.items()))).translate(_ESCAPED)
    receipt = ["asin", product.asin, "options", options, "attrs", "None", "category", "None", "query", "None"]
    target = ["asin", "options", "attrs", "price upper", "instuction text", "category", "product category", "query"]
    texts = [
        *(
            "Thank you for shopping with us!",
            "Your code: ",
            "None",
            " (Paste it in your MTurk interface.)",
            "Purchased",
        ),
        *(*receipt, "product category", "None", "Target", *target, "Goal ", "None", "Reward"),
        *("Your score (min 0.0, max 1.0)", str(reward), "Reward Details ", "None"),
    ]
    return Page(tuple(_texts(*texts)), url, name="done", products=(product,))


def _head(instruction: str | None, *buttons: str) -> list[Piece]:
    """Makes the top of every page except the search page. Without an instruction, it has only the buttons."""
    texts = [] if instruction is None else _texts("Instruction:", instruction)
    return [*texts, *_buttons(*buttons)]


def _buttons(*names: str) -> list[Piece]:
    return [(Kind.BUTTON, name) for name in names]


def _texts(*texts: str) -> list[Piece]:
    """Makes pieces of plain text. As in an HTML parser, empty texts are dropped and blank texts shrink to one space.

    Blank texts that contain a line break are dropped too.
    """
    pieces = []
    for text in texts:
        if not text.strip(_HTML_SPACES):
            if not text or "\n" in text:
                continue
            text = " "
        pieces.append((Kind.TEXT, text))
    return pieces
