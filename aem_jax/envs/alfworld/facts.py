"""Facts with indexes, searches over them, and the effects of actions on them.

A search is a chain of steps. A step matches an atom against an index, checks a bound atom, compares two bindings, tests
a nested condition, or iterates over the objects of a type. A chain is data, which `schema.py` makes once per domain.
`link` turns a chain into nested closures over one player's facts. Bindings are stored in a flat list, with one slot per
variable or constant.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from operator import itemgetter

from aem_jax.envs.alfworld.pddl import ROOT_TYPE, Effect

Args = tuple[str, ...]
Run = Callable[[list[str]], bool]
"""Function that runs the rest of a chain on the bindings; it returns True to stop the search."""
Extensions = Mapping[str, frozenset[str]]
"""Type -> its objects, subtypes included."""


class Facts:
    """Sets of argument tuples by predicate, with indexes by bound positions that are built on first use.

    Predicates that no action changes are looked up in `base`. All players of a game share `base` and never write to it.
    """

    def __init__(self, rows: Mapping[str, Iterable[Args]], base: "Facts | None" = None):
        self._rows = {predicate: set(args) for predicate, args in rows.items()}
        self._indexes: dict[str, dict[tuple[int, ...], dict]] = {}
        self._base = base

    def rows(self, predicate: str) -> set[Args]:
        """Returns all facts of a predicate (a live set)."""
        if self._base is not None and predicate not in self._rows:
            return self._base.rows(predicate)
        return self._rows.setdefault(predicate, set())

    def index(self, predicate: str, positions: tuple[int, ...]) -> dict:
        """Returns the live index of facts by their arguments at `positions`: a name for one position, else a tuple."""
        if self._base is not None and predicate not in self._rows:
            return self._base.index(predicate, positions)
        indexes = self._indexes.setdefault(predicate, {})
        if positions not in indexes:
            index, key = {}, itemgetter(*positions)
            for args in self.rows(predicate):
                index.setdefault(key(args), set()).add(args)
            indexes[positions] = index
        return indexes[positions]

    def add(self, predicate: str, args: Args) -> bool:
        """Makes a fact true; returns whether it was false."""
        rows = self._rows[predicate]
        if args in rows:
            return False
        rows.add(args)
        for positions, index in self._indexes.get(predicate, {}).items():
            index.setdefault(itemgetter(*positions)(args), set()).add(args)
        return True

    def discard(self, predicate: str, args: Args) -> bool:
        """Makes a fact false; returns whether it was true."""
        rows = self._rows[predicate]
        if args not in rows:
            return False
        rows.discard(args)
        for positions, index in self._indexes.get(predicate, {}).items():
            index[itemgetter(*positions)(args)].discard(args)
        return True

    def __iter__(self):
        for source in (self._base, self):
            for predicate, rows in source._rows.items() if source is not None else ():
                for args in rows:
                    yield predicate, args


@dataclass(frozen=True)
class Match:
    """Binds the free arguments of an atom to those of every fact that matches the bound arguments."""

    predicate: str
    bound: tuple[tuple[int, int], ...]
    """(position, slot) pairs of bound arguments."""
    free: tuple[tuple[int, int, str], ...]
    """(position, slot, type) triples of arguments to bind."""

    def link(self, facts: Facts, types: Extensions, then: Run) -> Run:
        free = [(at, slot, None if kind == ROOT_TYPE else types.get(kind, frozenset())) for at, slot, kind in self.free]
        if self.bound:
            index = facts.index(self.predicate, tuple(at for at, _ in self.bound))
            key = itemgetter(*(slot for _, slot in self.bound))
            select = lambda b: index.get(key(b), ())
        else:
            rows = facts.rows(self.predicate)
            select = lambda b: rows

        def run(b: list[str]) -> bool:
            for args in select(b):
                for at, slot, members in free:
                    name = args[at]
                    if members is not None and name not in members:
                        break
                    b[slot] = name
                else:
                    if then(b):
                        return True
            return False

        return run


@dataclass(frozen=True)
class Check:
    """Continues if a fully bound atom is a fact (or, unless `wanted`, is not)."""

    predicate: str
    slots: tuple[int, ...]
    wanted: bool

    def link(self, facts: Facts, types: Extensions, then: Run) -> Run:
        rows, slots, wanted = facts.rows(self.predicate), self.slots, self.wanted
        if len(slots) == 1:
            (slot,) = slots
            return lambda b: ((b[slot],) in rows) is wanted and then(b)
        return lambda b: (tuple([b[slot] for slot in slots]) in rows) is wanted and then(b)


@dataclass(frozen=True)
class Compare:
    """Continues if two bindings are the same object (or, unless `wanted`, are not)."""

    slots: tuple[int, int]
    wanted: bool

    def link(self, facts: Facts, types: Extensions, then: Run) -> Run:
        (left, right), wanted = self.slots, self.wanted
        return lambda b: (b[left] == b[right]) is wanted and then(b)


@dataclass(frozen=True)
class Test:
    """Continues if one (or, unless `wanted`, none) of the alternatives has a solution."""

    alternatives: tuple[tuple["Step", ...], ...]
    wanted: bool

    def link(self, facts: Facts, types: Extensions, then: Run) -> Run:
        runs, wanted = [link(steps, facts, types, lambda b: True) for steps in self.alternatives], self.wanted
        if len(runs) == 2:
            first, second = runs
            return lambda b: (first(b) or second(b)) is wanted and then(b)
        return lambda b: any(run(b) for run in runs) is wanted and then(b)


@dataclass(frozen=True)
class Each:
    """Binds a variable to every object of its type."""

    slot: int
    type: str

    def link(self, facts: Facts, types: Extensions, then: Run) -> Run:
        slot, members = self.slot, sorted(types.get(self.type, ()))

        def run(b: list[str]) -> bool:
            for name in members:
                b[slot] = name
                if then(b):
                    return True
            return False

        return run


Step = Match | Check | Compare | Test | Each
Change = tuple[str, Args]
"""A fact: (predicate, arguments)."""
Idle = tuple[tuple[tuple[tuple[int, int], ...], ...], ...]
"""For every effect, the precondition's literals that may equal it, as pairs of slots that must hold the same object."""
Apply = Callable[[Args], tuple[list[Change], list[Change]]]
"""Arguments of an action -> (facts to make false, facts to make true). The call itself changes no fact."""
LinkableEffect = tuple[Effect, tuple[int, ...], tuple[tuple[Step, ...], ...]]
"""A compiled effect: (effect, slots of its atom, chains that bind its own variables)."""


