"""Grades a patch as SWE-bench does, in a fresh copy of the repository.

The agent's workspace is never graded. The patch is applied to a fresh copy as SWE-bench applies it, and the hidden
tests are added after that. The evaluation's log is parsed as SWE-bench parses it, except for the cut: the beginning and
the end of the tests are known to this process and are not taken from the output.

- The evaluation script stops before its end marker. So the output ends with the test command, and the tests' exit
  status is the command's exit status.
- The start marker contains a number that is drawn for this grading.
- Markers inside the output are made harmless.

So code cannot change its grade by printing markers or exit codes, which deceives SWE-bench itself (it cuts at the first
markers). It cannot edit the tests either: all files of the test patch are restored to the base commit before the script
runs. docs/swe.md describes the remaining risk: tests and tested code share a process.
"""

import dataclasses
import re
import secrets
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from aem_jax.envs.swe.instance import END_MARKER, START_MARKER, SweBenchInstance
from aem_jax.envs.swe.log_parsers import Statuses, parser
from aem_jax.envs.swe.patches import put_back, set_aside
from aem_jax.envs.swe.sandbox.workspace import (
    Checkout,
    EngineError,
    Limits,
    Outcome,
    Runtime,
    SandboxError,
    Workspace,
)

APPLY_FAILED = ">>>>> Patch Apply Failed"
TIMED_OUT = ">>>>> Tests Timed Out"
EXIT_CODE = ">>>>> Test Exit Code"
_INVALID = (APPLY_FAILED, ">>>>> Reset Failed", ">>>>> Tests Errored", TIMED_OUT)
LOG_BYTES = 32 * 2**20
"""Bytes of the output that are kept at least."""

# Evidence that tests ran although the log names none: counts above zero, as several test runners print them.
_RAN = re.compile(
    r"Executed [1-9]\d* of \d+|TOTAL: [1-9]\d* (?:SUCCESS|FAILED)|[1-9]\d* passing|Tests:\s+[1-9]\d*"
    r"|Test Suites:\s+(?:\d+ \w+, )*[1-9]\d* total|^# tests [1-9]\d*|[1-9]\d* specs?, \d+ failures?|': ok$",
    re.MULTILINE,
)


@dataclass(frozen=True)
class Report:
    """The verdict on a patch.

    Attributes:
        resolved: every test of FAIL_TO_PASS and of PASS_TO_PASS has the expected result.
        applied: the patch could be applied.
        fail_to_pass: test -> whether it passes now.
        pass_to_pass: test -> whether it still passes (or is skipped).
        log: the output, in the form that `swebench` reads.
    """

    resolved: bool
    applied: bool
    fail_to_pass: Mapping[str, bool] = field(default_factory=dict)
    pass_to_pass: Mapping[str, bool] = field(default_factory=dict)
    log: str = ""


def grade(
    instance: SweBenchInstance, model_patch: str | None, runtime: Runtime, checkout: Checkout, *, limits: Limits
) -> Report:
    """Grades a patch in a separate workspace.

    Args:
        instance: the task.
        model_patch: a unified diff. None: there is no patch; nothing runs, and the instance is unresolved. An empty
            text is a patch without changes; the tests run.
        runtime: opens the workspace.
        checkout: fills it with the repository at the base commit.
        limits: limits on the evaluation; at least 32 MiB of its output are kept.

    Returns:
        The report. The instance is unresolved if the patch cannot be applied, if the hidden tests cannot be placed
        after it (the patch can be the cause, and must not gain by it), or if the tests do not end in time.

    Raises:
        SandboxError: the workspace failed, so there is no verdict.
        ValueError, ModuleNotFoundError: there is no parser for this instance's log.
    """
    parse = parser(instance)
    unresolved = judge(instance, {}, valid=False)
    if model_patch is None:
        return dataclasses.replace(unresolved, applied=False, log="no patch\n")
    limits = dataclasses.replace(limits, output_bytes=max(limits.output_bytes, LOG_BYTES))
    workspace = runtime.open(instance, checkout, limits=limits)
    try:
        hidden = set_aside(workspace, instance.hidden) if instance.hidden else b""
        applied = apply_patch(workspace, model_patch, instance.APPLY, fuzzy=instance.FUZZY)
        if applied.exit_code != 0:
            log = f"{_defused(applied.output)}\n{APPLY_FAILED}\n"
            return dataclasses.replace(unresolved, applied=False, log=log)
        if instance.hidden:
            try:
                put_back(workspace, instance.hidden, hidden)
            except EngineError:
                raise
            except SandboxError as error:
                return dataclasses.replace(unresolved, log=f"{error}\n")
        restored = workspace.run(_restore(instance))
        log = _evaluate(instance, workspace)
    finally:
        workspace.close()
    if restored.exit_code != 0:
        log = f"{_defused(restored.output)}\n>>>>> Reset Failed\n"
    statuses = read_log(log, parse)
    return dataclasses.replace(judge(instance, statuses or {}, valid=statuses is not None), log=log)


