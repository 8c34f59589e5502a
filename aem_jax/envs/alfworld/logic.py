"""Facts with indexes, and conditions compiled to closures over them.

A condition becomes alternatives (it is split at an `or` only where the `or` must bind variables), and each alternative
a chain of steps: match an atom against an index, check a bound one, compare, test a nested condition, or run through a
type. A chain is data (made once per domain); `link` turns it into nested closures over one player's facts. Bindings live
in a flat list, one slot per variable or constant.

The order of a chain is greedy: fewest expected rows first, from which predicates hold only a handful of facts at the
start. The order changes speed, never results.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from operator import itemgetter

from aem_jax.envs.alfworld.pddl import ROOT_TYPE, And, Atom, Exists, Forall, Formula, Not, Or, Variables

Args = tuple[str, ...]
Run = Callable[[list[str]], bool]
"""Runs the rest of a chain on the bindings; True stops the search."""
Extensions = Mapping[str, frozenset[str]]
"""Type -> objects of it, subtypes included."""


class Facts:
    """Sets of argument tuples by predicate, with indexes by bound positions that are built when first asked for.

    Predicates outside `fluents` are looked up in `base`, which is shared by all players of a game and never written.
    """

    def __init__(self, rows: Mapping[str, Iterable[Args]], base: "Facts | None" = None):
        self._rows = {predicate: set(args) for predicate, args in rows.items()}
        self._indexes: dict[str, dict[tuple[int, ...], dict]] = {}
        self._base = base

    def rows(self, predicate: str) -> set[Args]:
        """All facts of a predicate (a live set)."""
        if self._base is not None and predicate not in self._rows:
            return self._base.rows(predicate)
        return self._rows.setdefault(predicate, set())

    def index(self, predicate: str, positions: tuple[int, ...]) -> dict:
        """Facts by their arguments at `positions`: a name for one position, else a tuple of names (live)."""
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
    """Binds the free arguments of an atom to those of every fact that agrees with the bound ones."""

    predicate: str
    bound: tuple[tuple[int, int], ...]
    """(position, slot) pairs that are known."""
    free: tuple[tuple[int, int, str], ...]
    """(position, slot, type) triples to bind."""

    def link(self, facts: Facts, types: Extensions, then: Run) -> Run:
        free = [(at, slot, None if kind == ROOT_TYPE else types.get(kind, frozenset())) for at, slot, kind in self.free]
        if self.bound:
            index = facts.index(self.predicate, tuple(at for at, _ in self.bound))
            key = itemgetter(*(slot for _, slot in self.bound))
            select = lambda b: index.get(key(b), ())  # noqa: E731
        else:
            rows = facts.rows(self.predicate)
            select = lambda b: rows  # noqa: E731

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
    """Goes on if a fully bound atom is (not) a fact."""

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
    """Goes on if two bindings are (not) the same object."""

    slots: tuple[int, int]
    wanted: bool

    def link(self, facts: Facts, types: Extensions, then: Run) -> Run:
        (left, right), wanted = self.slots, self.wanted
        return lambda b: (b[left] == b[right]) is wanted and then(b)


@dataclass(frozen=True)
class Test:
    """Goes on if one (or, unless `wanted`, none) of the alternatives has a solution."""

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


def link(steps: Iterable[Step], facts: Facts, types: Extensions, then: Run) -> Run:
    """Closes a chain of steps over one set of facts; `then` is called at every solution."""
    for step in reversed(tuple(steps)):
        then = step.link(facts, types, then)
    return then


@dataclass(eq=False)
class Slots:
    """Where variables and constants live in the list of bindings, and every variable's type."""

    names: dict[str, int] = field(default_factory=dict)
    blank: list[str] = field(default_factory=list)
    """Bindings before any variable is bound: constants in their places."""
    kinds: dict[int, str] = field(default_factory=dict)
    constants: dict[str, int] = field(default_factory=dict)

    def __getitem__(self, name: str) -> int:
        if name in self.names:
            return self.names[name]
        if name.startswith("?"):
            raise ValueError(f"expected a variable declared by parameters or a quantifier, got {name!r}")
        if name not in self.constants:
            self.constants[name] = self._new(name)
        return self.constants[name]

    def _new(self, value: str) -> int:
        self.blank.append(value)
        return len(self.blank) - 1

    def inside(self, variables: Variables) -> "Slots":
        """The scope of a quantifier: its variables hide outer ones of the same name; the list is shared."""
        scope = Slots(dict(self.names), self.blank, self.kinds, self.constants)
        for name, kind in variables:
            scope.names[name] = self._new("")
            self.kinds[scope.names[name]] = kind
        return scope


Part = tuple[Formula, Slots]


def negate(formula: Formula) -> Formula:
    """The negation, pushed down to the atoms."""
    match formula:
        case Atom():
            return Not(formula)
        case Not(atom):
            return atom
        case And(parts):
            return Or(tuple(map(negate, parts)))
        case Or(parts):
            return And(tuple(map(negate, parts)))
        case Exists(variables, part):
            return Forall(variables, negate(part))
        case Forall(variables, part):
            return Exists(variables, negate(part))


