"""R2E-Gym: reads its published rows, and grades a patch by the statuses that its tests are expected to have.

The published columns name no test that fails or passes. They contain a map from each hidden test to its status with
the fix, which may be FAILED. A patch is right exactly if the tests that ran, and their statuses, are those of the map.

Three guards are not in the published grading. They matter because tested code shares the output with pytest:

- A line that begins with FAILED or ERROR is never a success, whatever its message says.
- A log with two short summaries is not graded.
- Lines after pytest's last line are ignored.
"""

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from aem_jax.envs.swe.grading import APPLY_FAILED, LOG_BYTES, TIMED_OUT, Report, apply_patch
from aem_jax.envs.swe.instance import Instance
from aem_jax.envs.swe.log_parsers import Statuses
from aem_jax.envs.swe.patches import set_aside
from aem_jax.envs.swe.sandbox.workspace import Checkout, Limits, Runtime, SandboxError, WorkspaceError
from aem_jax.files import parse_json

SUMMARY = "short test summary info"
SCRIPT = "run_tests.sh"
"""Untracked file in the image's `/testbed`; runs the hidden tests."""
FOLDER = "r2e_tests"
"""Folder of the hidden tests, in the image's root."""
DEFAULT_SCRIPT = f"python -W ignore -m pytest -rA {FOLDER}"
"""Runs the hidden tests where there is no `run_tests.sh`: the repository came from a mirror."""

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_LAST_LINE = re.compile(r"=+ .*\bin \d+\.\d+s\b.*=+")
_ISSUE = re.compile(r"\[ISSUE\](.*)\[/ISSUE\]", re.DOTALL)
_SIGNS = {"context": " ", "added": "+", "deleted": "-"}


@dataclass(frozen=True)
class R2EInstance(Instance):
    """A row of R2E-Gym.

    Attributes:
        commit_hash: the commit that contains the fix.
        expected: the hidden tests and their statuses with the fix, sorted by name.
        tests: names and contents of the hidden test files, for repositories that come from a mirror. An image has its
            own in `/r2e_tests`.
    """

    MOVED: ClassVar[tuple[str, ...]] = (FOLDER,)

    commit_hash: str
    expected: tuple[tuple[str, str], ...]
    tests: tuple[tuple[str, str], ...] = ()

    @property
    def hidden(self) -> tuple[str, ...]:
        """See `Instance.hidden`."""
        return (SCRIPT, FOLDER)


_TEXTS = ("repo_name", "docker_image", "commit_hash", "problem_statement", "expected_output_json")


def from_row(row: Mapping[str, Any]) -> R2EInstance:
    """Returns the instance of a row.

    Args:
        row: R2E-Gym's published columns: `repo_name`, `docker_image`, `commit_hash`, `problem_statement`,
            `expected_output_json`, `parsed_commit_content`, and `execution_result_content` if there is one. `to_row`
            replaces the last two, which repeat whole files, by `patch`, `base_commit` and `tests`.

    Raises:
        ValueError: columns are missing or have other values than expected.
    """
    missing = [name for name in _TEXTS if not row.get(name)]
    if not row.get("parsed_commit_content") and row.get("patch") is None:
        missing.append("parsed_commit_content")
    if missing:
        raise ValueError(f"expected the columns of R2E-Gym, {', '.join(missing)} missing; got {sorted(row)}")
    for name in _TEXTS:
        if not isinstance(row[name], str):
            raise ValueError(f"expected text in {name}, got {row[name]!r:.80}")
    commit = row["commit_hash"]
    if not re.fullmatch(r"[0-9a-f]{40}", commit):
        raise ValueError(f"expected 40 hex digits in commit_hash, got {commit!r:.80}")
    issue = _ISSUE.search(row["problem_statement"])
    if row.get("patch") is not None:
        patch, base, tests = row["patch"], row.get("base_commit"), row.get("tests", [])
        if not isinstance(patch, str) or not isinstance(base, str) or not _are_pairs(tests):
            raise ValueError("expected texts in patch and base_commit, and pairs of texts in tests, got other values")
    else:
        parsed = _object(row, "parsed_commit_content")
        patch, base = gold_patch(parsed), parsed.get("old_commit_hash")
        tests = _test_files(_object(row, "execution_result_content") if row.get("execution_result_content") else {})
    return R2EInstance(
        instance_id=f"r2e__{row['repo_name']}-{commit[:12]}",
        repo=row["repo_name"],
        # the published commits may name their parent by an expression
        base_commit=base if isinstance(base, str) and re.fullmatch(r"[0-9a-f]{40}", base) else f"{commit}^",
        patch=patch,
        problem_statement=(issue[1] if issue else row["problem_statement"]).strip(),
        image=row["docker_image"],
        commit_hash=commit,
        expected=_expected(row),
        tests=tuple((name, text) for name, text in tests),
    )