def read_log(log: str, parse) -> Statuses | None:
    """Returns the test results of a log, by SWE-bench's rules.

    Args:
        log: the output of an evaluation, with markers.
        parse: text -> results.

    Returns:
        The results. None if the log is invalid: it has no markers, a marker of failure, no evidence that tests ran, or
        a failing exit status without a failed test (so it does not describe the run that took place).
    """
    if any(marker in log for marker in _INVALID) or START_MARKER not in log or END_MARKER not in log:
        return None
    statuses = parse(log.split(START_MARKER)[1].split(END_MARKER)[0]) or parse(log)
    if not statuses and not _RAN.search(log):
        return None
    exit_code = re.search(rf"{re.escape(EXIT_CODE)}:\s*(-?\d+)", log)
    failing = {"FAILED", "ERROR"} & set(statuses.values())
    if exit_code and int(exit_code[1]) != 0 and statuses and not failing:
        return None
    return statuses


def judge(instance: SweBenchInstance, statuses: Statuses, *, valid: bool = True) -> Report:
    """Returns the verdict on test results.

    Tests of FAIL_TO_PASS must have a status of the format's `PASSING`, those of PASS_TO_PASS one of `KEPT`. For
    SWE-bench these are PASSED and XFAIL, and for PASS_TO_PASS also SKIPPED. With `fail_only`, every test that is not
    FAILED has passed.

    Args:
        instance: the task.
        statuses: test results.
        valid: whether the log is valid; otherwise every test counts as failed.
    """
    fail_to_pass = {name: valid and _holds(instance, statuses, name, False) for name in instance.fail_to_pass}
    pass_to_pass = {name: valid and _holds(instance, statuses, name, True) for name in instance.pass_to_pass}
    resolved = valid and all(fail_to_pass.values()) and all(pass_to_pass.values())
    return Report(resolved, True, fail_to_pass, pass_to_pass)


def _holds(instance: SweBenchInstance, statuses: Statuses, name: str, may_skip: bool) -> bool:
    if instance.eval_type == "fail_only":
        return statuses.get(name) != "FAILED"
    passing = instance.PASSING
    if name not in statuses and name.count("[") > name.count("]"):
        # Some published names are cut off inside their parameters. Such a name has the result of the tests whose names
        # begin with it, if either all or none of them passed.
        longer = [test for test in statuses if test.startswith(name)]
        if len({statuses[test] in passing for test in longer}) == 1:
            name = longer[0]
    return statuses.get(name) in (instance.KEPT if may_skip else passing)


# A failed attempt leaves changes behind, so each later one starts from a clean
# tree. git rejects an empty patch, and `patch`, which accepts it, may be missing in an image; so it is accepted first.
# Unlike git, `patch` would write into .git, so .git is moved away while it runs, and a new .git makes it fail.
_APPLY = r"""
patch=$(mktemp) && kept=$(mktemp -d) && cat > "$patch" || exit 90
[ -s "$patch" ] || exit 0
git update-index -q --refresh || true  # with --3way, git compares the files with their entries in the index
with_patch() {
  mv .git "$kept/git" || return 91
  patch --batch --forward --fuzz=5 -p1 -i "$1"; code=$?
  if [ -e .git ] || [ -L .git ]; then rm -rf .git; code=92; fi
  mv "$kept/git" .git && return $code
}
for attempt in "${attempts[@]}"; do
  echo "+ $attempt"
  $attempt "$patch" && exit 0
  [ "$attempt" = with_patch ] || { git checkout -- . ; git clean -fd; }
done
git apply --check --reverse "$patch"
"""


