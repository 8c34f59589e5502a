"""Scripted customers: one uses only the observations, one uses the goal, and one acts at random.

The `Shopper` turns the instruction into a query, reads the results, opens the products that match best, chooses the
options that the instruction names, and buys. A policy can learn from it, because the policy reads the same text. The
`Oracle` receives the goal itself. Its success proves that a goal can be won.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from aem_jax.envs.webshop.analysis import terms
from aem_jax.envs.webshop.goals import PRICE_TEXT, Goal
from aem_jax.envs.webshop.pages import BACK, NEXT, PREVIOUS

CANDIDATES = 3
"""Number of products that the shopper opens before it chooses the best of them."""

_COST = re.compile(r"\$([\d.]+(?:e\+\d+)?)(?: to \$.+)?")
_BUTTONS = frozenset(name.lower() for name in (BACK, NEXT, PREVIOUS, "Search"))
_MARKUP = re.compile(r"^\s*\[(?:clicked )?button\] (.*) \[(?:clicked )?button_\]$")
_FILLERS = frozenset(
    terms(
        "i i'm am looking need find me my want to buy shopping which that is can you get should be friend would like "
        "has have some please something also item product price lower than dollars"
    )
)


@dataclass(frozen=True)
class Listing:
    """A product on a page of results."""

    asin: str
    title: str
    cost: float


@dataclass(frozen=True)
class Item:
    """A product on its own page."""

    title: str
    options: dict[str, tuple[str, ...]]


def read(observation: str) -> list[str]:
    """Extracts the texts of a page, in order, from its `text` or its `text_rich` form."""
    if " [SEP] " in observation:
        return observation.split(" [SEP] ")
    texts = []
    for line in observation.split("\n"):
        marked = _MARKUP.match(line)
        texts.append(marked[1] if marked else line.strip())
    return [text for text in texts if text]


def clickables(admissible: Sequence[str]) -> list[str]:
    """Returns the arguments of the `click[…]` actions among the admissible actions."""
    return [action[len("click[") : -1] for action in admissible if action.startswith("click[")]


def read_listings(observation: str, admissible: Sequence[str]) -> list[Listing]:
    """Parses the products on a page of results, in order."""
    names, texts = set(clickables(admissible)) - _BUTTONS, read(observation)
    return [
        Listing(text, title, float(cost[1]))
        for text, title, price in zip(texts, texts[1:], texts[2:])
        if text.lower() in names and (cost := _COST.fullmatch(price.strip()))  # a title may begin with $, too
    ]


def read_item(observation: str, admissible: Sequence[str]) -> Item:
    """Parses the title and the options on a product's page."""
    names, texts = set(clickables(admissible)), read(observation)
    at = next(i for i, text in enumerate(texts) if text.startswith("Price: "))
    options: dict[str, list[str]] = {}
    name = ""
    for text in texts[texts.index("< Prev") + 1 : at - 1]:
        if text in names:
            options.setdefault(name, []).append(text)
        else:
            name = text
    return Item(texts[at - 1], {name: tuple(values) for name, values in options.items() if values})


@dataclass
class Knowledge:
    """A shopper's knowledge of its visit.

    Attributes:
        wish: the instruction in lower case, without the price limit.
        wanted: the search terms of the wish.
        limit: the price limit in dollars; infinite if there is none.
        matches: asin -> fraction of the wanted terms that an opened product matches.
        settled: whether all candidates have been opened.
        asin: the product that was opened last.
        chosen: option -> value that was chosen for it.
        listings: products on the page, if it is a page of results.
        item: the product of the page, if it is a product's page.
    """

    wish: str = ""
    wanted: frozenset[str] = frozenset()
    limit: float = float("inf")
    matches: dict[str, float] = field(default_factory=dict)
    settled: bool = False
    asin: str = ""
    chosen: dict[str, str] = field(default_factory=dict)
    listings: Sequence[Listing] = ()
    item: Item | None = None

    def share(self, text: str) -> float:
        """Returns the fraction of the wanted terms that a text contains."""
        return len(self.wanted & set(terms(text))) / max(len(self.wanted), 1)

    def named(self, values: Sequence[str]) -> str | None:
        """Returns the value that the wish names; the longest one if it names several, None if it names none."""
        named = [value for value in values if re.search(rf"(?<![\w-]){re.escape(value)}(?![\w-])", self.wish)]
        return max(named, key=len, default=None)


