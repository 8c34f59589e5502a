"""The source packages of generated tasks. Each is one pure-Python module with tests, written for this purpose.

They are stored as text in `code/`, because they are data of this package, not modules of it.
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
        name: name of the module.
        source: text of `<name>.py`.
        tests: text of `tests/test_<name>.py`.
    """

    name: str
    source: str
    tests: str

    @property
    def module_path(self) -> str:
        """Path of the module in the repository."""
        return f"{self.name}.py"

    @property
    def tests_path(self) -> str:
        """Path of its tests in the repository."""
        return f"tests/test_{self.name}.py"

    @property
    def digest(self) -> str:
        """SHA-256 of module and tests. Results about a package are valid only for these texts."""
        return hashlib.sha256(f"{self.source}\0{self.tests}".encode()).hexdigest()

    def files(self, source: str, tests: str) -> dict[str, str]:
        """Returns the repository's files with the given module and tests."""
        title = source.split('"""')[1].split("\n")[0]
        return {self.module_path: source, self.tests_path: tests, "README.md": f"# {self.name}\n\n{title}\n"}


@cache
def packages() -> Sequence[Package]:
    """Returns all packages, sorted by name."""
    entries = []
    for path in sorted(FOLDER.glob("*.py.txt")):
        tests = FOLDER / "tests" / f"test_{path.name}"
        name = path.name.removesuffix(".py.txt")
        entries.append(Package(name, path.read_text(encoding="utf-8"), tests.read_text(encoding="utf-8")))
    return tuple(entries)


def package(name: str) -> Package:
    """Returns the package with this name.

    Raises:
        ValueError: there is no such package.
    """
    by_name = {entry.name: entry for entry in packages()}
    if name not in by_name:
        raise ValueError(f"expected a package of {', '.join(by_name)}, got {name!r}")
    return by_name[name]
