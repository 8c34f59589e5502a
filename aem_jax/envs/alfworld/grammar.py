"""TextWorld's TWL2 grammar: the command templates and the feedback inside a game file.

A document is a sequence of blocks `grammar :: (JSON in triple quotes);` and of
`action name { template :: "…"; feedback :: "…"; grammar :: … }`. The JSON maps a symbol to rules
`{"condition": query, "rhs": text}`; the first rule whose condition has a match is used. A query is a conjunction of
facts with variables, `p(a:t, b:u) & q(a:t)`.
In a text, `#symbol#` derives a symbol and `{expression}` evaluates an expression over entities. `{x | query}` repeats x
for every match of the query. `[{x | query}]` joins the repetitions with the grammar's own list symbols.

Five rules follow the stock engine, because they show in its output. Leading white space of a text is dropped. A text
ends silently at the first place that cannot be parsed. A later definition of a symbol replaces an earlier one. The
matches of a query are sorted by the types of the facts' arguments, then by their ids. Different variables of a query
are bound to different objects.
"""

import ast
import json
import re
from collections.abc import Callable, Iterator, Mapping
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


@dataclass(frozen=True, slots=True)
class Context:
    """A world and the variables that are bound so far."""

    grammar: "Grammar"
    world: World
    bindings: Mapping[Placeholder, str]

    def entity(self, name: str) -> Entity:
        """Returns the object that a variable is bound to. The latest binding of a name counts."""
        ids = [id_ for (variable, _), id_ in self.bindings.items() if variable == name]
        if not ids:
            raise ValueError(f"expected one of the bound variables {[n for n, _ in self.bindings]}, got {name!r}")
        return self.world.entities[ids[-1]]

    def matches(self, query: Query) -> Iterator["Context"]:
        """Yields a context for every match of the query, in the order of the facts."""
        for bindings in solve(query, self.world, self.bindings):
            yield Context(self.grammar, self.world, bindings)


Emit = Callable[[Context], str]


@dataclass(frozen=True)
class Rule:
    """A rule of a symbol. It applies if `condition` has a match; an empty condition always has."""

    condition: Query
    parts: tuple[Emit, ...]


@dataclass(frozen=True)
class Template:
    """Command and feedback of an action, both as texts of the grammar."""

    command: str
    feedback: str


@dataclass(frozen=True, eq=False)
class Grammar:
    """A parsed document: rules by symbol, templates by action name in lower case."""

    rules: Mapping[str, tuple[Rule, ...]]
    actions: Mapping[str, Template]

    def derive(self, text: str, world: World, bindings: Mapping[Placeholder, str]) -> str:
        """Expands a text.

        Raises:
            ValueError: a symbol or a variable is unknown, or no rule of a symbol applies.
        """
        context = Context(self, world, bindings)
        return "".join([emit(context) for emit in parse_text(text)])

    def derive_symbol(self, symbol: str, context: Context) -> str:
        """Expands a symbol with its first rule that applies."""
        if symbol not in self.rules:
            raise ValueError(f"expected a symbol that the grammar defines, got '#{symbol}#'; add a rule for it")
        for rule in self.rules[symbol]:
            if not rule.condition or next(context.matches(rule.condition), None) is not None:
                return "".join([emit(context) for emit in rule.parts])
        raise ValueError(f"expected some rule of '#{symbol}#' to apply, got none; add one without a condition")


_TOKEN = re.compile(
    r'\s+|#[^\n]*|"""(?P<block>.*?)"""|"(?P<text>[^"]*)"|(?P<word>[\w/-]+)|(?P<mark>::|[{};])', re.DOTALL
)


