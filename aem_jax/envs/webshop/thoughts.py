"""Thoughts of a shopper before an action: its wish, what it knows of the products, and why it acts so.

A thought has one or two remarks and the step. All are drawn, and say only what the knowledge holds.
"""

import itertools
import random
import re

from aem_jax.envs.thoughts import NUMBERS, Facts, Grammar, listed, think, thoughts_of
from aem_jax.envs.webshop.analysis import terms, words
from aem_jax.envs.webshop.experts import Item, Knowledge, Listing

WORDS = (13, 27)
"""Range of a thought's number of words."""

_WISH, _TITLE = 5, 4
"""Number of words of a wish and of a title that a thought repeats, at most."""

REMARKS: Grammar = {
    "wish": (
        "I need something with {needs}.",
        "the customer asks for {needs}.",
        "what counts is {needs}.",
        "I am looking for {needs}.",
        "the words that matter are {needs}.",
    ),
    "budget": (
        "it may cost up to {limit}.",
        "the price has to be below {limit}.",
        "I can spend {limit} at most.",
        "my limit is {limit}.",
        "the budget ends at {limit}.",
    ),
    "page": (
        "{results}I see {count} products on this page.",
        "{results}the search gave me {count} products here.",
        "{results}there are {count} products to choose from.",
        "{results}I have opened {viewed} so far.",
        "{results}I know {viewed} already.",
        "{at_item}this page shows {title}.",
        "{at_item}I am looking at {title}.",
        "{at_item}{title} is open now.",
        "{at_item}this product has {match}.",
        "{at_item}{match} fit this product.",
        "{first}I am at the start and have seen no product yet.",
        "{first}nothing is found yet.",
        "{first}this is the search page.",
    ),
    "choice": (
        "I have chosen {chosen}.",
        "{is_chosen}.",
        "my choice of {chosen} is made.",
    ),
}
"""Topic -> remarks about the wish and the page."""

STEPS: Grammar = {
    "search": (
        "let me search for {needs}.",
        "I will search with the words {needs}.",
        "first I search the shop for {needs}.",
        "a search for {needs} should find it.",
        "I type the whole wish, with {needs}, and search.",
        "the best start is a search for {needs}.",
    ),
    # Also what a careless shopper thinks, in the same words.
    "open": (
        "{reason}, so I open {asin}.",
        "{reason}. let me open {asin}.",
        "I will open {asin}, because {reason}.",
        "let me look at {asin}: {reason}.",
        "I click {asin}. {reason}.",
        "{reason}, that is why I try {asin}.",
    ),
    "reopen": (
        "{again}, so I open {asin} again.",
        "{again}. let me go back to {asin}.",
        "I return to {asin}, because {again}.",
        "I will take {asin} once more: {again}.",
    ),
    "choose": (
        "the wish names {value}, so I choose it as {option}.",
        "for {option} I take {value}.",
        "{value} is the {option} that I want. I click it.",
        "I still have to set {option}: {value} is right.",
        "let me choose {value} before I buy.",
        "{option} should be {value}, so I click that.",
    ),
    "buy": (
        "{enough}, so I buy it.",
        "{enough}. I buy it now.",
        "I will buy {title}, because {enough}.",
        "let me buy it: {enough}.",
        "time to buy {title}. {enough}.",
        "{enough}, that is why I click buy now.",
    ),
    "leave": (
        "{not_yet}, so I go back to the results.",
        "{not_yet}. back to the results.",
        "I go back, because {not_yet}.",
        "let me go back and compare: {not_yet}.",
        "I return to the list. {not_yet}.",
    ),
    "back": (
        "this page does not help me, so I go back to the search.",
        "I see no product that I could open here, so let me go back.",
        "from here I go back and try again.",
    ),
}
"""Step of a purchase -> sentences that lead to its action, and name its product or option."""

PHRASES: Grammar = {
    "reason": (
        "{title} may be right",
        "{title} looks good",
        "my guess is {title}",
        "{title} costs {cost}",
        "{cheap}{cost} for {title} is within the limit",
        "the title {title} has {match}",
        "{match} are in the title {title}",
        "I want to see the options of {title}",
    ),
    "again": (
        "{best}{title} was the best of those I opened",
        "{best}no product that I opened has more of the words than {title}",
        "I have seen {title} before",
        "{title} is still a choice",
        "I know {title} by now",
        "{title} had {known_match}",
    ),
    "enough": (
        "{title} looks right",
        "{title} is what I want",
        "{title} is good enough",
        "I am content with {title}",
        "I do not need to look further than {title}",
        "{all}it has all {number} words",
        "{match} are here",
        "{is_chosen}",
    ),
    "not_yet": (
        "{partial}{title} has only {match}",
        "{partial}only {match} fit {title}",
        "{partial}{title} does not have all that I want",
        "{partial}there may be something better than {title}",
        "I want to compare {title} with others",
    ),
}
"""Parts of steps."""

