"""Links from a page to a file of the repository lead to a page that shows the file.

Pages link to files as they lie in the repository (`../aem_jax/batch.py`), so that links work where the repository is
browsed. The site gets a page for each linked file; a link whose label names a function or class leads to its line.
"""

import html
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx

REPOSITORY = Path(__file__).resolve().parents[2]
LINK = re.compile(r"\[([^\]]*)\]\(((?:\.\./)+[^)#\s]+)(#[^)\s]*)?\)")
PAGES = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
"""Files of the repository that are pages of the site."""
LANGUAGES = {".py": "python", ".toml": "toml", ".sh": "bash", ".sbatch": "bash", ".yaml": "yaml", ".j2": "jinja"}

DEFINITION = re.compile(r"(?:(?:def|class) (\w+)|([A-Za-z_]\w*)(?:: [^=]+)? = )")


def _rewrite(app: Sphinx, docname: str, source: list[str]) -> None:
    here = posixpath.dirname(f"docs/{docname}")

    def link(match: re.Match) -> str:
        label, target, anchor = match[1], posixpath.normpath(posixpath.join(here, match[2])), match[3] or ""
        if target.startswith("docs/"):
            return match[0]
        if target in PAGES:
            return f"[{label}]({posixpath.relpath('docs/' + PAGES[target], here)}{anchor})"
        if (REPOSITORY / target).is_dir():
            return label if label.startswith("`") else f"`{label}`"
        name = label.strip("`")
        return f"[{label}](source:{target}{'#' + name if name.isidentifier() else ''})"

    source[0] = LINK.sub(link, source[0])


def _resolve(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    for node in doctree.findall(nodes.reference):
        uri = node.get("refuri", "")
        if uri.startswith("source:"):
            path, _, name = uri.removeprefix("source:").partition("#")
            linked = app.env.__dict__.setdefault("linked_files", set())
            linked.add(path)
            node["refuri"] = app.builder.get_relative_uri(docname, f"source/{path}") + (f"#{name}" if name else "")
            node["internal"] = True


def _collect(app: Sphinx) -> Iterator[tuple[str, dict[str, Any], str]]:
    for path in sorted(getattr(app.env, "linked_files", ())):
        text = (REPOSITORY / path).read_text(encoding="utf-8")
        yield f"source/{path}", {"title": path, "body": _body(app, path, text), "parents": []}, "page.html"


def _body(app: Sphinx, path: str, text: str) -> str:
    """A file as highlighted HTML, with an anchor before each definition at the left margin."""
    language = LANGUAGES.get(posixpath.splitext(path)[1], "text")
    block = app.builder.highlighter.highlight_block(text, language)  # type: ignore[attr-defined]
    names = {number: DEFINITION.match(line) for number, line in enumerate(text.splitlines())}
    before, start, rest = block.partition("<pre>")
    lines = rest.split("\n")
    for number, name in names.items():
        if name and number < len(lines):
            lines[number] = f'<span id="{name[1] or name[2]}"></span>{lines[number]}'
    return f"<h1>{html.escape(path)}</h1>{before}{start}" + "\n".join(lines)


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("source-read", _rewrite)
    app.connect("doctree-resolved", _resolve)
    app.connect("html-collect-pages", _collect)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": False}
