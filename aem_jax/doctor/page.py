"""Prints findings as a table, row by row; in plain ASCII if the stream's encoding requires it."""

import contextlib
import textwrap
from collections.abc import Sequence
from typing import Any, TextIO

from rich.console import Console
from rich.text import Text

from aem_jax.doctor.finding import Finding

MARKS = {True: "✓", False: "✗", None: "–"}
STYLES = {True: "green", False: "bold red", None: "dim"}
ASCII = str.maketrans({"✓": "+", "✗": "x", "–": "-", "→": "->", "×": "x", "·": "*", "…": "...", "≥": ">=", "≤": "<="})
NAME = 20
"""Width of a check's name, in columns."""
WIDTH = 140
"""Width in columns if the stream is not a terminal."""


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """The reader closed the pipe. The command line handles this error, as for any other output."""
        raise  # noqa: PLE0704 (rich calls this inside its except block)


class Page:
    """Writes to one stream."""

    def __init__(self, stream: TextIO) -> None:
        self._encoding = (getattr(stream, "encoding", None) or "utf-8").lower()
        self._is_unicode = self._encoding.replace("-", "").replace("_", "").startswith("utf")
        is_terminal = stream.isatty()
        self._console = _Console(file=stream, width=None if is_terminal else WIDTH, highlight=False)

    def head(self, model: str) -> None:
        """Prints the checked model."""
        self._print(f"aem_jax doctor: a decoder of {model}'s shape with random weights")

    def at_work(self, name: str) -> contextlib.AbstractContextManager[Any]:
        """On a terminal, shows the current check."""
        if not self._console.is_terminal:
            return contextlib.nullcontext()
        return self._console.status(f"checking {name}", spinner="dots" if self._is_unicode else "line")

    def show(self, finding: Finding) -> None:
        """Prints one row, and the advice below it."""
        ok, name = finding.ok, f"{finding.name:{NAME}} {finding.seconds:6.1f} s"
        self._console.print(Text(self._plain(MARKS[ok]), STYLES[ok]), Text(name), end=" ")
        self._hang(finding.text, "", at_row=True)
        if finding.advice:
            self._hang(f"→ {finding.advice}", "yellow" if ok is False else "dim", at_row=False)

    def foot(self, findings: Sequence[Finding], seconds: float, of: int) -> None:
        """Prints the number of passed checks."""
        count = {ok: sum(finding.ok is ok for finding in findings) for ok in MARKS}
        cut = "" if len(findings) == of else f"; stopped after {len(findings)} of {of} checks"
        wrong = [finding.name for finding in findings if finding.ok is False]
        end = f": {', '.join(wrong)}" if wrong else ""
        self._print(f"{count[True]} ✓, {count[False]} ✗, {count[None]} – in {seconds:.0f} s{cut}{end}")

    def _print(self, text: str) -> None:
        self._console.print(Text(self._plain(text)))

    def _hang(self, text: str, style: str, *, at_row: bool) -> None:
        """Wraps a text into the last column."""
        indent = " " * (NAME + 12)
        lines = textwrap.wrap(self._plain(text), max(self._console.width - len(indent) - 1, 20)) or [""]
        for number, line in enumerate(lines):
            first = at_row and number == 0
            self._console.print(
                Text(("" if first else indent) + line, style), no_wrap=True, overflow="ignore", crop=False
            )

    def _plain(self, text: str) -> str:
        if self._is_unicode:
            return text
        return text.translate(ASCII).encode(self._encoding, "replace").decode(self._encoding)
