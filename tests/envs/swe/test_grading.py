import dataclasses
import json

import pytest
from envs.swe.official import DECEIVING, RECORDED, official_log, official_verdict
from envs.swe.samples import CALC, FORGED_CODE, GOLD, PATCHES, ROW, FakeRuntime, calc, diff
from envs.swe.sandboxes import QUICK, working_bubblewrap

from aem_jax.envs.swe.grading import Report, _evaluate, grade, judge, read_log
from aem_jax.envs.swe.instance import END_MARKER, START_MARKER, from_row
from aem_jax.envs.swe.log_parsers import parse_pytest, parse_pytest_options, parse_pytest_v2, parser
from aem_jax.envs.swe.repos import files_checkout
from aem_jax.envs.swe.sandbox.workspace import Limits

OFFICIAL = json.loads(RECORDED.read_text())["patches"]
EVEN, MEAN = "tests/test_calc.py::test_median_even", "tests/test_calc.py::test_mean"


def graded(tmp_path, patch: str | None, instance=None, **limits) -> Report:
    limits = Limits(**{"seconds": 60.0, **limits})
    report = grade(instance or calc(), patch, FakeRuntime(tmp_path), files_checkout(CALC), limits=limits)
    assert list(tmp_path.iterdir()) == []  # its workspace is gone
    return report


def by_test(verdict: dict) -> tuple[dict, dict]:
    """Official lists of successes and failures, as tests and whether they hold."""
    status = verdict.get("tests_status", {})
    kinds = [status.get(kind, {"success": [], "failure": []}) for kind in ("FAIL_TO_PASS", "PASS_TO_PASS")]
    fail_to_pass, pass_to_pass = (
        {n: n in kind["success"] for n in kind["success"] + kind["failure"]} for kind in kinds
    )
    return fail_to_pass, pass_to_pass


def test_the_recorded_verdicts_are_as_expected():
    resolved = {name for name, entry in OFFICIAL.items() if entry["verdict"]["resolved"]}
    assert resolved == {"gold", "fuzzy", "gold, deletes the tests", DECEIVING}
    assert set(OFFICIAL) == {*PATCHES, DECEIVING}


@pytest.mark.parametrize("name", OFFICIAL)
def test_logs_are_read_as_swebench_reads_them(name):
    log, verdict = OFFICIAL[name]["log"], OFFICIAL[name]["verdict"]
    statuses = read_log(log, parse_pytest)
    assert (statuses is not None) == verdict["patch_successfully_applied"]
    if statuses is not None:
        report = judge(calc(), statuses)
        assert report.resolved == verdict["resolved"]
        assert (report.fail_to_pass, report.pass_to_pass) == by_test(verdict)


@pytest.mark.parametrize("name", PATCHES)
def test_grading_agrees_with_swebench(tmp_path, name):
    report = graded(tmp_path, PATCHES[name])
    verdict = OFFICIAL[name]["verdict"]
    assert report.resolved == verdict["resolved"]
    if verdict["patch_successfully_applied"]:
        assert report.applied
        assert (report.fail_to_pass, report.pass_to_pass) == by_test(verdict)
    else:
        assert not any(report.fail_to_pass.values())
    assert report.applied == (name not in ("none", "junk", "another file's"))


def test_forged_markers_deceive_swebench_but_not_this_grading(tmp_path):
    assert OFFICIAL[DECEIVING]["verdict"]["resolved"]
    report = graded(tmp_path, FORGED_CODE)
    assert not report.resolved and report.applied
    assert report.fail_to_pass == {EVEN: False} and report.pass_to_pass[MEAN]
    assert "PASSED tests/test_calc.py::test_median_even" in report.log  # the forged line is in the log


