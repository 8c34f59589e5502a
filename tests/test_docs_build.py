"""How the documentation site renders a docstring. Skipped without Sphinx (the extra `docs`)."""

import importlib
import sys
from pathlib import Path

import pytest

pytest.importorskip("sphinx")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "docs" / "_ext"))
convert = importlib.import_module("docstrings").convert


def test_an_equation_becomes_a_preformatted_block():
    lines = ["Gives A.", "", "    A_t = A_{id_t}", "", "No gradient.", "", "Args:", "    ids: int[B], `-1` for none."]
    assert convert(lines) == [
        *("Gives A.", "", "::", "", "    A_t = A_{id_t}", "", "No gradient.", "", "Args:"),
        "    ids: int[B], ``-1`` for none.",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("e^(−|λ|) <= α", r"e^(−\|λ\|) <= α"),
        ("`k_` and k_, *others* and 2 * 3", r"``k_`` and k\_, *others* and 2 \* 3"),
        ("``code`` stays, :math:`x` too", "``code`` stays, :math:`x` too"),
    ],
)
def test_signs_of_mathematics_are_no_markup(text: str, expected: str):
    assert convert([text]) == [expected]
