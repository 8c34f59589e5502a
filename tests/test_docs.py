"""The pages are correct: links and options exist, linked code is in the linked file, and code blocks run."""

import importlib
import inspect
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
from command_lines import commands, unknown_options

REPOSITORY = Path(__file__).resolve().parents[1]
DOCS = REPOSITORY / "docs"
PAGES = [*sorted(REPOSITORY.glob("*.md")), *sorted(DOCS.rglob("*.md"))]
TUTORIALS = sorted((DOCS / "tutorials").glob("*.md"))
LINK = re.compile(r"\[([^\]]*)\]\(([^)\s]+)\)")


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path):
    targets = [target.split("#")[0] for _, target in LINK.findall(page.read_text()) if "://" not in target]
    missing = [target for target in targets if target and not (page.parent / target).exists()]
    assert not missing, f"{page.name} points at {missing}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_linked_code_exists(page: Path):
    for label, target in LINK.findall(page.read_text()):
        name = label.strip("`")
        if target.endswith(".py") and name.isidentifier():
            source = (page.parent / target).read_text()
            defined = rf"^(?:(?:def|class) {name}\b|{name}(?:: [^=\n]+)? = )"
            assert re.search(defined, source, re.MULTILINE), f"{page.name}: no {name} in {target}"


def test_readme_is_short():
    assert len((REPOSITORY / "README.md").read_text().splitlines()) < 150


@pytest.mark.parametrize("page", TUTORIALS, ids=lambda page: page.name)
def test_the_code_of_a_tutorial_runs(page: Path, user_environment: dict[str, str]):
    """Runs all blocks of a page in order, in a separate process."""
    code = "\n".join(blocks(page, "python"))
    assert code
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, env=user_environment
    )
    assert result.returncode == 0, result.stderr


def test_the_readers_of_command_lines_see_mistakes():
    launch = "python -m aem_jax.launch"
    page = f"`{launch} plan --topolgy v5p:2x2x4`, or\n    {launch} --seed 1 \\\n        --aem.strenth 0 # off"
    assert [unknown_options(words) for words in commands(page)] == [["--topolgy"], ["--aem.strenth"]]
    assert (
        unknown_options(["trian"]) == ["trian"] and unknown_options(["--preset", "webshop-tiny", "--seed", "1"]) == []
    )


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page.read_text())], ids=lambda page: page.name)
def test_commands_have_the_options_that_the_page_gives_them(page: Path):
    unknown = {" ".join(words): unknown_options(words) for words in commands(page.read_text())}
    assert not any(unknown.values()), unknown


def test_every_page_is_in_the_table_of_contents():
    listed = set()
    for page in [DOCS / "index.md", DOCS / "api" / "index.md"]:
        for tree in re.findall(r"^```\{toctree\}\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE):
            names = [line for line in tree.splitlines() if line and not line.startswith(":")]
            listed |= {(page.parent / f"{name}.md").resolve() for name in names}
    assert listed == set(DOCS.rglob("*.md")) - {DOCS / "index.md"}


def test_every_metric_of_a_step_is_explained():
    pages = "".join((DOCS / name).read_text() for name in ("run_folder.md", "algorithms.md", "howto/carry.md"))
    for file in ("train.py", "credit.py", "selection.py", "launch/efficiency.py"):
        names = re.findall(r'"([a-z]+/[a-z_]+)"', (REPOSITORY / "aem_jax" / file).read_text())
        assert names
        assert [name for name in names if f"`{name}`" not in pages] == [], file


def test_every_public_function_and_class_has_a_docstring():
    """The API reference is built from docstrings and leaves out objects without one."""
    for room in ("advantage", "losses", "models", "sampler"):
        module = importlib.import_module(f"aem_jax.{room}")
        for name in module.__all__:
            member = getattr(module, name)
            if inspect.isfunction(member) or inspect.isclass(member):
                assert member.__doc__, f"{room}.{name}"


def test_an_estimator_is_a_function_and_a_line(monkeypatch: pytest.MonkeyPatch):
    """Follows the walk-through of docs/algorithms.md: inserts its function and line, then runs its test."""
    from aem_jax.overrides import override

    page = (DOCS / "algorithms.md").read_text().partition("## Adding an estimator")[2]
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