@pytest.mark.parametrize("name", [*PATCHES, DECEIVING])
def test_recorded_verdicts_agree_with_the_installed_swebench(tmp_path, name):
    pytest.importorskip("swebench", "5", reason="compares with swebench itself (extra: swe)")
    patch = PATCHES.get(name, FORGED_CODE)
    if patch is None:
        pytest.skip("no patch: nothing runs")
    live = official_verdict(calc(), patch, official_log(calc(), patch))
    assert live["resolved"] == OFFICIAL[name]["verdict"]["resolved"]
    report = graded(tmp_path, patch)
    ours = official_verdict(calc(), patch, report.log)  # its verdict on our log
    assert ours["resolved"] == report.resolved
    if ours["patch_successfully_applied"]:
        assert by_test(ours) == (report.fail_to_pass, report.pass_to_pass)


def test_a_patch_cannot_change_git_data(tmp_path):
    hook = "#!/bin/sh\ntrue > tests/test_calc.py\n"
    report = graded(tmp_path, diff(CALC, CALC | {".git/hooks/post-checkout": hook}))
    assert not report.applied and not report.resolved


def test_files_of_the_test_patch_are_restored_even_if_a_folder_has_their_name(tmp_path):
    # the test file is new, and the agent made a folder of that name to block it
    path = "tests/test_new.py"
    patch = diff(CALC, CALC | {path: "def test_new():\n    from calc import median\n    assert median([1, 3]) == 2\n"})
    script = calc().eval_script.replace(calc().test_patch, patch).replace("-p no:cacheprovider", path)
    instance = dataclasses.replace(calc(), test_patch=patch, eval_script=script, fail_to_pass=(f"{path}::test_new",))
    hindered = GOLD + diff(CALC, CALC | {f"{path}/x": "mine\n"})
    assert graded(tmp_path, hindered, instance).resolved


def test_a_timeout_of_the_tests_resolves_nothing(tmp_path):
    patch = diff(CALC, CALC | {"calc.py": "import time\ntime.sleep(60)\n"})
    report = graded(tmp_path, patch, seconds=1.0)
    assert report.applied and not report.resolved and ">>>>> Tests Timed Out" in report.log


def test_scripts_longer_than_an_argument_are_graded(tmp_path):
    # Linux allows 128 KiB for one argument of a command
    instance = calc()
    padded = instance.eval_script.replace("git status\n", "git status\n" + "# padding\n" * 20_000)
    assert graded(tmp_path, GOLD, dataclasses.replace(instance, eval_script=padded)).resolved


@pytest.mark.parametrize("patch", [None, "not a diff\n"])
def test_without_an_applied_patch_no_test_counts_as_passed_where_only_failures_are_named(tmp_path, patch):
    assert not graded(tmp_path, patch, dataclasses.replace(calc(), eval_type="fail_only")).resolved


def test_code_cannot_read_the_script_through_the_shells_input():
    workspace = working_bubblewrap().open_empty(QUICK)
    script = f"echo '{START_MARKER}'\ncat /proc/$$/fd/0\necho '{END_MARKER}'\n"
    log = _evaluate(dataclasses.replace(calc(), eval_script=script), workspace)
    workspace.close()
    assert log == f"{START_MARKER}\n\n{END_MARKER}\n>>>>> Test Exit Code: 0\n"


def test_skipped_and_expected_failures():
    names = (EVEN, MEAN, "tests/test_calc.py::test_median_odd")

    def resolved(*statuses: str, **changes) -> bool:
        return judge(dataclasses.replace(calc(), **changes), dict(zip(names, statuses))).resolved

    assert resolved("PASSED", "PASSED", "PASSED")
    assert resolved("XFAIL", "SKIPPED", "XFAIL")
    assert not resolved("SKIPPED", "PASSED", "PASSED")  # a test to fix must run
    assert not resolved("PASSED", "ERROR", "PASSED") and not resolved("PASSED", "FAILED", "PASSED")
    assert not resolved("PASSED", "PASSED")  # a test that is not named did not pass …
    assert resolved("PASSED", "PASSED", eval_type="fail_only")  # … unless only failures are named
    assert not resolved("PASSED", "FAILED", eval_type="fail_only")