def alternatives(formula: Formula, slots: Slots, bound: frozenset[int]) -> list[list[Part]]:
    """Conjunctions whose union is the formula; none keeps an `or` that would have to bind a variable."""
    done, todo = [], [[(formula, slots)]]
    while todo:
        parts = _flatten(todo.pop(0))
        known = bound | {i for part, scope in parts if _binds(part) for i in _slots_of(part, scope)}
        for at, (part, scope) in enumerate(parts):
            if isinstance(part, Or) and not _slots_of(part, scope) <= known:
                todo += [[*parts[:at], (choice, scope), *parts[at + 1 :]] for choice in part.parts]
                break
        else:
            done.append(parts)
    return done


def chain(parts: list[Part], kinds: Mapping[int, str], wanted: Iterable[int], bound: Iterable[int], small: frozenset[str]):
    """Orders a conjunction into steps.

    Args:
        parts: a conjunction from `alternatives`.
        kinds: the type of every variable's slot.
        wanted: slots that the chain must bind, mentioned in `parts` or not.
        bound: slots already bound (constants aside).
        small: predicates with only a handful of facts.

    Returns:
        tuple of steps.
    """
    steps, bound, rest = [], set(bound), list(parts)
    while True:
        ready = [p for p in rest if not _binds(p[0]) and _slots_of(*p) <= bound]
        rest = [p for p in rest if p not in ready]
        steps += [_test(*p, frozenset(bound), small) for p in ready]
        atoms = [p for p in rest if _binds(p[0])]
        if atoms:
            best = min(atoms, key=lambda p: _expected(*p, bound, small))
            rest.remove(best)
            steps += _match(*best, bound)
            continue
        missing = sorted((set(wanted).union(*(_slots_of(*p) for p in rest))) - bound)
        if not missing:
            return tuple(steps)
        steps.append(Each(missing[0], kinds[missing[0]]))
        bound.add(missing[0])


def solver(formula: Formula, slots: Slots, bound: Iterable[int], wanted: Iterable[int], small: frozenset[str]):
    """All alternatives of a formula as chains that bind `wanted`: a tuple of step tuples."""
    known = frozenset(bound)
    return tuple(chain(parts, slots.kinds, wanted, known, small) for parts in alternatives(formula, slots, known))


def _binds(formula: Formula) -> bool:
    return isinstance(formula, Atom) and formula.predicate != "="


def _flatten(parts: list[Part]) -> list[Part]:
    """Opens conjunctions and existential quantifiers (their variables become slots of the chain)."""
    flat = []
    for part, scope in parts:
        match part:
            case And(inner):
                flat += _flatten([(p, scope) for p in inner])
            case Exists(variables, inner):
                flat += _flatten([(inner, scope.inside(variables))])
            case Or((inner,)):
                flat += _flatten([(inner, scope)])
            case _:
                flat.append((part, scope))
    return flat


def _slots_of(formula: Formula, scope: Slots) -> set[int]:
    """Slots of the free variables."""
    match formula:
        case Atom(_, args):
            return {i for i in map(scope.__getitem__, args) if i in scope.kinds}
        case Not(atom):
            return _slots_of(atom, scope)
        case And(parts) | Or(parts):
            return set().union(*(_slots_of(part, scope) for part in parts))
        case Exists(variables, part) | Forall(variables, part):
            hidden = {name: -1 for name, _ in variables}
            return _slots_of(part, Slots(scope.names | hidden, scope.blank, scope.kinds, scope.constants))


def _expected(atom: Atom, scope: Slots, bound: set[int], small: frozenset[str]) -> float:
    """A guess at how many facts agree with the bound arguments; -1 for a plain check."""
    args = [scope[name] for name in atom.args]
    free = {i for i in args if i in scope.kinds and i not in bound}
    if not free:
        return -1.0
    return (1.0 if atom.predicate in small else 40.0) ** (len(free) / len(args))


def _match(atom: Atom, scope: Slots, bound: set[int]) -> list[Step]:
    args = [scope[name] for name in atom.args]
    known = tuple((at, i) for at, i in enumerate(args) if i in bound or i not in scope.kinds)
    if len(known) == len(args):
        return [Check(atom.predicate, tuple(args), True)]
    free = {i: (at, i, scope.kinds[i]) for at, i in reversed(list(enumerate(args))) if (at, i) not in known}
    bound.update(free)
    steps: list[Step] = [Match(atom.predicate, known, tuple(free.values()))]
    if len(free) + len(known) < len(args):  # one variable twice: bound at its first place, compared by the whole atom
        steps.append(Check(atom.predicate, tuple(args), True))
    return steps


def _test(formula: Formula, scope: Slots, bound: frozenset[int], small: frozenset[str]) -> Step:
    match formula:
        case Atom("=", (left, right)):
            return Compare((scope[left], scope[right]), True)
        case Not(Atom("=", (left, right))):
            return Compare((scope[left], scope[right]), False)
        case Not(Atom(predicate, args)):
            return Check(predicate, tuple(scope[name] for name in args), False)
        case Forall():
            return Test(solver(negate(formula), scope, bound, (), small), False)
        case Or(parts):
            options = [solver(part, scope, bound, (), small) for part in parts]
            return Test(tuple(steps for option in options for steps in option), True)
    raise AssertionError(formula)  # `_flatten` leaves no other kind


def predicates(formula: Formula) -> frozenset[str]:
    """Names of the predicates that a condition reads."""
    match formula:
        case Atom(predicate, _) | Not(Atom(predicate, _)):
            return frozenset((predicate,))
        case And(parts) | Or(parts):
            return frozenset().union(*map(predicates, parts))
        case Exists(_, part) | Forall(_, part):
            return predicates(part)
