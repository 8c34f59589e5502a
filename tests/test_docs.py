"""The pages say what is so: what they link to is there, and the code that a link names is in that file."""

import re
import sys
import types
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
PAGES = [*sorted(REPOSITORY.glob("*.md")), *sorted((REPOSITORY / "docs").glob("*.md"))]
LINK = re.compile(r"\[([^\]]*)\]\(([^)\s]+)\)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path):
    targets = [target.split("#")[0] for _, target in LINK.findall(page.read_text()) if "://" not in target]
    missing = [target for target in targets if target and not (page.parent / target).exists()]
    assert not missing, f"{page.name} points at {missing}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_is_where_the_page_says(page: Path):
    for label, target in LINK.findall(page.read_text()):
        name = label.strip("`")
        if target.endswith(".py") and name.isidentifier():
            source = (page.parent / target).read_text()
            defined = rf"^(?:(?:def|class) {name}\b|{name}(?:: [^=\n]+)? = )"
            assert re.search(defined, source, re.MULTILINE), f"{page.name}: no {name} in {target}"


def test_an_estimator_is_a_function_and_a_line(monkeypatch: pytest.MonkeyPatch):
    """The walk-through of docs/algorithms.md, done: function and line put where it says, then its own test."""
    from aem_jax.overrides import override

    page = (REPOSITORY / "docs" / "algorithms.md").read_text().partition("## Adding an estimator")[2]
    function, line, check = re.findall(r"^```python\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE)
    assert line.count("\n") == 1
    source = (REPOSITORY / "aem_jax" / "config" / "algorithms.py").read_text()
    table = re.search(r"^ESTIMATORS: .* = \{\n", source, re.MULTILINE)
    assert table
    source = source[: table.start()] + function + table[0] + line + source[table.end() :]
    module = types.ModuleType("walk_through")
    monkeypatch.setitem(sys.modules, "walk_through", module)
    exec(compile(source, "walk_through", "exec"), module.__dict__)
    exec("from aem_jax.advantage import Experience\n" + check, module.__dict__)
    asked = override(module.AlgorithmConfig(), {"estimator": "against_best", "scope": "turns"})
    assert asked.estimator == "against_best"
    with pytest.raises(ValueError, match="did you mean 'against_best'"):
        override(asked, {"estimator": "against_bset"})


def test_every_estimator_and_preset_is_in_the_table():
    from aem_jax.config.algorithms import ESTIMATORS
    from aem_jax.config.presets import algorithm_names, read_preset

    rows = [line.split("|") for line in (REPOSITORY / "docs" / "algorithms.md").read_text().splitlines() if "|" in line]
    documented = {row[5].strip(" `") for row in rows if len(row) == 7}
    assert set(algorithm_names()) <= documented
    assert {read_preset(name).algorithm.estimator for name in algorithm_names()} == set(ESTIMATORS)
