"""The packages that tasks are made of: a module and its tests each, pure Python, written for this.

They lie in `code/` as text: they are data of this package, not modules of it.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

FOLDER = Path(__file__).with_name("code")


@dataclass(frozen=True)
class Package:
    """One module with its tests.

    Attributes:
        name: of the module.
        source: text of `<name>.py`.
        tests: text of `tests/test_<name>.py`.
    """

    name: str
    source: str
    tests: str

    @property
    def module_path(self) -> str:
        """Where the module lies in the repository."""
        return f"{self.name}.py"

    @property
    def tests_path(self) -> str:
        """Where its tests lie."""
        return f"tests/test_{self.name}.py"

    @property
    def digest(self) -> str:
        """SHA-256 of module and tests: what was found out about them holds for these texts alone."""
        return hashlib.sha256(f"{self.source}\0{self.tests}".encode()).hexdigest()

    def files(self, source: str, tests: str) -> dict[str, str]:
        """The repository with another module and other tests."""
        title = source.split('"""')[1].split("\n")[0]
        return {self.module_path: source, self.tests_path: tests, "README.md": f"# {self.name}\n\n{title}\n"}


@cache
def packages() -> Sequence[Package]:
    """All packages, by name."""
    found = []
    for path in sorted(FOLDER.glob("*.py.txt")):
        tests = FOLDER / "tests" / f"test_{path.name}"
        name = path.name.removesuffix(".py.txt")
        found.append(Package(name, path.read_text(encoding="utf-8"), tests.read_text(encoding="utf-8")))
    return tuple(found)


def package(name: str) -> Package:
    """The package of a name.

    Raises:
        ValueError: there is none.
    """
    for each in packages():
        if each.name == name:
            return each
    raise ValueError(f"expected a package of {', '.join(each.name for each in packages())}, got {name!r}")
