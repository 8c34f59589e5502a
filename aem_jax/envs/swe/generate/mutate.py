"""Small edits of Python source that resemble human mistakes: one wrong operator, bound, default or guard.

An edit replaces a span of the source text, not of its syntax tree, so the surrounding text stays unchanged and the fix
is the reverse diff. `scripts/survey_bugs.py` runs tests to find which edits break which tests.
"""

import ast
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True, order=True)
class Edit:
    """Replaces `source[start:end]`, whose text is `before`, with `after`.

    Attributes:
        start: index of the first character.
        end: index after the last character.
        before: the original text.
        after: the replacement.
        kind: the kind of mistake.
        function: qualified name of the enclosing function.
    """

    start: int
    end: int
    before: str
    after: str
    kind: str
    function: str


def apply(source: str, edits: Sequence[Edit]) -> str:
    """Returns the source with all edits applied together.

    Raises:
        ValueError: edits overlap, or an edit belongs to another source.
    """
    ordered = sorted(edits)
    if any(first.end > second.start for first, second in pairwise(ordered)):
        raise ValueError("expected edits that do not overlap")
    for edit in reversed(ordered):
        if source[edit.start : edit.end] != edit.before:
            raise ValueError(f"expected {edit.before!r} at {edit.start}, got {source[edit.start : edit.end]!r}")
        source = source[: edit.start] + edit.after + source[edit.end :]
    return source


def edits(source: str) -> list[Edit]:
    """Returns all edits of a module's functions, in order of position.

    The module parses after each edit, and differs from the source.

    Raises:
        SyntaxError: the source does not parse.
    """
    text = _Text(source)
    tree = ast.parse(source)
    edits_by_change: dict[tuple[int, int, str], Edit] = {}
    for function, name in _functions(tree):
        for node in _nodes(function):
            for kind, make in KINDS.items():
                for target, after in make(node, text):
                    start, end = text.span(target)
                    if "\n" in source[start:end] and not isinstance(target, ast.stmt):
                        continue  # a candidate must fit on one line
                    edit = Edit(start, end, source[start:end], after, kind, name)
                    if after != edit.before and _parses(after):
                        edits_by_change.setdefault((start, end, after), edit)
    return sorted(edits_by_change.values())


class _Text:
    """Source text under syntax nodes."""

    def __init__(self, source: str):
        self._source = source
        self._lines = source.splitlines(keepends=True)
        self._begin = [0]
        for line in self._lines:
            self._begin.append(self._begin[-1] + len(line))

    def span(self, node: ast.AST) -> tuple[int, int]:
        """Returns the index of a node's first character and the index after its last. Columns of `ast` count bytes."""
        first = self._place(node.lineno, node.col_offset)  # pyright: ignore[reportAttributeAccessIssue]
        last = self._place(node.end_lineno, node.end_col_offset)  # pyright: ignore[reportAttributeAccessIssue]
        return first, last

    def of(self, node: ast.AST) -> str:
        """Returns the source text of a node."""
        start, end = self.span(node)
        return self._source[start:end]

    def _place(self, line: int, column: int) -> int:
        return self._begin[line - 1] + len(self._lines[line - 1].encode()[:column].decode())


Make = Callable[[ast.AST, _Text], Iterator[tuple[ast.AST, str]]]
"""Maps a node to pairs of (node to replace, replacement text)."""

_COMPARISONS: Mapping[type, tuple[str, tuple[str, ...]]] = {
    ast.Lt: ("<", ("<=", ">")),
    ast.LtE: ("<=", ("<", ">=")),
    ast.Gt: (">", (">=", "<")),
    ast.GtE: (">=", (">", "<=")),
    ast.Eq: ("==", ("!=",)),
    ast.NotEq: ("!=", ("==",)),
    ast.In: ("in", ("not in",)),
    ast.NotIn: ("not in", ("in",)),
    ast.Is: ("is", ("is not",)),
    ast.IsNot: ("is not", ("is",)),
}
"""Operator -> its text, and the operators that people confuse it with."""
_ARITHMETIC: Mapping[type, tuple[str, tuple[str, ...]]] = {
    ast.Add: ("+", ("-",)),
    ast.Sub: ("-", ("+",)),
    ast.Mult: ("*", ("+",)),
    ast.Div: ("/", ("//",)),
    ast.FloorDiv: ("//", ("/", "%")),
    ast.Mod: ("%", ("//",)),
    ast.Pow: ("**", ("*",)),
}
_WORDS = {
    "min": "max",
    "max": "min",
    "any": "all",
    "all": "any",
    "append": "extend",
    "extend": "append",
    "lower": "upper",
    "upper": "lower",
    "startswith": "endswith",
    "endswith": "startswith",
    "pop": "get",
    "ljust": "rjust",
    "isalnum": "isalpha",
    "isdigit": "isalnum",
    "rstrip": "lstrip",
    "strip": "rstrip",
    "islower": "isupper",
    "isupper": "islower",
    "isalpha": "isalnum",
    "capitalize": "lower",
    "popleft": "pop",
}
_COPIES = ("list", "dict", "set", "sorted", "reversed", "tuple", "abs")


