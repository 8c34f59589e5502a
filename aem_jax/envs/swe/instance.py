"""One task: what every format has, and SWE-bench's schema (the columns of its release 5).

Release 5 added the columns that grading needs: the image, the name of the log parser, the type of the evaluation and
its script. So no table of repositories is needed. Rows of release 4 lack these columns and are refused.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import KW_ONLY, MISSING, dataclass, fields, replace
from typing import Any, ClassVar

from aem_jax.envs.swe.patches import patched_files
from aem_jax.envs.swe.sandbox.workspace import TESTBED, Limits
from aem_jax.files import parse_json

START_MARKER = ">>>>> Start Test Output"
END_MARKER = ">>>>> End Test Output"
SEALED = "# sealed: a single command that needs nothing of this shell"
"""Comment on the line of the start marker: the tests run without the shell that had the hidden tests."""
EVAL_TYPES = ("pass_and_fail", "fail_only")


@dataclass(frozen=True)
class Resources:
    """Limits of one instance, in place of the run's settings; 0 keeps the setting."""

    cpus: float = 0.0
    """Processors; only containers limit them."""
    memory_mib: int = 0
    """Memory of all processes together, MiB."""
    disk_mib: int = 0
    """Size of the workspace, MiB."""
    command_s: float = 0.0
    """Wall time of one command of the agent, seconds."""
    grade_s: float = 0.0
    """Wall time of the final tests, seconds."""

    def of_command(self, limits: Limits) -> Limits:
        """Returns the limits on a command of the agent, from those of the run."""
        return self._limits(limits, self.command_s)

    def of_grading(self, limits: Limits) -> Limits:
        """Returns the limits on the final tests, from those of the run."""
        return self._limits(limits, self.grade_s)

    def _limits(self, limits: Limits, seconds: float) -> Limits:
        return replace(
            limits,
            cpus=self.cpus or limits.cpus,
            memory_mib=self.memory_mib or limits.memory_mib,
            disk_mib=self.disk_mib or limits.disk_mib,
            seconds=seconds or limits.seconds,
        )


def resources_of(value: Any) -> Resources:
    """Returns the resources in a row's column `resources`: a JSON object, or its text.

    Raises:
        ValueError: unknown names, or values that are not positive numbers; or a limit below what a workspace needs.
    """
    if isinstance(value, str):
        value = parse_json(value, "resources")
    kinds: dict[str, type] = {f.name: type(f.default) for f in fields(Resources)}
    if not isinstance(value, Mapping) or set(value) - set(kinds):
        raise ValueError(f"expected an object of {', '.join(kinds)} in resources, got {value!r:.200}")
    given = {name: number for name, number in value.items() if number is not None}  # parquet fills gaps with null
    for name, number in given.items():
        whole = kinds[name] is int and isinstance(number, float) and not number.is_integer()
        if isinstance(number, bool) or not isinstance(number, (int, float)) or not 0 < number < math.inf or whole:
            kind = "an integer" if kinds[name] is int else "a number"
            raise ValueError(f"expected {kind} above 0 for {name} in resources, got {number!r:.80}")
    converted: dict[str, Any] = {name: kinds[name](number) for name, number in given.items()}
    resources = Resources(**converted)
    resources.of_command(Limits())  # validates
    return resources


@dataclass(frozen=True)
class Instance:
    """A repository with a bug and a description of the bug; what grades a fix is in the class of its format.

    Attributes:
        instance_id: name of the instance, unique in its data set.
        repo: `<owner>/<name>`.
        base_commit: commit that the agent starts from.
        patch: the fix ("gold"), a unified diff; never shown to the agent.
        problem_statement: the task for the agent.
        image: name of the container image; if empty, the tests run in the runtime's own Python.
        bug_patch: a unified diff that makes the bug; applied to the repository before the task begins.
        workdir: the repository's folder in the image. `/testbed` is a link to it if it is another one.
        resources: limits of this instance.
    """

    MOVED: ClassVar[tuple[str, ...]] = ()
    """Hidden files that the image has in its root. A checkout has them in `/testbed`; in the root they are masked."""

    instance_id: str
    repo: str
    base_commit: str
    patch: str
    problem_statement: str
    image: str
    _: KW_ONLY
    bug_patch: str = ""
    workdir: str = TESTBED
    resources: Resources = Resources()

    @property
    def hidden(self) -> tuple[str, ...]:
        """Files and folders of `/testbed` that grade a fix; never shown to the agent."""
        return ()


