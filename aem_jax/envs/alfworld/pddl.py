"""Parser for the part of PDDL that ALFWorld's files use. Conditions are stored as small trees.

Names are lowercased and comments are dropped, as in the planner of the stock engine. An undeclared type is an empty
type, not an error. The shipped domain contains `(?l - location, ?r - receptacle)`. Its first type is parsed as
`location,`, so only held objects can be examined there.
Derived predicates, numeric conditions and durative actions are not supported; a ValueError names them. `increase` is
parsed and ignored, because costs guide planners and do not change the state.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

ROOT_TYPE = "object"
Variables = tuple[tuple[str, str], ...]
"""(name with its question mark, type) pairs."""


@dataclass(frozen=True)
class Atom:
    """`(predicate args…)`. An argument that starts with `?` is a variable; any other argument names an object."""

    predicate: str
    args: tuple[str, ...]


@dataclass(frozen=True)
class Not:
    """Negation. After parsing, its operand is always an atom."""

    atom: Atom


@dataclass(frozen=True)
class And:
    """Conjunction; empty means true."""

    parts: tuple["Formula", ...]


@dataclass(frozen=True)
class Or:
    """Disjunction; empty means false."""

    parts: tuple["Formula", ...]


@dataclass(frozen=True)
class Exists:
    """Some binding of `variables` makes `part` true."""

    variables: Variables
    part: "Formula"


@dataclass(frozen=True)
class Forall:
    """Every binding of `variables` makes `part` true."""

    variables: Variables
    part: "Formula"


Formula = Atom | Not | And | Or | Exists | Forall
TRUE = And(())


@dataclass(frozen=True)
class Effect:
    """Sets an atom true (`adds`) or false, for each binding of `variables` that meets `condition` before the action."""

    variables: Variables
    condition: Formula
    adds: bool
    atom: Atom


@dataclass(frozen=True)
class Action:
    """An action schema."""

    name: str
    parameters: Variables
    precondition: Formula
    effects: tuple[Effect, ...]


@dataclass(frozen=True, eq=False)
class Domain:
    """A parsed domain.

    Attributes:
        types: type -> parent, in the order of declaration; the root's parent is "".
        constants: object -> type.
        actions: action schemas, in the order of the file.
        fluents: predicates that at least one effect changes.
    """

    types: dict[str, str]
    constants: dict[str, str]
    actions: tuple[Action, ...]
    fluents: frozenset[str]

    def ancestors(self, type_name: str) -> Iterator[str]:
        """Yields the type itself, then its ancestors up to the root."""
        while type_name:
            yield type_name
            type_name = self.types.get(type_name, "")


@dataclass(frozen=True, eq=False)
class Problem:
    """A parsed problem: objects with their types, facts by predicate, and the goal."""

    objects: dict[str, str]
    facts: dict[str, set[tuple[str, ...]]]
    goal: Formula


@lru_cache(maxsize=16)
def parse_domain(text: str) -> Domain:
    """Parses a PDDL domain. Cached by text, because all games of a data release share one domain.

    Raises:
        ValueError: the text is malformed or uses an unsupported construct; the message names it.
    """
    types, constants, actions = {ROOT_TYPE: ""}, {}, []
    for section in _definition(text, "domain"):
        head = section[0]
        if head == ":types":
            types |= {name: parent for name, parent in _typed(section[1:]) if name != ROOT_TYPE}
        elif head == ":constants":
            constants = dict(_typed(section[1:]))
        elif head == ":action":
            actions.append(_action(section))
        elif head not in ("domain", ":requirements", ":predicates", ":functions"):
            raise ValueError(f"expected a PDDL domain of types, predicates and actions, got the section {head!r}")
    fluents = frozenset(effect.atom.predicate for action in actions for effect in action.effects)
    return Domain(types, constants, tuple(actions), fluents)


def parse_problem(text: str, domain: Domain) -> Problem:
    """Parses a PDDL problem of `domain`.

    Raises:
        ValueError: the text is malformed, lacks a section, or uses an unsupported construct; the message names it.
    """
    objects, facts, goal = dict(domain.constants), {}, None
    for section in _definition(text, "problem"):
        head = section[0]
        if head == ":objects":
            objects |= dict(_typed(section[1:]))
        elif head == ":init":
            for predicate, *args in section[1:]:
                if predicate == "=":  # function values (distances, costs) are not facts
                    continue
                facts.setdefault(predicate, set()).add(tuple(args))
        elif head == ":goal":
            goal = formula(section[1])
        elif head not in ("problem", ":domain", ":requirements", ":metric"):
            raise ValueError(f"expected a PDDL problem of objects, init and goal, got the section {head!r}")
    if goal is None:
        raise ValueError("expected a PDDL problem with a (:goal …), got none")
    for args in (args for rows in facts.values() for args in rows):
        for name in args:
            if name not in objects:
                raise ValueError(f"expected facts about declared objects, got {name!r} in :init; add it to :objects")
    return Problem(objects, facts, goal)


def formula(tree: list, negated: bool = False) -> Formula:
    """Builds a condition from a nested list, with negations pushed down to the atoms.

    Raises:
        ValueError: a tag is not a condition.
    """
    if not tree:
        return TRUE
    tag, *rest = tree
    if tag == "not":
        return formula(rest[0], not negated)
    if tag == "imply":
        return formula(["or", ["not", rest[0]], rest[1]], negated)
    if tag in ("and", "or"):
        parts = tuple(formula(part, negated) for part in rest)
        if len(parts) == 1:
            return parts[0]
        return And(parts) if (tag == "and") != negated else Or(parts)
    if tag in ("exists", "forall"):
        part = formula(rest[1], negated)
        return (Exists if (tag == "exists") != negated else Forall)(_typed(rest[0]), part)
    if tag in ("when", ">", "<", ">=", "<=", "preference") or not all(isinstance(arg, str) for arg in rest):
        raise ValueError(f"expected a condition of and/or/not/imply/exists/forall over atoms, got {tag!r}")
    atom = Atom(tag, tuple(rest))
    return Not(atom) if negated else atom


def _action(section: list) -> Action:
    name, fields = section[1], dict(zip(section[2::2], section[3::2], strict=True))
    for key in fields:
        if key not in (":parameters", ":precondition", ":effect"):
            raise ValueError(f"expected an action of parameters, precondition and effect, got {key!r} in {name!r}")
    effects = tuple(_effects(fields.get(":effect", []), (), TRUE))
    precondition = formula(fields.get(":precondition", []))
    return Action(name, _typed(fields.get(":parameters", [])), precondition, effects)


def _effects(tree: list, variables: Variables, condition: Formula) -> Iterator[Effect]:
    if not tree:
        return
    tag, *rest = tree
    if tag == "and":
        for part in rest:
            yield from _effects(part, variables, condition)
    elif tag == "forall":
        yield from _effects(rest[1], variables + _typed(rest[0]), condition)
    elif tag == "when":
        yield from _effects(rest[1], variables, And((condition, formula(rest[0]))))
    elif tag == "not":
        yield Effect(variables, condition, False, Atom(rest[0][0], tuple(rest[0][1:])))
    elif tag in ("assign", "decrease", "scale-up", "scale-down", "oneof", "probabilistic"):
        raise ValueError(f"expected an effect of and/not/when/forall over atoms, got {tag!r}")
    elif tag != "increase":
        yield Effect(variables, condition, True, Atom(tag, tuple(rest)))


def _typed(tokens: list) -> Variables:
    """`a b - t c` -> ((a, t), (b, t), (c, object))."""
    result, waiting, items = [], [], iter(tokens)
    for item in items:
        if not isinstance(item, str):
            raise ValueError(f"expected a list of names with plain types, got the nested {' '.join(map(str, item))!r}")
        if item != "-":
            waiting.append(item)
            continue
        type_name = next(items, None)
        if not isinstance(type_name, str):
            raise ValueError("expected one type after '-', got 'either' or nothing; union types are not supported")
        result += [(name, type_name) for name in waiting]
        waiting = []
    return tuple(result + [(name, ROOT_TYPE) for name in waiting])


def _definition(text: str, kind: str) -> list:
    """Returns the sections of `(define (kind name) …)`."""
    root = current = []
    stack = []
    for token in re.findall(r"[()]|[^\s()?][^\s()?]*|\?[^\s()?]*", re.sub(r";[^\n]*", "", text).lower()):
        if token == "(":
            stack.append(current)
            current = []
        elif token == ")":
            if not stack:
                raise ValueError(f"expected balanced parentheses in the PDDL {kind}, got one ')' too many")
            stack[-1].append(current)
            current = stack.pop()
        else:
            current.append(token)
    if stack or len(root) != 1 or root[0][:1] != ["define"] or not all(isinstance(s, list) and s for s in root[0][1:]):
        raise ValueError(f"expected one balanced (define ({kind} …) …) in the PDDL {kind}, got {text[:60]!r}…")
    return root[0][1:]