def to_row(instance: R2EInstance) -> dict[str, Any]:
    """Returns a short row of an instance, which `from_row` reads."""
    return {
        "repo_name": instance.repo,
        "docker_image": instance.image,
        "commit_hash": instance.commit_hash,
        "problem_statement": instance.problem_statement,
        "expected_output_json": json.dumps(dict(instance.expected)),
        "patch": instance.patch,
        "base_commit": instance.base_commit,
        "tests": [list(test) for test in instance.tests],
    }


def gold_patch(parsed: Mapping[str, Any]) -> str:
    """Rebuilds the fix from the content of `parsed_commit_content`; files of tests are left out.

    A hunk ends when its counts are reached: the published hunks may have one more empty line, from the end of the text
    that they were parsed from.

    Raises:
        ValueError: the content has another form.
    """
    try:
        return "".join(
            _file_patch(diff) for diff in parsed["file_diffs"] if not _is_test(diff["header"]["file"]["path"])
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            "expected file_diffs with headers and hunks of lines in parsed_commit_content, got another form: "
            f"{type(error).__name__} {error}"
        ) from None


def _file_patch(diff: Mapping[str, Any]) -> str:
    path, binary = diff["header"]["file"]["path"], diff.get("is_binary_file")
    if binary:
        return ""  # the row has no content of it
    lines = [f"diff --git a/{path} b/{path}"]
    if diff["header"].get("misc_line"):
        lines.append(diff["header"]["misc_line"])
    if index := diff.get("index_line"):
        mode = f" {index['mode']}" if index.get("mode") else ""
        lines.append(f"index {index['old_commit_hash']}..{index['new_commit_hash']}{mode}")
    if diff.get("minus_file") and diff.get("plus_file"):
        lines += [f"--- {diff['minus_file']['path']}", f"+++ {diff['plus_file']['path']}"]
    for hunk in diff.get("hunks") or ():
        old, new = hunk["descriptor"]["old_range"], hunk["descriptor"]["new_range"]
        lines.append(f"@@ -{_range(old)} +{_range(new)} @@ {hunk['descriptor'].get('section') or ''}".rstrip())
        old_left, new_left = (1 if part.get("length") is None else part["length"] for part in (old, new))
        for line in hunk["line_group"]["all_lines"]:
            if line["type"] == "note":
                lines.append(f"\\ {line['content']}")
            elif old_left > 0 or new_left > 0:
                lines.append(_SIGNS[line["type"]] + line["content"])
                old_left -= line["type"] != "added"
                new_left -= line["type"] != "deleted"
    return "\n".join(lines) + "\n"


def _range(part: Mapping[str, Any]) -> str:
    return f"{part['start']}" if part.get("length") is None else f"{part['start']},{part['length']}"


def _is_test(path: str) -> bool:
    *folders, name = path.split("/")
    in_tests = {"test", "tests", "Test", "Tests"} & set(folders)
    return bool(in_tests) or name.startswith("test_") or name.endswith("_test.py")


def _object(row: Mapping[str, Any], column: str) -> dict[str, Any]:
    value = row[column]
    if isinstance(value, str):
        try:
            value = parse_json(value, column)
        except ValueError as error:
            raise ValueError(f"expected a JSON object in {column}, got {row[column]!r:.80}: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object in {column}, got {type(value).__name__}")
    return value