@dataclass(frozen=True)
class SweBenchInstance(Instance):
    """A row of SWE-bench; its id is `<owner>__<name>-<number>`.

    Attributes:
        test_patch: the change to the tests that grades a fix; never shown to the agent.
        fail_to_pass: names of the tests that fail at the base commit and pass with the fix.
        pass_to_pass: names of the tests that pass before and after the fix.
        version: version of the repository.
        environment_setup_commit: commit that the image was installed at.
        log_parser: name of the function that parses test results from a log.
        eval_type: `pass_and_fail`, or `fail_only` (the log names only failures; every other test has passed).
        eval_script: bash script that restores the tests, applies `test_patch` and runs the tests between two markers.
        hints_text: the discussion of the issue.
        created_at: date of the change.
    """

    PASSING: ClassVar[frozenset[str]] = frozenset({"PASSED", "XFAIL"})
    """Statuses of a test that passes."""
    KEPT: ClassVar[frozenset[str]] = PASSING | {"SKIPPED"}
    """Statuses of a test of PASS_TO_PASS that still passes."""
    APPLY: ClassVar[tuple[str, ...]] = (
        "git apply --verbose",
        "git apply --verbose --3way",
        "git apply --verbose --reject",
    )
    """Commands that apply a patch, in their order."""
    FUZZY: ClassVar[bool] = True
    """Whether `patch --fuzz=5` is tried if all of them fail."""

    test_patch: str
    fail_to_pass: tuple[str, ...]
    pass_to_pass: tuple[str, ...]
    version: str
    environment_setup_commit: str
    log_parser: str
    eval_type: str
    eval_script: str
    hints_text: str = ""
    created_at: str = ""

    def __post_init__(self) -> None:
        if self.eval_type not in EVAL_TYPES:
            raise ValueError(f"expected eval_type to be one of {', '.join(EVAL_TYPES)}, got {self.eval_type!r}")
        if not self.fail_to_pass:
            raise ValueError("expected at least one test in FAIL_TO_PASS, got none: no test would detect a fix")
        lines = self.eval_script.split("\n")
        start, end = (next((i for i, line in enumerate(lines) if m in line), -1) for m in (START_MARKER, END_MARKER))
        if not 0 <= start < end:
            raise ValueError(
                f"expected an eval_script with a line that prints {START_MARKER!r} and a later one that prints "
                f"{END_MARKER!r}, got neither or one: its log could not be graded"
            )

    @property
    def is_sealed(self) -> bool:
        """Whether code under test must not read the hidden tests; see `SEALED`."""
        return SEALED in self.eval_script

    @property
    def test_files(self) -> Mapping[str, str]:
        """Files that are restored to the base commit before the tests run -> files that they are renamed from."""
        return patched_files(self.test_patch)


_LISTS = {"fail_to_pass": "FAIL_TO_PASS", "pass_to_pass": "PASS_TO_PASS"}
"""Attribute -> column, for lists of test names. All other columns are texts with the attribute's name."""
_REQUIRED = tuple(f.name for f in fields(SweBenchInstance) if f.default is MISSING and f.name not in _LISTS)
_OPTIONAL = tuple(f.name for f in fields(SweBenchInstance) if f.default is not MISSING and not f.kw_only)
_SINCE_5 = ("image", "log_parser", "eval_type", "eval_script")


def missing_columns(row: Mapping[str, Any]) -> list[str]:
    """Returns the columns of release 5 that grading needs and a row lacks."""
    return [name for name in (*_REQUIRED, *_LISTS.values()) if row.get(name) is None]


def from_row(row: Mapping[str, Any]) -> SweBenchInstance:
    """Returns the instance of a row.

    Args:
        row: columns under their official names; FAIL_TO_PASS and PASS_TO_PASS as JSON lists or lists of names. Other
            columns (`difficulty`, `image_assets`, …) are ignored.

    Raises:
        ValueError: columns are missing (rows of release 4 have their own message) or have values of another type.
    """
    missing = missing_columns(row)
    if set(missing) & set(_SINCE_5) and not set(missing) - set(_SINCE_5):
        raise ValueError(
            f"expected the columns of SWE-bench 5.x, got a row of 4.x without {', '.join(missing)}; "
            "load the dataset again at its current revision (SWE-bench/SWE-bench_Verified and its siblings have these "
            "columns since swebench 5.0) and save that as parquet or JSONL"
        )
    if missing:
        raise ValueError(f"expected the columns of SWE-bench 5.x, {', '.join(missing)} missing; got {sorted(row)}")
    texts = {name: text_of(name, row[name]) for name in _REQUIRED}
    texts |= {name: text_of(name, row.get(name) or "") for name in _OPTIONAL}
    lists: dict[str, Any] = {name: names_of(row, column) for name, column in _LISTS.items()}
    return SweBenchInstance(**texts, **lists)


def to_row(instance: SweBenchInstance) -> dict[str, str]:
    """Returns the row of an instance: the official columns, lists as JSON, as `swebench` reads them."""
    row = {name: getattr(instance, name) for name in (*_REQUIRED, *_OPTIONAL)}
    return row | {column: json.dumps(list(getattr(instance, name))) for name, column in _LISTS.items()}


def text_of(name: str, value: Any) -> str:
    """Returns a column's text; ValueError if it is not one."""
    if hasattr(value, "isoformat"):  # created_at is a timestamp in some parquet files
        return value.isoformat()
    if not isinstance(value, str):
        raise ValueError(f"expected text in {name}, got {value!r:.80}")
    return value


def names_of(row: Mapping[str, Any], column: str) -> tuple[str, ...]:
    """Returns the test names in a column, a list or the JSON text of one; ValueError if it is neither."""
    value = row[column]
    if isinstance(value, str):
        try:
            value = parse_json(value, column)
        except ValueError as error:
            raise ValueError(f"expected a JSON list of test names in {column}, got {value!r:.80}: {error}") from None
    if not isinstance(value, (list, tuple)) or not all(isinstance(name, str) for name in value):
        raise ValueError(f"expected a list of test names in {column}, got {value!r:.80}")
    for name in value:
        if not name.strip() or "\n" in name:
            raise ValueError(f"expected test names of one line in {column}, got {name!r:.80}, which no log can contain")
    return tuple(value)
