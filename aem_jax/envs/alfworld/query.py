"""The world that texts describe, and conjunctive queries over its facts.

Two rules follow the stock engine, because they show in its lists. Rows are sorted by the types of their arguments, then
by the ids of the arguments. Different variables of a query are bound to different objects.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache

from aem_jax.envs.alfworld.facts import Extensions, Facts

Placeholder = tuple[str, str]
"""A variable of a query: (name, type)."""
Query = tuple[tuple[str, tuple[Placeholder, ...]], ...]
"""A conjunction of (predicate, placeholders)."""


@dataclass(frozen=True)
class Entity:
    """An object with the attributes that an expression can read: `{o.indefinite} {o.name}`."""

    id: str
    type: str
    name: str
    definite: str = "the"
    indefinite: str = "a"
    noun: str | None = None
    adj: str | None = None
    desc: str | None = None
    room_type: str | None = None
    synonyms: tuple[str, ...] | None = None

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True)
class World:
    """The facts of one player and the objects of its game."""

    facts: Facts
    entities: Mapping[str, Entity]
    types: Extensions
    ranks: Mapping[str, tuple[int, int]]
    """Object -> (depth, position) of its type. Rows of a query are sorted by type, then by ids of their arguments."""


@lru_cache(maxsize=4096)
def parse_query(text: str) -> Query:
    """Parses `p(a:t, b:u) & q(a:t)` to ((p, ((a, t), (b, u))), (q, ((a, t),))). An empty text is an empty query."""
    query = []
    for part in text.split("&") if text.strip() else ():
        found = re.fullmatch(r"\s*(!?[\w/]+)\s*\(([^()]*)\)\s*", part)
        if found is None:
            raise ValueError(f"expected a query like 'p(a:t) & q(a:t, b:u)', got {text!r}")
        pairs = [[side.strip() for side in item.split(":")] for item in found[2].split(",") if item.strip()]
        query.append((found[1], tuple((pair[0], pair[-1]) for pair in pairs)))
    return tuple(query)


def solve(query: Query, world: World, bindings: Mapping[Placeholder, str]) -> Iterator[Mapping[Placeholder, str]]:
    """Yields every extension of `bindings` for which every atom of the query is a fact, in the order of the facts.

    Raises:
        ValueError: a placeholder has a type that the domain does not declare.
    """
    if not query:
        yield bindings
        return
    (predicate, placeholders), rest = query[0], query[1:]
    known = [(at, bindings[key]) for at, key in enumerate(placeholders) if key in bindings]
    members = []
    for _, kind in placeholders:
        if kind not in world.types:
            raise ValueError(f"expected a type of the domain in {predicate!r}, got {kind!r}")
        members.append(world.types[kind])
    if len(known) == len(placeholders):
        args = tuple([name for _, name in known])
        if args in world.facts.rows(predicate) and all(name in kind for name, kind in zip(args, members, strict=True)):
            yield from solve(rest, world, bindings)
        return
    if known:
        positions = tuple([at for at, _ in known])
        key = known[0][1] if len(known) == 1 else tuple([name for _, name in known])
        rows = world.facts.index(predicate, positions).get(key, ())
    else:
        rows = world.facts.rows(predicate)
    for args in _ordered(rows, world.ranks):
        if len(args) != len(placeholders) or not all(name in kind for name, kind in zip(args, members, strict=True)):
            continue
        extended = dict(bindings)
        taken = set(bindings.values())
        for key, name in zip(placeholders, args, strict=True):
            if extended.get(key) != name:
                if key in extended or name in taken:
                    break
                extended[key] = name
                taken.add(name)
        else:
            yield from solve(rest, world, extended)


def _ordered(rows, ranks: Mapping[str, tuple[int, int]]) -> list[tuple[str, ...]]:
    """Sorts rows by the types of their arguments (shallow types first), then by name."""
    ordered = sorted(rows)
    if len({tuple([ranks[name] for name in args]) for args in ordered}) > 1:
        ordered.sort(key=lambda args: (sum(ranks[name][0] for name in args), [ranks[name][1] for name in args]))
    return ordered
