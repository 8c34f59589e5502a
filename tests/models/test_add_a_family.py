"""Walks docs/tutorials/add_a_family.md: OLMo 2 without its row, and with the row of the page."""

import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from aem_jax.models import families
from aem_jax.models.families import FAMILIES, Family, config_from_hf

REPOSITORY = Path(__file__).resolve().parents[2]
PAGE = REPOSITORY / "docs" / "tutorials" / "add_a_family.md"
OLMO2 = "Olmo2ForCausalLM"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE.read_text(), flags=re.DOTALL | re.MULTILINE)


ROW, RECORDED = blocks(re.escape("{code-block} python"))
WALK = "\n".join(blocks("python"))


def row_of(text: str) -> Family:
    (row,) = eval(textwrap.dedent(text), {"Family": Family})
    return row


def walk(monkeypatch: pytest.MonkeyPatch, *added: Family) -> None:
    """Runs the page's code with the table in which OLMo 2's row is replaced."""
    others = tuple(family for family in FAMILIES if family.architecture != OLMO2)
    assert len(others) == len(FAMILIES) - 1
    monkeypatch.setattr(families, "FAMILIES", others + added)
    monkeypatch.chdir(REPOSITORY)
    exec(WALK, {})


def test_with_the_row_of_the_page_logits_are_those_of_transformers(monkeypatch):
    walk(monkeypatch, row_of(ROW))


@pytest.mark.parametrize(
    ("right", "wrong", "error"),
    [
        ('norm_placement="post"', 'norm_placement="pre"', AssertionError),
        ('norm_placement="post"', 'norm_placement="both"', AssertionError),
        ('qk_norm="projection"', 'qk_norm="head"', AssertionError),
        ('qk_norm="projection"', "qk_norm=None", AssertionError),
        ('"olmo2"', '"olmo"', ValueError),
    ],
)
def test_a_wrong_row_is_noticed(monkeypatch, right: str, wrong: str, error: type[Exception]):
    assert right in ROW
    with pytest.raises(error):
        walk(monkeypatch, row_of(ROW.replace(right, wrong)))


def test_without_a_row_the_error_names_the_families_and_this_page(monkeypatch):
    with pytest.raises(ValueError, match="is a row of FAMILIES in aem_jax/models/families.py: see docs/tut") as caught:
        walk(monkeypatch)
    assert f"got ['{OLMO2}'] and 'olmo2'" in str(caught.value)
    assert all(family.architecture in str(caught.value) for family in FAMILIES if family.architecture != OLMO2)
    named = re.search(r"docs/\S+\.md", str(caught.value))
    assert named and REPOSITORY / named[0] == PAGE


def test_the_row_stands_in_the_file_that_the_page_names(tmp_path: Path, user_environment: dict[str, str]):
    """In a copy of the package, as someone would edit it."""
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(REPOSITORY / "aem_jax", tmp_path / "aem_jax", ignore=ignored)
    shutil.copytree(REPOSITORY / "tests" / "models" / "golden" / "olmo2", tmp_path / "tests/models/golden/olmo2")
    file = tmp_path / "aem_jax" / "models" / "families.py"
    assert file.read_text().count(ROW) == 1
    run = lambda: subprocess.run(
        [sys.executable, "-c", WALK], capture_output=True, text=True, cwd=tmp_path, env=user_environment
    )
    file.write_text(file.read_text().replace(ROW, ""))
    without = run()
    assert without.returncode == 1 and "ValueError: expected one of Qwen2ForCausalLM, " in without.stderr
    file.write_text(file.read_text().replace("FAMILIES = (\n", f"FAMILIES = (\n{ROW}"))
    assert (done := run()).returncode == 0, done.stderr


def test_the_recorded_model_is_the_one_of_the_page():
    assert (REPOSITORY / "tests" / "models" / "make_checkpoints.py").read_text().count(RECORDED) == 1


def test_every_family_of_the_table_is_in_the_page():
    table = PAGE.read_text().partition("## Which families have rows")[2]
    named = re.findall(r"`(\w+ForCausalLM)`", table)
    assert named == [*dict.fromkeys(named)] and set(named) == {family.architecture for family in FAMILIES}


@pytest.mark.parametrize("architecture", ["Phi3ForCausalLM", "Gemma2ForCausalLM", "DeepseekV3ForCausalLM"])
def test_an_unknown_architecture_is_refused_with_the_known_ones(architecture: str):
    with pytest.raises(ValueError, match=f"expected one of .* in architectures .*, got .'{architecture}'.") as caught:
        config_from_hf({"architectures": [architecture], "model_type": "any"})
    assert all(family.architecture in str(caught.value) for family in FAMILIES)