def _expected(row: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    statuses = _object(row, "expected_output_json")
    if not statuses or not all(isinstance(status, str) for status in statuses.values()):
        raise ValueError(
            "expected at least one test and its status in expected_output_json, got "
            f"{row['expected_output_json']!r:.80}"
        )
    return tuple(sorted(_short_names({_COLOUR.sub("", name): status for name, status in statuses.items()}).items()))


def _test_files(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    names, codes = result.get("test_file_names") or [], result.get("test_file_codes") or []
    pairs = [(name.split("/")[-1] if isinstance(name, str) else name, code) for name, code in zip(names, codes)]
    if len(names) != len(codes) or not _are_pairs(pairs):
        raise ValueError(
            "expected as many texts in test_file_names as in test_file_codes of execution_result_content, "
            f"got {len(names)} and {len(codes)}"
        )
    return pairs


def _are_pairs(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(
        isinstance(pair, (list, tuple)) and len(pair) == 2 and all(isinstance(text, str) for text in pair)
        for pair in value
    )


def grade(
    instance: R2EInstance, model_patch: str | None, runtime: Runtime, checkout: Checkout, *, limits: Limits
) -> Report:
    """Grades a patch in a separate workspace; arguments, result and errors are those of `grading.grade`.

    `run_tests.sh` and the hidden tests are set aside before the patch is applied. Afterwards they replace what the
    patch put at their paths.
    """
    if model_patch is None:
        return dataclasses.replace(judge(instance, {}), applied=False, log="no patch\n")
    limits = dataclasses.replace(limits, output_bytes=max(limits.output_bytes, LOG_BYTES))
    workspace = runtime.open(instance, checkout, limits=limits)
    try:
        hidden = set_aside(workspace, instance.hidden)
        applied = apply_patch(workspace, model_patch)
        if applied.exit_code != 0:
            return dataclasses.replace(judge(instance, {}), applied=False, log=f"{applied.output}\n{APPLY_FAILED}\n")
        placed = workspace.run(_PLACE, stdin=hidden)
        if placed.exit_code == _NO_TESTS:
            if not instance.tests:
                raise SandboxError(
                    f"expected the hidden tests of {instance.instance_id!r} in the image's /{FOLDER}, or in "
                    "execution_result_content of its row, got neither"
                )
            for name, text in instance.tests:
                workspace.write(f"{FOLDER}/{name}", text.encode(errors="surrogateescape"))
        elif placed.exit_code != 0:
            raise WorkspaceError(f"the hidden tests could not be placed: {placed.notice or placed.output:.300}")
        outcome = workspace.run(_RUN)
    except WorkspaceError as error:  # the patch can be the cause
        return dataclasses.replace(judge(instance, {}), log=f"{error}\n")
    finally:
        workspace.close()
    if outcome.exit_code is None:
        log = f"{outcome.output}\n{TIMED_OUT} {outcome.notice}\n"
        return dataclasses.replace(judge(instance, {}), log=log)
    return dataclasses.replace(judge(instance, parse_summary(outcome.output)), log=outcome.output)


_NO_TESTS = 93
_PLACE = f"""
rm -rf -- {SCRIPT} {FOLDER} && tar --extract --file=- || exit 1
[ -f {SCRIPT} ] || echo '{DEFAULT_SCRIPT}' > {SCRIPT}
[ -d {FOLDER} ] || {{ mkdir {FOLDER} && exit {_NO_TESTS}; }}
"""
_RUN = f"""
if [ -d .venv/bin ]; then export VIRTUAL_ENV=/testbed/.venv PATH="/testbed/.venv/bin:$PATH"; fi
exec bash {SCRIPT} < /dev/null
"""


def parse_summary(log: str) -> Statuses:
    """Returns the statuses of the tests in pytest's short summary (`-rA`), by R2E-Gym's names.

    A name is what follows the first `::`, with further `::` as `.`, cut at ` - `. It is empty for a file that could
    not be collected. Other lines (SKIPPED, XFAIL) name no status and are left out. The last line about a test counts.

    Args:
        log: the output of `run_tests.sh`.

    Returns:
        The statuses: PASSED, FAILED or ERROR. None at all if there is no summary, or more than one.
    """
    parts = _COLOUR.sub("", log).replace("\r", "").split(SUMMARY)
    if len(parts) != 2:
        return {}
    statuses: dict[str, str] = {}
    for line in parts[1].strip().split("\n"):
        if _LAST_LINE.fullmatch(line.strip()):
            break
        words = line.split(maxsplit=1)
        if words and words[0] in ("FAILED", "ERROR"):
            status = words[0]
        else:
            status = next((word for word in ("PASSED", "FAILED", "ERROR") if word in line), "")
        if status:
            name = ".".join(line.split("::")[1:])
            statuses[name if status == "PASSED" else name.split(" - ")[0]] = status
    return _short_names(statuses)


def _short_names(statuses: Statuses) -> dict[str, str]:
    """Cuts names at ` - `. Of names that become equal, the last in alphabetical order counts, as published."""
    return {name.split(" - ")[0]: statuses[name] for name in sorted(statuses)}


def judge(instance: R2EInstance, statuses: Statuses) -> Report:
    """Returns the verdict on test results: the tests and their statuses have to be the expected ones.

    `pass_to_pass` holds for each expected test, and each other test that ran, whether its status is the expected one.
    `fail_to_pass` is empty, because the row does not tell which tests fail without the fix.
    """
    expected = dict(instance.expected)
    as_expected = {name: statuses.get(name) == expected.get(name) for name in {**expected, **statuses}}
    return Report(all(as_expected.values()), True, {}, as_expected)
