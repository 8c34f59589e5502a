"""Text files are UTF-8 in every locale: each call that opens one in text mode sets the encoding."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# A mode with "b" opens bytes; these names take it as their first or second argument.
OPENERS = {"read_text", "write_text", "open", "fdopen", "NamedTemporaryFile"}


def without_encoding(source: str) -> list[int]:
    """Lines of the calls that read or write text in the locale's encoding."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        owner = (
            node.func.value.id if isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name) else ""
        )
        given = {keyword.arg for keyword in node.keywords}
        if name not in OPENERS or given & {"encoding", None} or (name == "read_text" and node.args):
            continue
        if name == "write_text" and (isinstance(node.func, ast.Name) or len(node.args) != 1):
            continue  # ours: (path, text)
        if name in ("open", "fdopen", "NamedTemporaryFile"):
            modes = [*node.args[:2], *(keyword.value for keyword in node.keywords if keyword.arg == "mode")]
            modes = [mode.value for mode in modes if isinstance(mode, ast.Constant) and isinstance(mode.value, str)]
            is_binary = any("b" in mode and set(mode) <= set("rwaxb+") for mode in modes)
            is_other = isinstance(node.func, ast.Attribute) and (owner == "os" or len(node.args) > 1 or not modes)
            if is_binary or (name == "NamedTemporaryFile" and not modes) or (name == "open" and is_other):
                continue
        lines.append(node.lineno)
    return lines


def test_every_file_of_text_is_opened_as_utf_8():
    calls = []
    for folder in ("aem_jax", "experiments", "benchmarks", "examples"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            calls += [f"{path.relative_to(ROOT)}:{n}" for n in without_encoding(path.read_text(encoding="utf-8"))]
    assert not calls


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("path.read_text()", 1),
        ("path.read_text(encoding='utf-8')", 0),
        ("path.write_text(x)", 1),
        ("write_text(path, x)", 0),
        ("open(path)", 1),
        ("open(path, 'w')", 1),
        ("path.open('a')", 1),
        ("path.open('rb')", 0),
        ("os.open(path, os.O_RDONLY)", 0),
    ],
)
def test_the_checker_counts_calls_without_encoding(source: str, count: int):
    assert len(without_encoding(source)) == count
