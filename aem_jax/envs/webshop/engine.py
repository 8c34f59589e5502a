"""A visit to the shop: searches and clicks from a goal to a purchase. Every page matches the original.

The engine also reproduces the original's quirks. The original identifies a page by words in its address, and the
address contains the search words too. After a search for `item_page`, `< Prev` on a result therefore goes to the
results.
"""

import json
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass

from aem_jax.envs.webshop import pages
from aem_jax.envs.webshop.catalog import SEARCH_LIMIT, Catalog
from aem_jax.envs.webshop.goals import Goal
from aem_jax.envs.webshop.pages import Kind
from aem_jax.envs.webshop.reward import Score, score
from aem_jax.envs.webshop.taggers import Tagger

_ACTION = re.compile(r"([^[\n]+)\[(.+)\]")
"""The original divides an action at its last `[`, so that options and searches with a bracket are impossible."""
_PAGE_NAMES = ("search_results", "item_page", "item_sub_page", "done")
_SITE = "http://127.0.0.1:3000"


@dataclass(frozen=True)
class Shop:
    """Data that visits share.

    Attributes:
        catalog: products and search.
        nouns: the tagger of the reward.
        page_size: number of products on a page of results.
        show_attributes: whether items have a page that lists their attributes.
        repeat_instruction: whether all pages show the instruction, or only the search page.
    """

    catalog: Catalog
    nouns: Tagger
    page_size: int = pages.PAGE_SIZE
    show_attributes: bool = False
    repeat_instruction: bool = True


def parse_action(text: str) -> tuple[str, str] | None:
    """Parses `name[argument]` to (name, argument in lower case); None for any other text.

    >>> parse_action("search[Red Shoes]")
    ('search', 'red shoes')
    >>> parse_action("click[large [pack of 2]]")
    ('click', 'large [pack of 2]')
    """
    match = _ACTION.match(text)
    return (match[1], match[2].lower()) if match else None


