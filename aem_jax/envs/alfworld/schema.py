"""Action schemas compiled: how their parameters are found, what they change, and when they would change nothing.

An applicable action all of whose effects already stand in its own precondition (as going to where one is) is no action,
as in the planner behind the stock engine. Only the precondition's literals count, not the current facts: cleaning what
is already clean is an action.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from aem_jax.envs.alfworld.facts import Args, Extensions, Facts, Run, Step, link
from aem_jax.envs.alfworld.logic import Part, Slots, alternatives, chain, predicates, solver
from aem_jax.envs.alfworld.pddl import TRUE, Action, Atom, Effect, Not, parse_domain
from aem_jax.envs.alfworld.query import Placeholder

Change = tuple[str, Args]
"""A fact: (predicate, arguments)."""
Idle = tuple[tuple[tuple[tuple[int, int], ...], ...], ...]
"""For every effect, the ways in which it stands in the precondition: pairs of slots that must hold the same object."""
Apply = Callable[[Args], tuple[list[Change], list[Change]]]
"""Arguments of an action -> (facts it makes false, facts it makes true), before either is done."""


@dataclass(frozen=True, eq=False)
class Schema:
    """A compiled action schema.

    Attributes:
        action: what it was compiled from.
        parameters: (name without question mark, type), as the grammar's queries call them; their slots come first.
        blank: bindings before a search: constants in place.
        chains: for every alternative of the precondition, its steps and when they find nothing to do (None: never).
        reads: predicates of the precondition.
        effects: (effect, slots of its atom, chains that bind its own variables; none if it is unconditional).
    """

    action: Action
    parameters: tuple[Placeholder, ...]
    blank: list[str]
    chains: tuple[tuple[tuple[Step, ...], Idle | None], ...]
    reads: frozenset[str]
    effects: tuple[tuple[Effect, tuple[int, ...], tuple[tuple[Step, ...], ...]], ...]

    def link_effects(self, facts: Facts, types: Extensions) -> Apply:
        """Closes the effects over one player's facts."""
        blank, count = self.blank, len(self.parameters)
        linked = []
        removed: list[Change] = []
        added: list[Change] = []
        for effect, slots, chains in self.effects:
            collect = _collector(added if effect.adds else removed, effect.atom.predicate, slots)
            linked += [link(steps, facts, types, collect) for steps in chains]

        def apply(args: Args) -> tuple[list[Change], list[Change]]:
            removed.clear()
            added.clear()
            b = blank.copy()
            b[:count] = args
            for run in linked:
                run(b)
            return removed, added

        return apply


def unless_idle(idle: Idle | None, then: Run) -> Run:
    """`then`, but for bindings with which every effect already stands in the precondition."""
    if idle is None:
        return then
    if len(idle) == 1 and len(idle[0]) == 1 and len(idle[0][0]) == 1:
        ((((left, right),),),) = idle
        return lambda b: b[left] != b[right] and then(b)
    return lambda b: not all(any(all(b[i] == b[j] for i, j in pairs) for pairs in ways) for ways in idle) and then(b)


@lru_cache(maxsize=64)
def compile_actions(domain_text: str, small: frozenset[str]) -> tuple[Schema, ...]:
    """Compiles the actions of a domain, which all games of a data release share.

    Args:
        domain_text: the PDDL domain.
        small: predicates with a handful of facts at the start (they lead the search).
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
        same += [] if effect.adds else added  # what an action adds, it does not delete
        pairs = [zip(slots, other, strict=True) for p, other in same if p == predicate]
        ways.append(tuple({tuple(sorted({(min(i, j), max(i, j)) for i, j in pair if i != j})) for pair in pairs}))
    return tuple(sorted(set(ways))) if all(ways) else None


def _key(literal: Atom | Not, scope: Slots) -> tuple[str, tuple[int, ...]]:
    atom = literal.atom if isinstance(literal, Not) else literal
    return atom.predicate, tuple(scope[name] for name in atom.args)


def _collector(into: list[Change], predicate: str, slots: tuple[int, ...]) -> Callable[[list[str]], bool]:
    def collect(b: list[str]) -> bool:
        into.append((predicate, tuple([b[slot] for slot in slots])))
        return False

    return collect
