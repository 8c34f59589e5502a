"""Scripted customers: one uses only the observations, one uses the goal, and one acts at random.

The `Shopper` turns the instruction into a query, reads the results, opens the products that match best, chooses the
options that the instruction names, and buys. A policy can learn from it, because the policy reads the same text. The
`Oracle` receives the goal itself. Its success proves that a goal can be won.
"""

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from aem_jax.envs.webshop.analysis import terms
from aem_jax.envs.webshop.goals import Goal

CANDIDATES = 3
"""Number of products that the shopper opens before it chooses the best of them."""

_PRICE = re.compile(r",? and price lower than ([\d.]+) dollars")
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
    names, texts = set(clickables(admissible)), read(observation)
    return [
        Listing(text, title, float(price.split()[0].lstrip("$")))
        for text, title, price in zip(texts, texts[1:], texts[2:])
        if text.lower() in names and price.startswith("$")
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


class Shopper:
    """An expert that uses only the observations: `act` returns the next action, `did` records the executed action."""

    def __init__(self) -> None:
        self._wish = ""
        self._wanted: frozenset[str] = frozenset()
        self._limit = float("inf")
        self._matches: dict[str, float] = {}  # asin -> fraction of the wanted terms that it matches
        self._settled = False  # whether all candidates have been opened
        self._asin = ""
        self._chosen: dict[str, str] = {}
        self._listings: Sequence[Listing] = ()
        self._options: Mapping[str, Sequence[str]] = {}

    def act(self, observation: str, admissible: Sequence[str]) -> str:
        """Returns the next action, as `search[…]` or `click[…]`.

        Args:
            observation: the page, as `text` or `text_rich`. The first one must contain the instruction.
            admissible: the possible actions on the page.
        """
        names = clickables(admissible)
        self._listings, self._options = (), {}
        if "search" in names:
            return self._begin(observation)
        if "buy now" in names:
            return self._at_item(read_item(observation, admissible))
        self._listings = read_listings(observation, admissible)
        if self._listings:
            return self._at_results()
        return "click[< prev]" if "< prev" in names else "click[back to search]"  # an unexpected page, or no result

    def did(self, action: str) -> None:
        """Records the action on the latest page of `act`. It may differ from the action that `act` returned."""
        name = action.partition("[")[2][:-1]
        opened = [listing.asin for listing in self._listings if listing.asin.lower() == name]
        if opened:
            self._asin, self._chosen = opened[0], {}
        self._chosen |= {option: name for option, values in self._options.items() if name in values}

    def _begin(self, observation: str) -> str:
        texts = read(observation)
        wish = texts[texts.index("Instruction:") + 1]
        limit = _PRICE.search(wish)
        self._limit = float(limit[1]) if limit else float("inf")
        self._wish = _PRICE.sub("", wish).lower()
        self._wanted = frozenset(terms(self._wish)) - _FILLERS
        return f"search[{self._wish}]"

    def _at_results(self) -> str:
        affordable = [listing for listing in self._listings if listing.cost <= self._limit] or self._listings
        ranked = sorted(affordable, key=lambda listing: -self._share(listing.title))[:CANDIDATES]
        unseen = [listing.asin for listing in ranked if listing.asin not in self._matches]
        self._settled = not unseen
        best = max(ranked, key=lambda listing: self._matches.get(listing.asin, -1.0)).asin
        return f"click[{(unseen[0] if unseen else best).lower()}]"

    def _at_item(self, item: Item) -> str:
        self._options = item.options
        wanted = {name: value for name, values in item.options.items() if (value := self._named(values))}
        share = self._share(" ".join([item.title, *item.options, *wanted.values()]))
        self._matches[self._asin] = share
        known = self._settled or len(self._matches) >= CANDIDATES
        if share < 1 and not (known and share >= max(self._matches.values())):
            return "click[< prev]"
        missing = [value for name, value in wanted.items() if self._chosen.get(name) != value]
        return f"click[{missing[0] if missing else 'buy now'}]"

    def _share(self, text: str) -> float:
        """Returns the fraction of the wanted terms that a text contains."""
        return len(self._wanted & set(terms(text))) / max(len(self._wanted), 1)

    def _named(self, values: Sequence[str]) -> str | None:
        """Returns the value that the instruction names; the longest one if it names several, None if it names none."""
        named = [value for value in values if re.search(rf"(?<![\w-]){re.escape(value)}(?![\w-])", self._wish)]
        return max(named, key=len, default=None)


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