def test_names_cut_off_inside_their_parameters():
    instance = dataclasses.replace(calc(), fail_to_pass=("t.py::test_a[log(x",), pass_to_pass=())
    assert judge(instance, {"t.py::test_a[log(x)]": "PASSED", "t.py::test_a[log(xy)]": "XFAIL"}).resolved
    assert not judge(instance, {"t.py::test_a[log(x)]": "PASSED", "t.py::test_a[log(xy)]": "FAILED"}).resolved
    assert not judge(instance, {"t.py::test_a": "PASSED"}).resolved


LINES = """
PASSED tests/test_a.py::test_one
PASSED tests/test_a.py::test_path[/home/me/data/x.txt]
PASSED tests/test_a.py::test_url[//host/x]
FAILED tests/test_a.py::test_two[a b] - assert 1 == 2
FAILED tests/test_a.py::test_one - later lines count
SKIPPED [3] tests/test_a.py:7: no network
XFAIL tests/test_a.py::test_three
ERROR tests/test_b.py
PASSED
\x1b[32mPASSED\x1b[0m tests/test_a.py::\x1b[1mtest_colour\x1b[0m
tests/test_a.py::test_old PASSED
no result
"""


def test_parsers_by_hand():
    common = {
        "tests/test_a.py::test_one": "FAILED",
        "tests/test_a.py::test_url[//host/x]": "PASSED",
        "tests/test_a.py::test_three": "XFAIL",
        "tests/test_b.py": "ERROR",
    }
    two = {"tests/test_a.py::test_two[a": "FAILED"}  # names end at the first space
    assert parse_pytest(LINES) == common | two | {"tests/test_a.py::test_path[/home/me/data/x.txt]": "PASSED"}
    assert parse_pytest_options(LINES) == common | two | {"tests/test_a.py::test_path[/x.txt]": "PASSED"}
    assert parse_pytest_v2(LINES) == common | {
        "tests/test_a.py::test_path[/home/me/data/x.txt]": "PASSED",
        "tests/test_a.py::test_two[a b]": "FAILED",
        "tests/test_a.py::test_colour": "PASSED",
        "tests/test_a.py::test_old": "PASSED",
    }


def test_parsers_agree_with_swebench():
    pytest.importorskip("swebench", "5", reason="compares with swebench itself (extra: swe)")
    from swebench.harness import log_parsers as parsers  # pyright: ignore[reportMissingImports]

    from aem_jax.envs.swe import log_parsers

    others = {"parse_log_pytest_nebo", "parse_log_pytest_verbose"}  # of other data sets
    for name, own in ((name, own) for name, own in log_parsers._OWN.items() if name not in others):
        for log in (LINES, LINES.replace("test_one", "test_MouseButton.LEFT"), *(e["log"] for e in OFFICIAL.values())):
            assert own(log) == parsers.PARSER_REGISTRY[name](log, None), name


def test_the_error_for_a_missing_parser_names_the_package_to_install(monkeypatch):
    monkeypatch.setattr("aem_jax.envs.swe.log_parsers._installed", dict)
    with pytest.raises(ModuleNotFoundError, match=r"'parse_log_django'.*pip install 'aem_jax\[swe\]'"):
        parser(dataclasses.replace(calc(), log_parser="parse_log_django"))


SPACED = ["t.py::x[a b]", "t.py::x[a - b]", "t.py::x[a  b]", "t.py::x[a] ", "t.py::x[\u2028]", "t.py::x[ü\xa0]"]


def spaced(*names: str, log_parser: str, kind: str = "FAIL_TO_PASS"):
    other = {"FAIL_TO_PASS": '["t.py::first"]', "PASS_TO_PASS": "[]"}
    return from_row(ROW | other | {kind: json.dumps(names), "log_parser": log_parser})