def apply_patch(
    workspace: Workspace, model_patch: str, commands: Sequence[str] = SweBenchInstance.APPLY, *, fuzzy: bool = True
) -> Outcome:
    """Applies a patch; the exit status is 0 if it could be applied.

    Args:
        workspace: where it is applied.
        model_patch: a unified diff.
        commands: are tried in this order, by default those of SWE-bench.
        fuzzy: whether `patch --fuzz=5` is tried after them.
    """
    attempts = shlex.join([*commands, "with_patch"] if fuzzy else commands)
    return workspace.run(f"attempts=({attempts})\n{_APPLY}", stdin=model_patch.encode(errors="surrogateescape"))


def _restore(instance: SweBenchInstance) -> str:
    """Returns a script that restores the test files to the base commit."""
    base = shlex.quote(instance.base_commit)
    lines = ["export GIT_LITERAL_PATHSPECS=1"]  # names with [ ] or * are not patterns
    files = instance.test_files
    sources = [source for name, source in files.items() if source != name]  # renamed or copied; the patch needs them
    for path in dict.fromkeys([*sources, *files]):
        parts = path.split("/")
        if parts[0] == "" or {"..", ".git"} & set(parts):
            continue  # outside the repository, or git's own data
        quoted = shlex.quote(path)
        lines.append(
            f"if git cat-file -e {base}:{quoted} 2>/dev/null; then git checkout --quiet {base} -- {quoted} || exit 1; "
            f"else rm -rf -- {quoted}; git rm -r --cached --quiet --ignore-unmatch -- {quoted}; fi"
        )
    return "\n".join(lines)


def _evaluate(instance: SweBenchInstance, workspace: Workspace) -> str:
    """Runs the evaluation script up to its end marker; returns its log, with markers only around the tests' output."""
    lines = instance.eval_script.split("\n")
    start = next(i for i, line in enumerate(lines) if START_MARKER in line)
    end = next(i for i, line in enumerate(lines) if END_MARKER in line)
    if instance.is_sealed:
        # Two runs, the second without a shell. While code under test runs, only the sealed process has the hidden tests
        # in its memory, and the log as its output.
        before = _run_lines(workspace, lines[:start]).output
        outcome = workspace.run("\n".join([f"exec {lines[start + 1]}", *lines[start + 2 : end]]))
        tests = f"\n{outcome.output}"
    else:
        mark = f"{START_MARKER} {secrets.token_hex(16)}"
        begin = lines[start].replace(START_MARKER, mark)
        outcome = _run_lines(workspace, [*lines[:start], begin, *lines[start + 1 : end], "exit $?"])
        before, printed_mark, tests = outcome.output.partition(mark)
        if not printed_mark:
            return f"{_defused(outcome.output)}\n"  # the tests did not start; without markers, the log is invalid
    log = f"{_defused(before)}{START_MARKER}{_defused(tests)}\n{END_MARKER}\n"
    if outcome.exit_code is None:
        return f"{log}{TIMED_OUT} {outcome.notice}\n"
    return f"{log}{EXIT_CODE}: {outcome.exit_code}\n"


def _run_lines(workspace: Workspace, lines: Sequence[str]) -> Outcome:
    """Runs lines of a script. They come as standard input, because test patches may be too long for an argument.

    The shell reads all of them and closes this input first. So what they start has an empty one.
    """
    script = "\n".join([*lines, ""]).encode(errors="surrogateescape")
    return workspace.run('eval "exec < /dev/null\n$(cat)"', stdin=script)


def _defused(text: str) -> str:
    """Makes the markers in an output harmless."""
    for marker in (START_MARKER, END_MARKER, EXIT_CODE):
        text = text.replace(marker, marker.replace(">>>>>", ">>>> >"))
    return text
