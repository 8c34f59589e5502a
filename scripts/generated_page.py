"""Pages of docs/ that are generated from committed results: their templates, tables and command line."""

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jinja2


def template(path: Path, **names: Any) -> jinja2.Template:
    """A Markdown template with the given names; an undefined name is an error."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(path.parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.globals |= names
    return environment.get_template(path.name)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    row = lambda cells: f"| {' | '.join(cells)} |"
    return "\n".join([row(header), "|---" * len(header) + "|", *map(row, rows)])


def write_or_check(
    words: Sequence[str] | None, module: str, page: Path, render: Callable[[], str], plot: Callable[[], object]
) -> int:
    """The command line of a generator: writes the page, or checks with --check that it is up to date.

    Args:
        words: of the command line; by default those of this process.
        module: the generator.
        page: file to write, in a folder of the repository.
        render: returns the page's text, or raises ValueError.
        plot: draws the page's images after it is written.

    Returns:
        The exit status: 1 for an outdated page, 2 for bad results.
    """
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=f"Writes docs/{page.name}.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the page is out of date")
    options = parser.parse_args(words)
    try:
        text = render()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.check:
        same = page.exists() and page.read_text(encoding="utf-8") == text
        print("the page is up to date" if same else f"the page is out of date; run python -m {module}")
        return 0 if same else 1
    page.write_text(text, encoding="utf-8")
    plot()
    print(f"wrote {page.relative_to(page.parents[1])}")
    return 0
