"""Generated tasks: the bugs with their splits and difficulties, and an instance for each, in SWE-bench's schema.

A bug consists of one to three edits of a package's module, and the tests that they break (`catalogue.json`, written by
`scripts/survey_bugs.py`). The task's repository contains the edits but not those tests. The fix is the reverse diff,
and the test patch adds the tests again.
"""

import ast
import difflib
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from aem_jax.envs.swe.generate.mutate import Edit, apply
from aem_jax.envs.swe.generate.packages import Package, package
from aem_jax.envs.swe.instance import END_MARKER, SEALED, START_MARKER, SweBenchInstance
from aem_jax.envs.swe.repos import commit_id, files_checkout
from aem_jax.envs.swe.sandbox.workspace import Checkout

SPLITS = ("train", "valid", "test")
DIFFICULTIES = ("easy", "medium", "hard")
_HELD_OUT = 3
_CATALOGUE = Path(__file__).with_name("catalogue.json")
_SEALED_RUN = Path(__file__).with_name("sealed_run.py")


def check_difficulties(difficulties: Sequence[str]) -> None:
    """Rejects unknown difficulties and an empty selection."""
    if not difficulties or not set(difficulties) <= set(DIFFICULTIES):
        raise ValueError(f"expected difficulties among {', '.join(DIFFICULTIES)}, got {list(difficulties)}")


@dataclass(frozen=True)
class Bug:
    """Edits that break tests.

    Attributes:
        package: name of the edited package.
        number: index among the package's bugs.
        edits: the edits, in order of position.
        broken: test function -> pytest's message.
    """

    package: str
    number: int
    edits: tuple[Edit, ...]
    broken: Mapping[str, str]

    @property
    def id(self) -> str:
        """`<package>-<number>`."""
        return f"{self.package}-{self.number}"

    @property
    def difficulty(self) -> str:
        """`hard`: several edits; `easy`: one edit that breaks at most two tests; `medium`: one that breaks more."""
        if len(self.edits) > 1:
            return "hard"
        return "easy" if len(self.broken) <= 2 else "medium"

    @property
    def split(self) -> str:
        """`test`: held-out packages. Of the others, one edit in five is `valid`, by its hash; the rest is `train`.

        `mixed` is not a split: these bugs have edits of both `train` and `valid`, so that the splits share no edit.
        """
        if self.package in _held_out():
            return "test"
        keys = (f"{self.package}/{edit.start}-{edit.end}-{edit.after}" for edit in self.edits)
        drawn = {"valid" if _hash(key) % 5 == 0 else "train" for key in keys}
        return drawn.pop() if len(drawn) == 1 else "mixed"


@cache
def bugs() -> Sequence[Bug]:
    """Returns all bugs of the catalogue, by package and number.

    Raises:
        ValueError: the catalogue was made for a different version of a package.
    """
    catalogue = []
    for name, entry in json.loads(_CATALOGUE.read_text(encoding="utf-8")).items():
        if entry["digest"] != package(name).digest:
            raise ValueError(
                f"expected a catalogue made for the current {name}, got an older one; "
                "rebuild it with: python scripts/survey_bugs.py"
            )
        for number, bug in enumerate(entry["bugs"]):
            edits = tuple(Edit(**edit) for edit in bug["edits"])
            catalogue.append(Bug(name, number, edits, bug["broken"]))
    return tuple(catalogue)


def bug(payload: Mapping[str, Any]) -> Bug:
    """Returns the bug of a payload `{"bug": "<package>-<number>"}`.

    Raises:
        ValueError: there is no such bug.
    """
    for candidate in bugs():
        if candidate.id == payload.get("bug"):
            return candidate
    raise ValueError(f"expected a payload with 'bug', <package>-<number> of the catalogue, got {dict(payload)!r:.200}")