def _comparison(node: ast.AST, text: _Text) -> Iterator[tuple[ast.AST, str]]:
    if isinstance(node, ast.Compare):
        operands = [text.of(operand) for operand in (node.left, *node.comparators)]
        signs = [_COMPARISONS[type(op)][0] for op in node.ops]
        for i, op in enumerate(node.ops):
            for other in _COMPARISONS[type(op)][1]:
                changed = [*signs[:i], other, *signs[i + 1 :]]
                yield node, operands[0] + "".join(f" {a} {b}" for a, b in zip(changed, operands[1:]))


def _arithmetic(node: ast.AST, text: _Text) -> Iterator[tuple[ast.AST, str]]:
    if isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC:
        start, _ = text.span(node)
        code, left, right = text.of(node), text.span(node.left), text.span(node.right)
        # the text between the operands may contain parentheses, which are kept
        between = code[left[1] - start : right[0] - start]
        sign, others = _ARITHMETIC[type(node.op)]
        for other in others:
            if between.count(sign) == 1:
                yield node, code[: left[1] - start] + between.replace(sign, other) + code[right[0] - start :]


def _off_by_one(node: ast.AST, text: _Text) -> Iterator[tuple[ast.AST, str]]:
    if isinstance(node, ast.Constant) and type(node.value) is int and text.of(node).isdigit():
        yield node, str(node.value + 1)
        if node.value > 0:
            yield node, str(node.value - 1)


def _boolean(node: ast.AST, text: _Text) -> Iterator[tuple[ast.AST, str]]:
    if isinstance(node, ast.BoolOp):
        word, other = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
        for first, second in pairwise(node.values):
            start, _ = text.span(node)
            (_, left), (right, _), code = text.span(first), text.span(second), text.of(node)
            between = code[left - start : right - start]
            if between.count(f" {word} ") == 1:
                changed = between.replace(f" {word} ", f" {other} ")
                yield node, code[: left - start] + changed + code[right - start :]
        if len(node.values) == 2:  # half of a condition is missing
            yield node, text.of(node.values[0])
            yield node, text.of(node.values[1])
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield node, text.of(node.operand)
    if isinstance(node, ast.Constant) and type(node.value) is bool:
        yield node, str(not node.value)


def _condition(node: ast.AST, text: _Text) -> Iterator[tuple[ast.AST, str]]:
    if isinstance(node, (ast.If, ast.IfExp)) and not isinstance(node.test, (ast.Compare, ast.BoolOp, ast.UnaryOp)):
        yield node.test, f"not {text.of(node.test)}"


def _guard(node: ast.AST, text: _Text) -> Iterator[tuple[ast.AST, str]]:
    """Removes an early exit, or one of several statements."""
    if (
        isinstance(node, ast.If)
        and not node.orelse
        and isinstance(node.body[-1], (ast.Raise, ast.Return, ast.Continue))
    ):
        yield node, "pass"
    if isinstance(node, (ast.AugAssign, ast.Delete, ast.Break)):
        yield node, "pass"
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        yield node, "pass"


def _arguments(node: ast.AST, text: _Text) -> Iterator[tuple[ast.AST, str]]:
    if isinstance(node, ast.Call) and len(node.args) == 2 and not node.keywords:
        first, second = (text.of(argument) for argument in node.args)
        yield node, f"{text.of(node.func)}({second}, {first})"


def _word(node: ast.AST, text: _Text) -> Iterator[tuple[ast.AST, str]]:
    if isinstance(node, ast.Call):
        if isinstance(node.func, ast.Name) and node.func.id in _WORDS:
            yield node.func, _WORDS[node.func.id]
        if isinstance(node.func, ast.Attribute) and node.func.attr in _WORDS:
            yield node.func, f"{text.of(node.func.value)}.{_WORDS[node.func.attr]}"


def _copy(node: ast.AST, text: _Text) -> Iterator[tuple[ast.AST, str]]:
    if not isinstance(node, ast.Call) or len(node.args) != 1 or isinstance(node.args[0], ast.GeneratorExp):
        return
    if isinstance(node.func, ast.Name) and node.func.id in _COPIES:
        yield node, text.of(node.args[0])


KINDS: Mapping[str, Make] = {
    "comparison": _comparison,
    "arithmetic": _arithmetic,
    "off by one": _off_by_one,
    "boolean": _boolean,
    "condition": _condition,
    "missing statement": _guard,
    "swapped arguments": _arguments,
    "other function": _word,
    "missing copy": _copy,
}
"""Kind of mistake -> function that makes it."""


def _functions(tree: ast.Module) -> Iterator[tuple[ast.FunctionDef, str]]:
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            yield node, node.name
        if isinstance(node, ast.ClassDef):
            for method in node.body:
                if isinstance(method, ast.FunctionDef):
                    yield method, f"{node.name}.{method.name}"


def _nodes(function: ast.FunctionDef) -> Iterator[ast.AST]:
    """Yields all nodes of defaults and body, except f-strings and error messages, which tests rarely check."""
    todo: list[ast.AST] = [*function.args.defaults, *function.body]
    while todo:
        node = todo.pop(0)
        if isinstance(node, (ast.JoinedStr, ast.Raise)):
            continue
        yield node
        todo.extend(ast.iter_child_nodes(node))


def _parses(after: str) -> bool:
    """Whether a replacement parses as a statement or an expression. A starred argument, for example, does not."""
    try:
        ast.parse(after, mode="exec" if after == "pass" else "eval")
    except SyntaxError:
        return False
    return True
