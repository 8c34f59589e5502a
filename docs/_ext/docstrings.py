"""Docstrings as reStructuredText: indented equations become preformatted blocks, and signs of mathematics stay signs.

A docstring of this project is plain text with Google's sections, code in single backticks, and equations as indented
blocks. Read as reStructuredText, an indented block would be a quotation, and `|α|` or `Σ_t` markup.
"""

import re
from typing import Any

from jax.typing import ArrayLike, DTypeLike
from sphinx.application import Sphinx
from sphinx.ext.napoleon import GoogleDocstring
from sphinx.util.typing import stringify_annotation

SECTION = re.compile(r"^(Args|Arguments|Returns|Raises|Yields|Attributes|Example|Examples|Note|Notes):\s*$")


def convert(lines: list[str]) -> list[str]:
    """The lines of one docstring, without common indentation, as reStructuredText."""
    result: list[str] = []
    in_section = in_block = False
    for number, line in enumerate(lines):
        indented = line.startswith("    ")
        if line and not indented:
            in_section, in_block = bool(SECTION.match(line)), False
        elif indented and not in_section and not in_block and number and not lines[number - 1].strip():
            result += ["::", ""]
            in_block = True
        result.append(line if in_block or not line.strip() else _escape(line))
    return result


def _escape(line: str) -> str:
    """Code gets double backticks; outside of it `|`, and `_` and `*` that begin or end nothing, are escaped."""
    parts = re.split(r"(``.+?``|(?<![:\w])`[^`]+`|:\w+:`[^`]+`)", line)
    for index, part in enumerate(parts):
        if index % 2 == 0:
            part = part.replace("|", r"\|")
            part = re.sub(r"(?<=\w)_(?!\w)", r"\\_", part)
            part = re.sub(r"(?<!\w)\*+(?=\s|\d|$)|(?<=\d)\*(?=\w)", lambda match: match[0].replace("*", r"\*"), part)
        elif not part.startswith(("``", ":")):
            part = f"`{part}`"
        parts[index] = part
    return "".join(parts)


ATTRIBUTES = ("attribute", "data", "property")
_held: dict[str, list[str]] = {}


def _before_napoleon(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    converted = convert(lines)
    if what in ATTRIBUTES:  # napoleon would read the words before a colon as a type
        _held[name], converted = converted, ["held"]
    lines[:] = converted


def _after_napoleon(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    if what in ATTRIBUTES and name in _held:
        lines[:] = GoogleDocstring(_held.pop(name), app.config, app, "method", name, obj, options).lines()


ALIASES = {
    stringify_annotation(alias, mode): name
    for name, alias in {"ArrayLike": ArrayLike, "DTypeLike": DTypeLike}.items()
    for mode in ("smart", "fully-qualified-except-typing")
}
"""Types that jax has a name for, as Sphinx writes them out."""


def _short(app: Sphinx, what: str, name: str, obj: Any, options: Any, signature: str, returns: str) -> Any:
    for text, alias in ALIASES.items():
        signature = signature.replace(text, alias) if signature else signature
    return signature, returns


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("autodoc-process-docstring", _before_napoleon, priority=100)
    app.connect("autodoc-process-docstring", _after_napoleon, priority=900)
    app.connect("autodoc-process-signature", _short)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