_GRAMMAR = thoughts_of(REMARKS, STEPS, PHRASES)


def thought(known: Knowledge, action: str, rng: random.Random) -> str:
    """Draws the thought of a shopper that is about to act.

    Args:
        known: the shopper's knowledge of the page and before.
        action: the action, `search[…]` or `click[…]`.
        rng: source of the wording.
    """
    step, facts = _read_action(known, action)
    return think(f"think_{step}", {**_known_facts(known), **facts}, _GRAMMAR, rng, WORDS)


def _known_facts(known: Knowledge) -> dict[str, str]:
    facts = {"needs": _needs(known)}
    if known.limit < float("inf"):
        facts["limit"] = f"${known.limit:.2f}"
    if known.listings:
        facts |= {"results": "", "count": _number(len(known.listings))}
        if known.matches:
            facts["viewed"] = f"{_number(len(known.matches))} product{'s' if len(known.matches) > 1 else ''}"
    elif known.item:
        facts |= {"at_item": ""} | _item_facts(known, known.item)
    elif not known.matches:
        facts["first"] = ""
    return facts


def _item_facts(known: Knowledge, item: Item) -> dict[str, str]:
    share = known.matches[known.asin]
    facts = {"title": _short(item.title)} | _match_facts(known, share)
    chosen = [value for option, value in known.chosen.items() if value in item.options.get(option, ())]
    if chosen:
        facts |= {
            "chosen": listed(chosen),
            "is_chosen": f"{listed(chosen)} {'is' if len(chosen) == 1 else 'are'} chosen",
        }
    return facts


def _match_facts(known: Knowledge, share: float) -> dict[str, str]:
    """Facts about the fraction of wanted terms that a text contains."""
    total = len(known.wanted)
    if not total:
        return {}
    facts = {"match": f"{_number(round(share * total))} of the {_number(total)} words", "number": _number(total)}
    return facts | {"all" if share == 1 else "partial": ""}


def _read_action(known: Knowledge, action: str) -> tuple[str, Facts]:
    """Returns the step that an action takes, and the facts about the action."""
    name = action.partition("[")[2][:-1]
    if action.startswith("search["):
        return "search", {}
    for listing in known.listings:
        if listing.asin.lower() == name:
            return _read_opening(known, listing)
    options = known.item.options if known.item else {}
    for option, values in options.items():
        if name in values:
            return "choose", {"option": option, "value": name}
    if name == "buy now":
        return "buy", {}
    return "leave" if name == "< prev" and known.item else "back", {}


def _read_opening(known: Knowledge, listing: Listing) -> tuple[str, Facts]:
    facts = {"asin": listing.asin.lower(), "title": _short(listing.title), "cost": f"${listing.cost:.2f}"}
    if listing.asin not in known.matches:
        cheap = {"cheap": ""} if listing.cost <= known.limit < float("inf") else {}
        return "open", facts | cheap | _match_facts(known, known.share(listing.title))
    share = known.matches[listing.asin]
    best = {"best": ""} if share == max(known.matches.values()) else {}
    match = _match_facts(known, share)
    return "reopen", facts | best | ({"known_match": match["match"]} if match else {})


def _needs(known: Knowledge) -> str:
    """Returns the first wanted words of the wish; words that follow each other stay together."""
    runs, left = [], _WISH
    is_wanted = lambda word: bool(known.wanted.intersection(terms(word)))
    for part in re.split(r"[,;:.] ", known.wish):
        for wanted, run in itertools.groupby(words(part), is_wanted):
            if wanted and left:
                runs.append(list(run)[:left])
                left -= len(runs[-1])
    return listed(" ".join(run) for run in runs) if runs else _short(known.wish)


def _short(title: str) -> str:
    return " ".join(title.split()[:_TITLE]).rstrip(",;:.-|")


def _number(count: int) -> str:
    return NUMBERS[count] if count < len(NUMBERS) else str(count)
