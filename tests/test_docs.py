"""The pages say what is so: what they link to is there, and the code that a link names is in that file."""

import re
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
            assert re.search(rf"^(def|class) {name}\b", source, re.MULTILINE), f"{page.name}: no {name} in {target}"