def of_lines(instance, *lines: str) -> Report:
    log = "\n".join([START_MARKER, "PASSED t.py::first", *lines, END_MARKER, ">>>>> Test Exit Code: 0", ""])
    return judge(instance, read_log(log, parser(instance)) or {})


@pytest.mark.parametrize("log_parser", ["parse_log_pytest", "parse_log_pytest_v2", "parse_log_pytest_options"])
@pytest.mark.parametrize("name", SPACED)
def test_full_names_with_white_space_are_found(name, log_parser):
    instance = spaced(name, log_parser=log_parser)
    assert of_lines(instance, f"PASSED {name}").resolved
    assert of_lines(instance, f"PASSED {name}\r").resolved
    assert not of_lines(instance, f"FAILED {name} - assert 1 - 2 == 3").resolved
    assert not of_lines(instance, f"PASSED {name}", f"ERROR {name}").resolved  # the last line counts
    assert not of_lines(instance).resolved


def test_names_that_are_equal_after_the_cut_are_told_apart():
    instance = spaced("t.py::x[a b]", "t.py::x[a c]", log_parser="parse_log_pytest")
    report = of_lines(instance, "FAILED t.py::x[a b] - no", "PASSED t.py::x[a c]")
    assert report.fail_to_pass == {"t.py::x[a b]": False, "t.py::x[a c]": True} and not report.resolved
    report = of_lines(instance, "PASSED t.py::x[a c]")
    assert report.fail_to_pass == {"t.py::x[a b]": False, "t.py::x[a c]": True} and not report.resolved


@pytest.mark.parametrize(
    ("log_parser", "name"),
    [
        ("parse_log_pytest_options", "t.py::x[/home/me/data.txt]"),  # shortened to /data.txt
        ("parse_log_matplotlib", "t.py::x[MouseButton.LEFT]"),  # made a number
        ("parse_log_pytest_v2", "t.py::x[\x7f[0m]"),  # taken for a colour
        ("parse_log_pytest", "tests/my files/t.py::x[a b] "),  # a log's line may have lost the end
    ],
)
def test_full_names_that_the_parser_changes_are_found(log_parser, name):
    instance = spaced(name, log_parser=log_parser)
    assert of_lines(instance, f"PASSED {name.strip()}").resolved
    assert not of_lines(instance, f"PASSED {name.strip()}", f"ERROR {name.strip()} - no").resolved
    assert not of_lines(instance).resolved


@pytest.mark.parametrize(
    ("log_parser", "names"),
    [
        ("parse_log_pytest_v2", ("t.py::x[a b]", "t.py::x[a  b]")),
        ("parse_log_pytest_options", ("t.py::x[/b]", "t.py::x[/a/b]")),
        ("parse_log_pytest", ("t.py::x[[c d] - e]", "t.py::x[[c d] - e] - f]")),
    ],
)
@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("order", [1, -1])
def test_names_that_the_parser_confuses_are_told_apart(log_parser, names, failing, order):
    instance = spaced(*names, log_parser=log_parser)
    lines = [f"FAILED {name} - no" if i == failing else f"PASSED {name}" for i, name in enumerate(names)]
    report = of_lines(instance, *lines[::order])
    assert list(report.fail_to_pass.values()) == [failing != 0, failing != 1] and not report.resolved


def test_names_that_are_cut_are_graded_as_swebench_grades_them():
    instance = spaced("t.py::x[a", log_parser="parse_log_pytest")
    assert parser(instance) is parse_pytest  # nothing added
    assert of_lines(instance, "FAILED t.py::x[a b] - no", "PASSED t.py::x[a c]").resolved  # the last line counts


def test_a_failure_whose_name_has_white_space_does_not_pass_where_only_failures_are_named():
    instance = dataclasses.replace(spaced("t.py::x[a b]", log_parser="parse_log_pytest"), eval_type="fail_only")
    assert of_lines(instance).resolved
    assert not of_lines(instance, "FAILED t.py::x[a b] - no").resolved