def link(steps: Iterable[Step], facts: Facts, types: Extensions, then: Run) -> Run:
    """Builds closures for a chain of steps over one set of facts. They call `then` at every solution."""
    for step in reversed(tuple(steps)):
        then = step.link(facts, types, then)
    return then


def unless_idle(idle: Idle | None, then: Run) -> Run:
    """Wraps `then` to skip bindings for which the precondition already contains every effect."""
    if idle is None:
        return then
    if len(idle) == 1 and len(idle[0]) == 1 and len(idle[0][0]) == 1:
        ((((left, right),),),) = idle
        return lambda b: b[left] != b[right] and then(b)
    return lambda b: not all(any(all(b[i] == b[j] for i, j in pairs) for pairs in ways) for ways in idle) and then(b)


def link_effects(
    effects: Iterable[LinkableEffect], blank: list[str], num_parameters: int, facts: Facts, types: Extensions
) -> Apply:
    """Builds the closures of an action's effects over one player's facts.

    Args:
        effects: compiled effects.
        blank: bindings before the arguments are bound; the slots of the parameters come first.
        num_parameters: number of the action's parameters.
        facts: the player's facts.
        types: types of the game's objects.
    """
    linked = []
    removed: list[Change] = []
    added: list[Change] = []
    for effect, slots, chains in effects:
        collect = _collector(added if effect.adds else removed, effect.atom.predicate, slots)
        linked += [link(steps, facts, types, collect) for steps in chains]

    def apply(args: Args) -> tuple[list[Change], list[Change]]:
        removed.clear()
        added.clear()
        b = blank.copy()
        b[:num_parameters] = args
        for run in linked:
            run(b)
        return removed, added

    return apply


def _collector(into: list[Change], predicate: str, slots: tuple[int, ...]) -> Callable[[list[str]], bool]:
    def collect(b: list[str]) -> bool:
        into.append((predicate, tuple([b[slot] for slot in slots])))
        return False

    return collect