class Shopper:
    """An expert that uses only the observations: `act` returns the next action, `did` records the executed action."""

    def __init__(self) -> None:
        self.known = Knowledge()
        """The knowledge so far, with the page that `act` read last."""

    def act(self, observation: str, admissible: Sequence[str]) -> str:
        """Returns the next action, as `search[…]` or `click[…]`.

        Args:
            observation: the page, as `text` or `text_rich`. The first one must contain the instruction.
            admissible: the possible actions on the page.
        """
        names = clickables(admissible)
        known = self.known
        known.listings, known.item = (), None
        if "search" in names:
            return self._begin(observation)
        if "buy now" in names:
            known.item = read_item(observation, admissible)
            return self._at_item(known.item)
        known.listings = read_listings(observation, admissible)
        if known.listings:
            return self._at_results()
        return "click[< prev]" if "< prev" in names else "click[back to search]"  # an unexpected page, or no result

    def did(self, action: str) -> None:
        """Records the action on the latest page of `act`. It may differ from the action that `act` returned."""
        name, known = action.partition("[")[2][:-1], self.known
        opened = [listing.asin for listing in known.listings if listing.asin.lower() == name]
        if opened:
            known.asin, known.chosen = opened[0], {}
        options = known.item.options if known.item else {}
        known.chosen |= {option: name for option, values in options.items() if name in values}

    def _begin(self, observation: str) -> str:
        texts = read(observation)
        wish = texts[texts.index("Instruction:") + 1]
        limit = PRICE_TEXT.search(wish)
        self.known.limit = float(limit[1]) if limit else float("inf")
        self.known.wish = PRICE_TEXT.sub("", wish).lower()
        self.known.wanted = frozenset(terms(self.known.wish)) - _FILLERS
        return f"search[{self.known.wish}]"

    def _at_results(self) -> str:
        known = self.known
        affordable = [listing for listing in known.listings if listing.cost <= known.limit] or known.listings
        ranked = sorted(affordable, key=lambda listing: -known.share(listing.title))[:CANDIDATES]
        unseen = [listing.asin for listing in ranked if listing.asin not in known.matches]
        known.settled = not unseen
        best = max(ranked, key=lambda listing: known.matches.get(listing.asin, -1.0)).asin
        return f"click[{(unseen[0] if unseen else best).lower()}]"

    def _at_item(self, item: Item) -> str:
        known = self.known
        wanted = {name: value for name, values in item.options.items() if (value := known.named(values))}
        share = known.share(" ".join([item.title, *item.options, *wanted.values()]))
        known.matches[known.asin] = share
        compared = known.settled or len(known.matches) >= CANDIDATES
        if share < 1 and not (compared and share >= max(known.matches.values())):
            return "click[< prev]"
        missing = [value for name, value in wanted.items() if known.chosen.get(name) != value]
        return f"click[{missing[0] if missing else 'buy now'}]"


class Oracle:
    """An expert that buys the product that a goal was written for.

    Args:
        goal: the goal.
    """

    def __init__(self, goal: Goal):
        self._goal = goal
        options = goal.options.values() if isinstance(goal.options, dict) else goal.options
        self._options = list(options)

    def act(self, admissible: Sequence[str]) -> str:
        """Returns the next action."""
        names = clickables(admissible)
        if "search" in names:
            return f"search[{self._goal.title}]"
        if "buy now" in names:
            while self._options:
                option = self._options.pop(0).lower()
                if option in names:
                    return f"click[{option}]"
            return "click[buy now]"
        return f"click[{self._goal.asin.lower()}]" if self._goal.asin.lower() in names else "click[next >]"


def random_agent(observation: str, admissible: Sequence[str], rng: random.Random) -> str:
    """Draws a possible action uniformly. A search uses two random words of the page."""
    choice = rng.choice(list(admissible))
    words = [word for text in read(observation) for word in text.split()]
    return choice if choice.startswith("click[") else f"search[{' '.join(rng.choices(words, k=2))}]"
