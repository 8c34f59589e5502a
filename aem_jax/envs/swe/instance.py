"""One task in SWE-bench's schema (the columns of its release 5), and readers of JSONL, JSON and parquet files.

Release 5 added the columns that grading needs: the image, the name of the log parser, the type of the evaluation and
its script. So no table of repositories is needed. Rows of release 4 lack these columns and are refused.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from aem_jax.files import parse_json, read_json, read_json_lines, valid_json

START_MARKER = ">>>>> Start Test Output"
END_MARKER = ">>>>> End Test Output"
EVAL_TYPES = ("pass_and_fail", "fail_only")


@dataclass(frozen=True)
class Instance:
    """A repository with a bug, a description of the bug, and the tests that show whether it is fixed.

    Attributes:
        instance_id: `<owner>__<name>-<number>`.
        repo: `<owner>/<name>`.
        base_commit: commit that the agent starts from.
        patch: the fix ("gold"), a unified diff; never shown to the agent.
        test_patch: the change to the tests that grades a fix; never shown to the agent.
        problem_statement: the task for the agent.
        fail_to_pass: names of the tests that fail at the base commit and pass with the fix.
        pass_to_pass: names of the tests that pass before and after the fix.
        version: version of the repository.
        environment_setup_commit: commit that the image was installed at.
        image: name of the container image; if empty, the tests run in the runtime's own Python.
        log_parser: name of the function that parses test results from a log.
        eval_type: `pass_and_fail`, or `fail_only` (the log names only failures; every other test has passed).
        eval_script: bash script that restores the tests, applies `test_patch` and runs the tests between two markers.
        hints_text: the discussion of the issue.
        created_at: date of the change.
    """

    instance_id: str
    repo: str
    base_commit: str
    patch: str
    test_patch: str
    problem_statement: str
    fail_to_pass: tuple[str, ...]
    pass_to_pass: tuple[str, ...]
    version: str
    environment_setup_commit: str
    image: str
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


_LISTS = {"fail_to_pass": "FAIL_TO_PASS", "pass_to_pass": "PASS_TO_PASS"}
"""Attribute -> column, for lists of test names. All other columns are texts with the attribute's name."""
_REQUIRED = tuple(f.name for f in fields(Instance) if f.default is MISSING and f.name not in _LISTS)
_OPTIONAL = tuple(f.name for f in fields(Instance) if f.default is not MISSING)
_SINCE_5 = ("image", "log_parser", "eval_type", "eval_script")


def from_row(row: Mapping[str, Any]) -> Instance:
    """Returns the instance of a row.

    Args:
        row: columns under their official names; FAIL_TO_PASS and PASS_TO_PASS as JSON lists or lists of names. Other
            columns (`difficulty`, `image_assets`, …) are ignored.

    Raises:
        ValueError: columns are missing (rows of release 4 have their own message) or have values of another type.
    """
    missing = [name for name in (*_REQUIRED, *_LISTS.values()) if row.get(name) is None]
    if set(missing) & set(_SINCE_5) and not set(missing) - set(_SINCE_5):
        raise ValueError(
            f"expected the columns of SWE-bench 5.x, got a row of 4.x without {', '.join(missing)}; "
            "load the dataset again at its present revision (SWE-bench/SWE-bench_Verified and its siblings have these "
            "columns since swebench 5.0) and save that as parquet or JSONL"
        )
    if missing:
        raise ValueError(f"expected the columns of SWE-bench 5.x, {', '.join(missing)} missing; got {sorted(row)}")
    texts = {name: _text(name, row[name]) for name in _REQUIRED}
    texts |= {name: _text(name, row.get(name) or "") for name in _OPTIONAL}
    lists: dict[str, Any] = {name: _names(row, column) for name, column in _LISTS.items()}
    return Instance(**texts, **lists)


def to_row(instance: Instance) -> dict[str, str]:
    """Returns the row of an instance: the official columns, lists as JSON, as `swebench` reads them."""
    row = {name: getattr(instance, name) for name in (*_REQUIRED, *_OPTIONAL)}
    return row | {column: json.dumps(list(getattr(instance, name))) for name, column in _LISTS.items()}


def read_instances(path: str | Path) -> list[Instance]:
    """Reads the instances of a file, in its order.

    Args:
        path: `*.jsonl` (one JSON object per line; empty lines are skipped), `*.json` (a list) or `*.parquet` (needs
            pyarrow).

    Raises:
        ValueError: the file has another type, contains no instance, or has an invalid row or a repeated id; the message
            gives file and line.
        FileNotFoundError: no such file.
        ModuleNotFoundError: a parquet file, and pyarrow is not installed.
    """
    path = Path(path)
    readers = {".jsonl": _jsonl_rows, ".json": _json_rows, ".parquet": _parquet_rows}
    if path.suffix not in readers:
        raise ValueError(f"expected a file of {', '.join(readers)}, got {str(path)!r}")
    instances: dict[str, Instance] = {}
    for place, row in readers[path.suffix](path):
        try:
            if not isinstance(row, dict):
                raise ValueError(f"expected a JSON object, got {type(row).__name__}")
            instance = from_row(row)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from None
        if instance.instance_id in instances:
            raise ValueError(f"{place}: expected each instance_id once, got {instance.instance_id!r} again")
        instances[instance.instance_id] = instance
    if not instances:
        raise ValueError(f"expected instances in {path}, got none")
    return list(instances.values())


def _text(name: str, value: Any) -> str:
    if hasattr(value, "isoformat"):  # created_at is a timestamp in some parquet files
        return value.isoformat()
    if not isinstance(value, str):
        raise ValueError(f"expected text in {name}, got {value!r:.80}")
    return value


def _names(row: Mapping[str, Any], column: str) -> tuple[str, ...]:
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


def _jsonl_rows(path: Path) -> Iterator[tuple[str, Any]]:
    return ((f"{path} line {number}", row) for number, row in read_json_lines(path))


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    rows = read_json(path)
    if not isinstance(rows, list):
        raise ValueError(f"{path}: expected a JSON list of instances, got {type(rows).__name__}")
    return ((f"{path} entry {number}", row) for number, row in enumerate(rows, start=1))


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    if not path.exists():
        raise FileNotFoundError(f"expected a parquet file, found no {path}")
    try:
        from pyarrow import parquet
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            f"reading {path} needs pyarrow: pip install pyarrow (or save the dataset as JSONL, which needs nothing)"
        ) from None
    try:
        rows = parquet.read_table(path).to_pylist()
    except Exception as error:  # pyarrow has its own exception classes
        raise ValueError(
            f"{path}: expected a parquet file, got {' '.join(str(error).split()) or type(error).__name__:.300}"
        ) from None
    return ((f"{path} row {number}", valid_json(row)) for number, row in enumerate(rows, start=1))