def parse_grammar(document: str) -> Grammar:
    """Parses a TWL2 document.

    Raises:
        ValueError: the text is malformed, a block is not JSON, or a field is unknown; the message names it.
    """
    tokens, position = [], 0
    while position < len(document):
        match = _TOKEN.match(document, position)
        if match is None:
            raise ValueError(f"expected a TWL2 grammar, got {document[position : position + 40]!r}")
        position = match.end()
        if match.lastgroup is not None:
            tokens.append((match.lastgroup, match[match.lastgroup]))
    stream, rules, actions = iter([*tokens, ("end", "")]), {}, {}
    while (token := next(stream)) != ("end", ""):
        if token == ("word", "grammar"):
            rules |= _block(_value(stream, "block"))
        elif token == ("word", "action"):
            name, fields = _expect(stream, "word"), {}
            _expect(stream, "mark", "{")
            while (field := next(stream)) != ("mark", "}"):
                if field == ("word", "grammar"):
                    rules |= _block(_value(stream, "block"))
                elif field in (("word", "template"), ("word", "feedback")):
                    fields[field[1]] = _value(stream, "text")
                else:
                    raise ValueError(f"expected template, feedback or grammar in action {name!r}, got {field[1]!r}")
            actions[name.lower()] = Template(fields.get("template", ""), fields.get("feedback", ""))
        else:
            raise ValueError(f"expected 'grammar' or 'action' in a TWL2 grammar, got {token[1]!r}")
    return Grammar(rules, actions)


def _expect(stream: Iterator[tuple[str, str]], group: str, value: str | None = None) -> str:
    kind, text = next(stream)
    if kind != group or value not in (None, text):
        raise ValueError(f"expected {value or group} in a TWL2 grammar, got {text!r}")
    return text


def _value(stream: Iterator[tuple[str, str]], group: str) -> str:
    _expect(stream, "mark", "::")
    value = _expect(stream, group)
    _expect(stream, "mark", ";")
    return value


@lru_cache(maxsize=512)
def _block(text: str) -> dict[str, tuple[Rule, ...]]:
    """Parses the rules of one block. Cached, because games of a release differ only in the block of the task."""
    lines = [line for line in text.split("\n") if not line.lstrip().startswith("#")]
    try:
        symbols = json.loads("\n".join(lines))
    except json.JSONDecodeError as error:
        raise ValueError(f"expected JSON in a grammar block, got {error} in {text.strip()[:40]!r}") from None
    return {
        symbol: tuple(Rule(parse_query(rule.get("condition", "")), parse_text(rule["rhs"])) for rule in rules)
        for symbol, rules in symbols.items()
    }


_TEXT = re.compile(
    r"""\t*(?:
      \#(?P<symbol>[\w()/!<>\-\s,.]+)\#
    | (?P<list>\[)?\{(?:\#(?P<repeated>[\w()/!<>\-\s,.]+)\#|(?P<expression>(?!\#)[^|\[\]{}\n<>]+))
      (?:\s*\|\s*(?P<query>[^;|{}\n\[\]\#]+))?\}(?(list)\])
    | "(?P<quoted>[^;|"<>\[\]\#{}]*)"
    | (?P<plain>[^;|"<>\[\]\#{}]+)
    )""",
    re.VERBOSE,
)


@lru_cache(maxsize=8192)
def parse_text(text: str) -> tuple[Emit, ...]:
    """Compiles a text to a tuple of functions, each of which writes one piece of it."""
    pieces, position = [], _opening(text)
    while match := _TEXT.match(text, position):
        position = match.end()
        if match["symbol"]:
            pieces.append(_symbol(match["symbol"]))
        elif match["repeated"] or match["expression"]:
            item = _symbol(match["repeated"]) if match["repeated"] else _expression(match["expression"])
            pieces.append(_expansion(item, parse_query(match["query"] or ""), match["list"] is not None))
        else:
            pieces.append(_plain(match["plain"] or match["quoted"] or ""))
    return tuple(pieces)


def _opening(text: str) -> int:
    """Returns the position where a text begins, after white space and `//` comments."""
    match = re.match(r"(?:\s+|//[^\n]*)*", text)
    return match.end() if match else 0


def _plain(text: str) -> Emit:
    return lambda context: text


def _symbol(name: str) -> Emit:
    return lambda context: context.grammar.derive_symbol(name, context)


def _expression(source: str) -> Emit:
    evaluate = parse_expression(source)
    return lambda context: str(evaluate(context))


