"""Action schemas and conditions, compiled to chains of search steps.

A condition is split into alternatives, and each alternative becomes a chain. The split happens at an `or` only if the
`or` must bind variables. The order of a chain is greedy: the step with the fewest expected rows comes first. The
estimate depends on which predicates have only a handful of facts at the start. The order changes the speed, never the
results.

As in the planner of the stock engine, an applicable action is dropped if its own precondition already contains all its
effects. An example is to go to the current place. Only the literals of the precondition count, not the current facts:
to clean a clean object is an action.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache

from aem_jax.envs.alfworld.facts import Check, Compare, Each, Idle, LinkableEffect, Match, Step, Test
from aem_jax.envs.alfworld.pddl import (
    TRUE,
    Action,
    And,
    Atom,
    Effect,
    Exists,
    Forall,
    Formula,
    Not,
    Or,
    Variables,
    parse_domain,
)


@dataclass(eq=False)
class Slots:
    """Positions of variables and constants in the list of bindings, and the type of every variable."""

    names: dict[str, int] = field(default_factory=dict)
    blank: list[str] = field(default_factory=list)
    """Bindings before any variable is bound. Only the slots of constants are filled."""
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
        """Returns the scope of a quantifier. Its variables hide outer ones of the same name. The list is shared."""
        scope = Slots(dict(self.names), self.blank, self.kinds, self.constants)
        for name, kind in variables:
            scope.names[name] = self._new("")
            self.kinds[scope.names[name]] = kind
        return scope


Part = tuple[Formula, Slots]


def negate(formula: Formula) -> Formula:
    """Returns the negation, pushed down to the atoms."""
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
    """Returns conjunctions whose union is the formula. None of them contains an `or` that must bind a variable."""
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


def chain(
    parts: list[Part], kinds: Mapping[int, str], wanted: Iterable[int], bound: Iterable[int], small: frozenset[str]
) -> tuple[Step, ...]:
    """Orders a conjunction into steps.

    Args:
        parts: a conjunction from `alternatives`.
        kinds: the type of every variable's slot.
        wanted: slots that the chain must bind, even if they are not in `parts`.
        bound: slots of variables that are already bound.
        small: predicates with only a handful of facts.
    """
    steps, bound, rest = [], set(bound), list(parts)
    while True:
        ready = [p for p in rest if not _binds(p[0]) and _slots_of(*p) <= bound]
        rest = [p for p in rest if p not in ready]
        steps += [_test(*p, frozenset(bound), small) for p in ready]
        atoms = [(part, scope) for part, scope in rest if isinstance(part, Atom) and _binds(part)]
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
    """Compiles all alternatives of a formula to chains that bind `wanted`. Returns a tuple of step tuples."""
    known = frozenset(bound)
    return tuple(chain(parts, slots.kinds, wanted, known, small) for parts in alternatives(formula, slots, known))


def _binds(formula: Formula) -> bool:
    return isinstance(formula, Atom) and formula.predicate != "="


def _flatten(parts: list[Part]) -> list[Part]:
    """Flattens conjunctions and existential quantifiers, whose variables become slots of the chain."""
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
    """Returns the slots of the free variables."""
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
    """Estimates the number of facts that match the bound arguments; -1 if all arguments are bound."""
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
    if len(free) + len(known) < len(args):  # a variable occurs twice: bind it at its first place, then check the atom
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
    """Returns the names of the predicates that a condition reads."""
    match formula:
        case Atom(predicate, _) | Not(Atom(predicate, _)):
            return frozenset((predicate,))
        case And(parts) | Or(parts):
            return frozenset().union(*map(predicates, parts))
        case Exists(_, part) | Forall(_, part):
            return predicates(part)


@dataclass(frozen=True, eq=False)
class Schema:
    """A compiled action schema.

    Attributes:
        action: the parsed action.
        parameters: (name without question mark, type), as in the grammar's queries; their slots come first.
        blank: bindings before a search, with the constants filled in.
        chains: for every alternative of the precondition, its steps and the test for bindings without effect (None: no
            binding is skipped).
        reads: predicates of the precondition.
        effects: the compiled effects.
    """

    action: Action
    parameters: Variables
    blank: list[str]
    chains: tuple[tuple[tuple[Step, ...], Idle | None], ...]
    reads: frozenset[str]
    effects: tuple[LinkableEffect, ...]


@lru_cache(maxsize=64)
def compile_actions(domain_text: str, small: frozenset[str]) -> tuple[Schema, ...]:
    """Compiles the actions of a domain. Cached, because all games of a data release share one domain.

    Args:
        domain_text: the PDDL domain.
        small: predicates with a handful of facts at the start; the search begins with them.
    """
    return tuple(_compile(action, small) for action in parse_domain(domain_text).actions)


def _compile(action: Action, small: frozenset[str]) -> Schema:
    outer = Slots()
    scope = outer.inside(action.parameters)
    wanted = range(len(action.parameters))
    chains = []
    for parts in alternatives(action.precondition, scope, frozenset()):
        steps = chain(parts, scope.kinds, wanted, (), small)
        chains.append((steps, _idle(action.effects, parts, scope)))
    effects = []
    for effect in action.effects:
        inner = scope.inside(effect.variables)
        slots = tuple(inner[name] for name in effect.atom.args)
        own = [inner.names[name] for name, _ in effect.variables]
        bound = frozenset(wanted)
        effects.append((effect, slots, solver(effect.condition, inner, bound, own, small)))
    parameters = tuple((name.removeprefix("?"), kind) for name, kind in action.parameters)
    return Schema(action, parameters, scope.blank, tuple(chains), predicates(action.precondition), tuple(effects))


def _idle(effects: tuple[Effect, ...], parts: list[Part], scope: Slots) -> Idle | None:
    stands = {(not isinstance(p, Not), _key(p, inner)) for p, inner in parts if isinstance(p, Atom | Not)}
    added = {_key(effect.atom, scope) for effect in effects if effect.adds and effect.condition == TRUE}
    ways = []
    for effect in effects:
        if effect.variables or effect.condition != TRUE:
            return None
        predicate, slots = _key(effect.atom, scope)
        same = [known for positive, known in stands if positive is effect.adds]
        same += [] if effect.adds else added  # an action does not delete a fact that it adds
        pairs = [zip(slots, other, strict=True) for p, other in same if p == predicate]
        ways.append(tuple({tuple(sorted({(min(i, j), max(i, j)) for i, j in pair if i != j})) for pair in pairs}))
    return tuple(sorted(set(ways))) if all(ways) else None


def _key(literal: Atom | Not, scope: Slots) -> tuple[str, tuple[int, ...]]:
    atom = literal.atom if isinstance(literal, Not) else literal
    return atom.predicate, tuple(scope[name] for name in atom.args)