@lru_cache(maxsize=512)
def instance(bug_id: str) -> SweBenchInstance:
    """Returns the instance of a bug, by the bug's id."""
    case = bug({"bug": bug_id})
    original = package(case.package)
    before, after = base_files(case), original.files(original.source, _tests_without(original, case))
    base = commit_id(before)
    patch = diff(before, after)
    test_patch = diff(before, before | {original.tests_path: original.tests})
    names = [f"{original.tests_path}::{test}" for test in _test_names(original.tests)]
    broken = {f"{original.tests_path}::{test}" for test in case.broken}
    return SweBenchInstance(
        instance_id=f"aem_jax__{case.id}",
        repo=f"aem_jax/{case.package}",
        base_commit=base,
        patch=patch,
        test_patch=test_patch,
        problem_statement=_statement(original, case),
        fail_to_pass=tuple(name for name in names if name in broken),
        pass_to_pass=tuple(name for name in names if name not in broken),
        version="1",
        environment_setup_commit=base,
        image="",
        log_parser="parse_log_pytest",
        eval_type="pass_and_fail",
        eval_script=_script(base, original.tests_path, test_patch),
    )


def base_files(case: Bug) -> dict[str, str]:
    """Returns the agent's initial repository: the edits applied, the broken tests removed."""
    original = package(case.package)
    return original.files(apply(original.source, case.edits), _tests_without(original, case))


def checkout(case: Bug) -> Checkout:
    """Returns a checkout that fills a folder with `base_files`."""
    return files_checkout(base_files(case))


@cache
def _held_out() -> frozenset[str]:
    names = json.loads(_CATALOGUE.read_text(encoding="utf-8"))
    return frozenset(sorted(names, key=_hash)[:_HELD_OUT])


def _hash(text: str) -> int:
    return int(hashlib.sha256(text.encode()).hexdigest(), 16)


def _test_names(tests: str) -> list[str]:
    functions = (node for node in ast.parse(tests).body if isinstance(node, ast.FunctionDef))
    return [node.name for node in functions if node.name.startswith("test_")]


def _tests_without(original: Package, case: Bug) -> str:
    """Returns the tests without those that the bug breaks; imports that only they needed remain."""
    tests = original.tests
    lines = tests.split("\n")
    for node in reversed(ast.parse(tests).body):
        if isinstance(node, ast.FunctionDef) and node.name in case.broken:
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)]) - 1
            last = node.end_lineno or first
            while last < len(lines) and not lines[last]:
                last += 1
            del lines[first:last]
    return "\n".join(lines).rstrip("\n") + "\n"


def diff(before: Mapping[str, str], after: Mapping[str, str]) -> str:
    """Returns a patch between two versions of the same files, path -> text."""
    text = ""
    for path in sorted(before):
        old, new = (files[path].splitlines(keepends=True) for files in (before, after))
        text += "".join(difflib.unified_diff(old, new, f"a/{path}", f"b/{path}"))
    return text


def _statement(original: Package, case: Bug) -> str:
    """Returns a bug report as a user would write it: correct and actual behaviour, never the mistake's location."""
    broken = [test for test in _test_names(original.tests) if test in case.broken]
    titles = "\n".join(f"- {test.removeprefix('test_').replace('_', ' ')}" for test in broken)
    text = f"`{original.name}` does not do what it should. These no longer hold:\n\n{titles}\n"
    if case.difficulty == "easy":
        text += f"\nFor example:\n\n```\n{case.broken[broken[0]]}\n```\n"
    if case.difficulty == "hard":
        text += "\nThere may be more than one cause.\n"
    return text


def _script(base: str, tests_path: str, test_patch: str) -> str:
    return f"""#!/bin/bash
set -uxo pipefail
cd /testbed
git checkout {base} {tests_path}
git apply -v - <<'EOF_TEST_PATCH'
{test_patch}EOF_TEST_PATCH
: '{START_MARKER}' {SEALED}
python -I - {tests_path} <<'EOF_SEALED_RUN'
{_SEALED_RUN.read_text(encoding="utf-8")}EOF_SEALED_RUN
: '{END_MARKER}'
git checkout {base} {tests_path}
"""