def _expansion(item: Emit, query: Query, is_list: bool) -> Emit:
    def emit(context: Context) -> str:
        texts = [item(match) for match in context.matches(query)] if query else [item(context)]
        if not is_list or len(texts) == 1:
            return "".join(texts)
        derive = context.grammar.derive_symbol
        if not texts:
            return derive("list_empty", context)
        between = derive("list_separator", context) if len(texts) > 2 else ""
        return between.join(texts[:-1]) + derive("list_last_separator", context) + texts[-1]

    return emit


@lru_cache(maxsize=1024)
def parse_expression(source: str) -> Callable[[Context], object]:
    """Compiles an expression over entities: names, attributes, strings, `+`, `and`, `or`, `not`, `… if … else …`.

    Raises:
        ValueError: the expression contains anything else. Expressions come from data files and must not run code.
    """
    try:
        return _evaluator(ast.parse(source.strip(), mode="eval").body)
    except SyntaxError:
        raise ValueError(f"expected an expression like \"o.indefinite + ' ' + o.name\", got {source!r}") from None


def _evaluator(node: ast.expr) -> Callable[[Context], object]:
    match node:
        case ast.Constant(value):
            return lambda context: value
        case ast.Name(name):
            return lambda context: context.entity(name)
        case ast.Attribute(ast.Name(name), attribute) if attribute in Entity.__dataclass_fields__:
            return lambda context: getattr(context.entity(name), attribute)
        case ast.BinOp(left, ast.Add(), right):
            first, second = _evaluator(left), _evaluator(right)
            return lambda context: first(context) + second(context)  # type: ignore[operator]
        case ast.BoolOp(operator, values):
            parts, stop = [_evaluator(value) for value in values], isinstance(operator, ast.Or)
            return lambda context: _first(parts, stop, context)
        case ast.UnaryOp(ast.Not(), operand):
            inner = _evaluator(operand)
            return lambda context: not inner(context)
        case ast.IfExp(test, body, orelse):
            condition, yes, no = _evaluator(test), _evaluator(body), _evaluator(orelse)
            return lambda context: yes(context) if condition(context) else no(context)
    raise ValueError(f"expected only names, attributes, strings, +, and, or, not, if, got {ast.unparse(node)!r}")


def _first(parts: list[Callable[[Context], object]], stop: bool, context: Context) -> object:
    """Evaluates Python's `or` (stops at the first true value) or `and` (stops at the first false value)."""
    value = None
    for part in parts:
        value = part(context)
        if bool(value) is stop:
            break
    return value


@lru_cache(maxsize=1024)
def text_reads(text: str) -> tuple[frozenset[str], frozenset[str]] | None:
    """Returns the variables and predicates that a text reads; None if it derives symbols and so may read anything."""
    names, predicates, position = set(), set(), _opening(text)
    while match := _TEXT.match(text, position):
        position = match.end()
        if match["symbol"] or match["repeated"]:
            return None
        if match["expression"]:
            tree = ast.parse(match["expression"].strip())
            names |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        for predicate, placeholders in parse_query(match["query"] or ""):
            predicates.add(predicate.removeprefix("not_"))
            names |= {name for name, _ in placeholders}
    return frozenset(names), frozenset(predicates)


@lru_cache(maxsize=4096)
def parse_query(text: str) -> Query:
    """Parses `p(a:t, b:u) & q(a:t)` to ((p, ((a, t), (b, u))), (q, ((a, t),))). An empty text is an empty query."""
    query = []
    for part in text.split("&") if text.strip() else ():
        match = re.fullmatch(r"\s*(!?[\w/]+)\s*\(([^()]*)\)\s*", part)
        if match is None:
            raise ValueError(f"expected a query like 'p(a:t) & q(a:t, b:u)', got {text!r}")
        pairs = [[side.strip() for side in item.split(":")] for item in match[2].split(",") if item.strip()]
        query.append((match[1], tuple((pair[0], pair[-1]) for pair in pairs)))
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