class Visit:
    """One visit of a customer to the shop.

    Attributes:
        goal: the customer's goal.
        page: the current page.
        score: score of the purchase; None before a purchase.
        acted: whether the last action was valid.

    Args:
        shop: data that visits share.
        goal: the customer's goal.
        session: name of the visit. It is part of the addresses, and the seed of `search[<r>]`.
    """

    def __init__(self, shop: Shop, goal: Goal, session: str = "0"):
        self._shop, self.goal, self._session = shop, goal, session
        self.score: Score | None = None
        self.acted = True
        self._instruction = goal.instruction if shop.repeat_instruction else None
        self._rng = random.Random(f"visit/{session}")
        self._start()

    @property
    def done(self) -> bool:
        """Whether the customer has bought a product."""
        return self.score is not None

    @property
    def reward(self) -> float:
        """Reward of the purchase; 0 before a purchase."""
        return self.score.reward if self.score else 0.0

    @property
    def instruction(self) -> str | None:
        """The instruction, if the current page shows it."""
        if self.page.name == "search":
            return self.goal.instruction
        return None if self.done else self._instruction

    @property
    def text(self) -> str:
        """The page in `text` mode."""
        return pages.plain(self.page)

    @property
    def rich(self) -> str:
        """The page in `text_rich` mode."""
        return pages.rich(self.page, self._seen)

    @property
    def seen(self) -> frozenset[str]:
        """Asins of the products opened since the last search page."""
        return frozenset(self._seen)

    @property
    def query(self) -> str:
        """The latest search query."""
        return " ".join(self._keywords)

    @property
    def chosen(self) -> Mapping[str, str]:
        """Options chosen for the current item, name -> value."""
        return dict(self._options)

    @property
    def bought(self) -> str | None:
        """The asin of the bought product; None before a purchase."""
        return self._shop.catalog.product(self._item).asin if self.done and self._item is not None else None

    def step(self, action: str) -> None:
        """Executes `search[…]` or `click[…]`. Any other text changes nothing.

        Raises:
            ValueError: the visit is over.
        """
        if self.done:
            raise ValueError("expected a running visit, got one that ended with a purchase")
        parsed = parse_action(action)
        name, argument = parsed or ("", "")
        self.acted = name == "search" or (name == "click" and argument != "search" and argument in self.page.clickables)
        if self.acted and name == "search":
            self._search(argument.split(" "))
        elif self.acted:
            self._click(argument)

    def _start(self) -> None:
        self._keywords: list[str] = []
        self._results: tuple[int, ...] = ()
        self._number = 1
        self._item: int | None = None
        self._seen: set[str] = set()
        self._options: dict[str, str] = {}
        self.page = pages.search_page(self.goal.instruction, f"{_SITE}/{self._session}")

    def _search(self, keywords: list[str], number: int = 1) -> None:
        self._keywords, self._number, self._item, self._options = keywords, number, None, {}
        self._results = self._find(keywords)
        size = self._shop.page_size
        shown = [self._shop.catalog.product(result) for result in self._results[(number - 1) * size : number * size]]
        url = f"{_SITE}/search_results/{self._session}/{'+'.join(keywords)}/{number}"
        self.page = pages.results_page(self._instruction, url, shown, number, len(self._results))

    def _find(self, keywords: list[str]) -> tuple[int, ...]:
        """Finds products for search words. The first word may select another kind of search."""
        catalog, rest = self._shop.catalog, " ".join(keywords[1:]).strip()
        match keywords[0]:
            case "<r>":
                return tuple(self._rng.sample(range(len(catalog)), min(SEARCH_LIMIT, len(catalog))))
            case "<a>":
                return catalog.where("attributes", rest)
            case "<c>":
                return catalog.where("category", keywords[1].strip() if len(keywords) > 1 else "")
            case "<q>":
                return catalog.where("query", rest)
        return catalog.search(" ".join(keywords))

    def _click(self, name: str) -> None:
        at = next((page for page in _PAGE_NAMES if page in self.page.url), "")
        if name == pages.BUY.lower():
            self._buy()
        elif name == pages.BACK.lower():
            self._start()
        elif name == pages.NEXT.lower() and at == "search_results":
            self._search(self._keywords, self._number + 1)
        elif name == pages.PREVIOUS.lower() and at == "search_results":
            self._search(self._keywords, self._number - 1)
        elif name == pages.PREVIOUS.lower() and at == "item_page":
            self._search(self._keywords, self._number)
        elif sub := next((sub_page for sub_page in pages.SUB_PAGES if sub_page.lower() == name), None):
            self._open_sub_page(sub)
        else:
            self._open_item(name)

    def _open_item(self, name: str) -> None:
        """Opens the item page after a click on a product, on an option, or on `< Prev` of a sub-page."""
        catalog = self._shop.catalog
        for kind, text in self.page.pieces:
            if kind is Kind.PRODUCT and text.lower() == name:
                self._item = catalog.find(text)
                self._seen.add(text)
        assert self._item is not None
        product = catalog.product(self._item)
        if (Kind.OPTION, name) in self.page.pieces:
            # if several options have the same value, the last of them gets it
            option = [option for option, values in product.options.items() if name in values][-1]
            self._options[option] = name
        url = f"{self._item_url('item_page', product.asin)}/{json.dumps(self._options)}"
        show = self._shop.show_attributes
        self.page = pages.item_page(self._instruction, url, product, show_attributes=show)

    def _open_sub_page(self, name: str) -> None:
        assert self._item is not None
        product = self._shop.catalog.product(self._item)
        url = f"{self._item_url('item_sub_page', product.asin)}/{name}/{self._options}"
        self.page = pages.sub_page(self._instruction, url, product, name)

    def _item_url(self, page: str, asin: str) -> str:
        return f"{_SITE}/{page}/{self._session}/{asin}/{'+'.join(self._keywords)}/{self._number}"

    def _buy(self) -> None:
        assert self._item is not None
        product = self._shop.catalog.product(self._item)
        price = float(self._shop.catalog.prices[self._item])
        self.score = score(product, price, self._options.values(), self.goal, self._shop.nouns)
        url = f"{_SITE}/done/{self._session}/{product.asin}/{self._options}"
        self.page = pages.done_page(url, product, self._options, self.score.reward)
