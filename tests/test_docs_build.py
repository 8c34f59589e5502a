"""How the documentation site renders docstrings and settings. Skipped without Sphinx (the extra `docs`)."""

import importlib
import re
import sys
from pathlib import Path

import pytest

from aem_jax.config.run import RunConfig
from aem_jax.envs.registry import TRAINED
from aem_jax.overrides import annotations, choose, flag

pytest.importorskip("sphinx")
DOCS = Path(__file__).resolve().parents[1] / "docs"
sys.path.insert(0, str(DOCS / "_ext"))
convert = importlib.import_module("docstrings").convert
settings = importlib.import_module("settings")


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


def test_the_lists_have_every_setting_of_every_environment():
    assert re.findall(r"{settings} (\w+)", (DOCS / "settings.md").read_text()) == ["run", "environments"]
    groups = settings.run_groups() + settings.environment_groups()
    listed = re.findall(r"^`(--\S+) ", "\n".join(map(settings.definitions, groups)), re.MULTILINE)
    known = {name for choice in TRAINED for name in annotations(choose(RunConfig(), {"environment": choice}))}
    assert sorted(listed) == sorted(map(flag, known))


def test_a_setting_is_a_definition_of_markdown():
    setting = settings.Setting("a.b_c", int | None, None, "Up to </think>, or 2|3.")
    definition = "`--a.b-c INT|none`, default `None`\n: Up to \\</think>, or 2|3."
    assert settings.definitions(settings.Group("a", "", [setting])) == definition
