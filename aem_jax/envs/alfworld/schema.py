"""Compiled action schemas: the search for their parameters, their effects, and a test for actions without effect.

As in the planner of the stock engine, an applicable action is dropped if its own precondition already contains all its
effects. An example is to go to the current place. Only the literals of the precondition count, not the current facts:
to clean a clean object is an action.
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
"""For every effect, the precondition's literals that may equal it, as pairs of slots that must hold the same object."""
Apply = Callable[[Args], tuple[list[Change], list[Change]]]
"""Arguments of an action -> (facts to make false, facts to make true). The call itself changes no fact."""


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
        effects: (effect, slots of its atom, chains that bind its own variables).
    """

    action: Action
    parameters: tuple[Placeholder, ...]
    blank: list[str]
    chains: tuple[tuple[tuple[Step, ...], Idle | None], ...]
    reads: frozenset[str]
    effects: tuple[tuple[Effect, tuple[int, ...], tuple[tuple[Step, ...], ...]], ...]

    def link_effects(self, facts: Facts, types: Extensions) -> Apply:
        """Builds the closures of the effects over one player's facts."""
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
    """Wraps `then` to skip bindings for which the precondition already contains every effect."""
    if idle is None:
        return then
    if len(idle) == 1 and len(idle[0]) == 1 and len(idle[0][0]) == 1:
        ((((left, right),),),) = idle
        return lambda b: b[left] != b[right] and then(b)
    return lambda b: not all(any(all(b[i] == b[j] for i, j in pairs) for pairs in ways) for ways in idle) and then(b)


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


def _collector(into: list[Change], predicate: str, slots: tuple[int, ...]) -> Callable[[list[str]], bool]:
    def collect(b: list[str]) -> bool:
        into.append((predicate, tuple([b[slot] for slot in slots])))
        return False

    return collect
