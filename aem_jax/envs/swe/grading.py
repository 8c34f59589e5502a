"""Whether a patch solves an instance: SWE-bench's own grading, in a fresh copy of the repository.

The agent's workspace is never graded. Its patch is applied to a fresh copy as SWE-bench applies it, and only then do
the hidden tests come in. What the evaluation prints is read as SWE-bench reads it, but the log is cut where this
process knows that the tests began and ended, not where their output says so:

- the evaluation script is stopped before its end marker, so the end of the output is the end of the command, and the
  tests' exit status is the command's own;
- the start marker carries a number drawn for this grading alone;
- markers inside the output are defused.

So printing markers and exit codes is no use, although it deceives SWE-bench itself (its cut takes the first markers
that it sees). Editing the tests is no use either: all files that the test patch names are restored to the base commit
before the script runs. What remains is stated in docs/swe.md: tests and tested code share a process.
"""

import dataclasses
import re
import secrets
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from aem_jax.envs.swe.instance import END_MARKER, START_MARKER, Instance
from aem_jax.envs.swe.log_parsers import Statuses, parser
from aem_jax.envs.swe.patches import patched_files
from aem_jax.envs.swe.sandbox.workspace import Checkout, Limits, Runtime, Workspace

APPLY_FAILED = ">>>>> Patch Apply Failed"
TIMED_OUT = ">>>>> Tests Timed Out"
EXIT_CODE = ">>>>> Test Exit Code"
_INVALID = (APPLY_FAILED, ">>>>> Reset Failed", ">>>>> Tests Errored", TIMED_OUT)
_LOG_BYTES = 32 * 2**20

# Evidence that a run which names no test did run: counts above zero in the words of several test runners.
_RAN = re.compile(
    r"Executed [1-9]\d* of \d+|TOTAL: [1-9]\d* (?:SUCCESS|FAILED)|[1-9]\d* passing|Tests:\s+[1-9]\d*"
    r"|Test Suites:\s+(?:\d+ \w+, )*[1-9]\d* total|^# tests [1-9]\d*|[1-9]\d* specs?, \d+ failures?|': ok$",
    re.MULTILINE,
)


@dataclass(frozen=True)
class Report:
    """The verdict on a patch.

    Attributes:
        resolved: every test of FAIL_TO_PASS and of PASS_TO_PASS is as it should be.
        applied: the patch could be applied.
        fail_to_pass: test -> whether it passes now.
        pass_to_pass: test -> whether it still passes (or is skipped).
        log: what was printed, as `swebench` would read it.
    """

    resolved: bool
    applied: bool
    fail_to_pass: Mapping[str, bool] = field(default_factory=dict)
    pass_to_pass: Mapping[str, bool] = field(default_factory=dict)
    log: str = ""


def grade(
    instance: Instance, model_patch: str | None, runtime: Runtime, checkout: Checkout, *, limits: Limits
) -> Report:
    """Grades a patch in a workspace of its own.

    Args:
        instance: the task.
        model_patch: a unified diff; None: there is none, which resolves nothing and runs nothing. (An empty text is a
            patch that changes nothing: the tests run.)
        runtime: makes the workspace.
        checkout: fills it with the repository at the base commit.
        limits: of the evaluation; its output is kept up to 32 MiB whatever they say.

    Returns:
        The report. A patch that cannot be applied, or whose tests do not end in time, resolves nothing.

    Raises:
        SandboxError: the workspace failed; that is no verdict.
        ValueError, ModuleNotFoundError: nobody can read this instance's log.
    """
    parse = parser(instance)
    if model_patch is None:
        return dataclasses.replace(judge(instance, {}), applied=False, log="no patch\n")
    limits = dataclasses.replace(limits, output_bytes=max(limits.output_bytes, _LOG_BYTES))
    workspace = runtime.open(instance, checkout, limits=limits)
    try:
        applied = workspace.run(_APPLY, stdin=model_patch.encode(errors="surrogateescape"))
        if applied.exit_code != 0:
            log = f"{_defused(applied.output)}\n{APPLY_FAILED}\n"
            return dataclasses.replace(judge(instance, {}), applied=False, log=log)
        restored = workspace.run(_restore(instance))
        log = _evaluate(instance, workspace)
    finally:
        workspace.close()
    if restored.exit_code != 0:
        log = f"{_defused(restored.output)}\n>>>>> Reset Failed\n"
    statuses = read_log(log, parse)
    return dataclasses.replace(judge(instance, statuses or {}, valid=statuses is not None), log=log)


def read_log(log: str, parse) -> Statuses | None:
    """Test results of a log, by SWE-bench's rules.

    Args:
        log: all that an evaluation printed, markers included.
        parse: text -> results.

    Returns:
        The results; None for a log that says nothing valid: no markers, a marker of failure, no sign that tests ran,
        or a failing exit status where no test failed (the log then describes another run than took place).
    """
    if any(marker in log for marker in _INVALID) or START_MARKER not in log or END_MARKER not in log:
        return None
    statuses = parse(log.split(START_MARKER)[1].split(END_MARKER)[0]) or parse(log)
    if not statuses and not _RAN.search(log):
        return None
    found = re.search(rf"{re.escape(EXIT_CODE)}:\s*(-?\d+)", log)
    failing = {"FAILED", "ERROR"} & set(statuses.values())
    if found and int(found[1]) != 0 and statuses and not failing:
        return None
    return statuses


