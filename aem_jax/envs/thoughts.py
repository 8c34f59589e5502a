"""Thoughts in varied words: a grammar of phrasings, whose parts are said only where they are true.

A grammar maps a symbol to its phrasings. `{name}` in a phrasing is a fact, or another symbol. A phrasing can be said if
each of its names is a known fact, or a symbol that can be said. So each phrasing carries its own condition: `I hold
{held}` is said only where the fact `held` is known. A fact with an empty text is a condition without words.
"""

import itertools
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache

Facts = Mapping[str, str]
"""Name -> text. Missing names are unknown."""

Grammar = Mapping[str, Sequence[str]]
"""Symbol -> phrasings."""

NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]

DRAFTS = 32
"""Number of wordings that are drawn, at most, for one of the right length."""

_NAME = re.compile(r"\{(\w+)\}")


def thoughts_of(remarks: Grammar, steps: Grammar, phrases: Grammar) -> Grammar:
    """Returns a grammar of thoughts: `think_S` is one or two remarks of different topics, and step S."""
    orders = [order for count in (1, 2) for order in itertools.permutations(remarks, count)]
    thoughts = {
        f"think_{step}": [" ".join(f"{{{part}}}" for part in (*order, step)) for order in orders] for step in steps
    }
    return {**phrases, **remarks, **steps, **thoughts}


def think(symbol: str, facts: Facts, grammar: Grammar, rng: random.Random, words: tuple[int, int]) -> str:
    """Draws a thought: the first of `DRAFTS` wordings whose number of words is in the range, else the closest to it.

    A wording draws a phrasing of each symbol, uniformly among those that can be said.

    Args:
        symbol: start symbol.
        facts: facts that are known.
        grammar: the phrasings.
        rng: source of the draws.
        words: minimum and maximum number of words.

    Raises:
        ValueError: no phrasing of the symbol can be said, or a name is both a fact and a symbol.
    """
    if both := sorted(facts.keys() & grammar.keys()):
        raise ValueError(f"expected names that are either facts or symbols, got {both} as both; rename the facts")
    sayable: dict[str, list[str]] = {}  # symbol -> phrasings that can be said

    def can_say(name: str) -> bool:
        if name not in facts and name not in sayable:
            sayable[name] = [p for p in grammar.get(name, ()) if all(map(can_say, _names(p)))]
        return name in facts or bool(sayable[name])

    def draw(name: str) -> str:
        return facts[name] if name in facts else _NAME.sub(lambda inner: draw(inner[1]), rng.choice(sayable[name]))

    if not can_say(symbol):
        raise ValueError(f"expected a phrasing of {symbol!r} for the facts {sorted(facts)}, got none; add one")
    least, most = words
    best, best_distance = "", float("inf")
    for _ in range(DRAFTS):
        draft = _sentences(draw(symbol))
        count = len(draft.split())
        distance = max(least - count, count - most, 0)
        if distance < best_distance:
            best, best_distance = draft, distance
        if not distance:
            break
    return best


def a(noun: str) -> str:
    """`egg` -> `an egg`."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def listed(items: Iterable[str]) -> str:
    """`a`, `b`, `c` -> `a, b and c`."""
    *first, last = items
    return f"{', '.join(first)} and {last}" if first else last


def _sentences(text: str) -> str:
    """Starts each sentence with a capital."""
    return re.sub(r"(^|[.?!] )([a-z])", lambda start: start[1] + start[2].upper(), text)


@lru_cache(maxsize=4096)
def _names(phrasing: str) -> tuple[str, ...]:
    return tuple(_NAME.findall(phrasing))