def judge(instance: Instance, statuses: Statuses, *, valid: bool = True) -> Report:
    """The verdict on test results.

    FAIL_TO_PASS needs PASSED or XFAIL; PASS_TO_PASS may be SKIPPED too. Of a `fail_only` log, whatever is not FAILED
    has passed.

    Args:
        instance: the task.
        statuses: test results.
        valid: whether the log could be read at all; else every test counts as failed.
    """
    fail_to_pass = {name: valid and _holds(instance, statuses, name, False) for name in instance.fail_to_pass}
    pass_to_pass = {name: valid and _holds(instance, statuses, name, True) for name in instance.pass_to_pass}
    resolved = valid and all(fail_to_pass.values()) and all(pass_to_pass.values())
    return Report(resolved, True, fail_to_pass, pass_to_pass)


def _holds(instance: Instance, statuses: Statuses, name: str, may_skip: bool) -> bool:
    if instance.eval_type == "fail_only":
        return statuses.get(name) != "FAILED"
    passing = {"PASSED", "XFAIL"}
    if name not in statuses and name.count("[") > name.count("]"):
        # Some published names are cut off inside their parameters. They stand for the tests that begin so, where
        # these agree on having passed.
        longer = [each for each in statuses if each.startswith(name)]
        if len({statuses[each] in passing for each in longer}) == 1:
            name = longer[0]
    return statuses.get(name) in (passing | {"SKIPPED"} if may_skip else passing)


# The official chain, in its order. A failed attempt leaves parts behind, so each later one starts from a clean tree.
# Of nothing, git says that it is no patch; the last of the chain, which an image may lack, then takes it.
# `patch`, unlike git, would write into .git: it runs while that is elsewhere, and may not make one.
_APPLY = r"""
patch=$(mktemp) && kept=$(mktemp -d) && cat > "$patch" || exit 90
[ -s "$patch" ] || exit 0
with_patch() {
  mv .git "$kept/git" || return 91
  patch --batch --forward --fuzz=5 -p1 -i "$1"; code=$?
  if [ -e .git ] || [ -L .git ]; then rm -rf .git; code=92; fi
  mv "$kept/git" .git && return $code
}
for attempt in 'git apply --verbose' 'git apply --verbose --3way' 'git apply --verbose --reject' with_patch; do
  echo "+ $attempt"
  $attempt "$patch" && exit 0
  [ "$attempt" = with_patch ] || { git checkout -- . ; git clean -fd; }
done
git apply --check --reverse "$patch"
"""


def _restore(instance: Instance) -> str:
    """Script that puts the files of the test patch back to the base commit, whatever the model's patch made of them."""
    base = shlex.quote(instance.base_commit)
    lines = ["export GIT_LITERAL_PATHSPECS=1"]  # a name with [ ] or * is no pattern
    for path in dict.fromkeys([*_sources(instance.test_patch), *_paths(instance.test_patch)]):
        quoted = shlex.quote(path)
        lines.append(
            f"if git cat-file -e {base}:{quoted} 2>/dev/null; then git checkout --quiet {base} -- {quoted} || exit 1; "
            f"else rm -rf -- {quoted}; fi"
        )
    return "\n".join(lines)


def _paths(patch: str) -> list[str]:
    """Files that a patch changes, in its order, as `git diff --name-only` names them; none outside the repository."""
    return _inside(patched_files(patch))


def _sources(patch: str) -> list[str]:
    """Files that a patch renames or copies, which have to be there for it to apply."""
    return _inside(source for name, source in patched_files(patch).items() if source != name)


def _inside(names: Iterable[str]) -> list[str]:
    """The names that lie in the repository, and not among git's own data."""
    parts = {name: name.split("/") for name in names}
    return [name for name, part in parts.items() if part[0] != "" and not {"..", ".git"} & set(part)]


def _evaluate(instance: Instance, workspace: Workspace) -> str:
    """Runs the evaluation script up to its end marker; its log, with markers where they belong and nowhere else."""
    lines = instance.eval_script.split("\n")
    start = next(i for i, line in enumerate(lines) if START_MARKER in line)
    end = next(i for i, line in enumerate(lines) if END_MARKER in line)
    mark = f"{START_MARKER} {secrets.token_hex(16)}"
    begin = lines[start].replace(START_MARKER, mark)
    script = "\n".join([*lines[:start], begin, *lines[start + 1 : end], "exit $?", ""])
    # By standard input: test patches outgrow what one argument of a command can hold. It is read to its end before
    # anything runs, so that what runs finds it empty.
    outcome = workspace.run('eval "$(cat)"', stdin=script.encode(errors="surrogateescape"))
    before, found, tests = outcome.output.partition(mark)
    if not found:
        return f"{_defused(outcome.output)}\n"  # never got to the tests: no markers, so nothing is read from it
    log = f"{_defused(before)}{START_MARKER}{_defused(tests)}\n{END_MARKER}\n"
    if outcome.exit_code is None:
        return f"{log}{TIMED_OUT} {outcome.notice}\n"
    return f"{log}{EXIT_CODE}: {outcome.exit_code}\n"


def _defused(text: str) -> str:
    """Output with its markers made harmless."""
    for marker in (START_MARKER, END_MARKER, EXIT_CODE):
        text = text.replace(marker, marker.replace(">>>>>", ">>>> >"))
    return text
