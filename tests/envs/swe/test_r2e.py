"""R2E-Gym's rows and grading. `published` states the facts of the published grading, one by one, as the oracle."""

import itertools
import json
import re
import subprocess
from pathlib import Path

import pytest
from envs.swe.samples import CALC, FIXED, HIDDEN, FakeRuntime, FakeWorkspace, diff
from envs.swe.sandboxes import working_bubblewrap
from envs.swe.test_calls import block

from aem_jax.envs.swe import check, formats, r2e
from aem_jax.envs.swe.env import SweConfig, SweEnv
from aem_jax.envs.swe.repos import files_checkout
from aem_jax.envs.swe.sandbox import choose
from aem_jax.envs.swe.sandbox.workspace import EngineError, Limits, SandboxError, WorkspaceError

FIX = "f" * 40
TEST = HIDDEN.replace("def test_median_even", "def test_old():\n    assert median([]) == 0\n\n\ndef test_median_even")
EXPECTED = {"test_mean": "PASSED", "test_median_odd": "PASSED", "test_median_even": "PASSED", "test_old": "FAILED"}
SCRIPT = "python -m pytest -rA -p no:cacheprovider r2e_tests\n"


def hunk(old, new, *lines, section=""):
    ranges = [dict(zip(("start", "length"), part)) for part in (old, new)]
    kinds = {" ": "context", "+": "added", "-": "deleted", "\\": "note"}
    return {
        "descriptor": {"old_range": ranges[0], "new_range": ranges[1], "section": section},
        "line_group": {"all_lines": [{"content": line[1:], "type": kinds[line[0]]} for line in lines]},
    }


def file_diff(path, *hunks, misc_line=None, minus=None, plus=None):
    return {
        "old_file_content": "",
        "new_file_content": "",
        "header": {"file": {"path": path}, "misc_line": misc_line},
        "index_line": {"old_commit_hash": "1" * 7, "new_commit_hash": "2" * 7, "mode": "" if misc_line else "100644"},
        "is_binary_file": False,
        "binary_line": None,
        "minus_file": {"path": minus or f"a/{path}"},
        "plus_file": {"path": plus or f"b/{path}"},
        "hunks": list(hunks),
    }


FIXING = file_diff(
    "calc.py",
    hunk(
        (4, 4),
        (4, 5),
        " ",
        " def median(xs):",
        "     s = sorted(xs)",
        "-    return s[len(s) // 2]",
        "+    middle = len(s) // 2",
        "+    return s[middle] if len(s) % 2 else (s[middle - 1] + s[middle]) / 2",
        " ",  # the end of the published text: beyond the hunk's counts
        section="def mean(xs):",
    ),
)
TESTING = file_diff("tests/test_calc.py", hunk((1, 1), (1, 1), "-a", "+b"))

PUBLISHED = {
    "repo_name": "calc",
    "docker_image": "own/calc_final:ffff",
    "commit_hash": FIX,
    "parsed_commit_content": json.dumps({"file_diffs": [TESTING, FIXING], "old_commit_hash": f"{FIX}^"}),
    "execution_result_content": json.dumps({"test_file_names": ["test_1.py"], "test_file_codes": [TEST]}),
    "problem_statement": "Read this:\n[ISSUE]\nmedian() is wrong.\n[/ISSUE]\n",
    "expected_output_json": json.dumps(EXPECTED),
    "modified_files": ["calc.py"],
    "prompt": "Write an issue.",
    "num_non_test_files": 1,
}


def instance(**change) -> r2e.R2EInstance:
    """The instance of the row, with changed columns."""
    return r2e.from_row(PUBLISHED | change)


def published(log: str, expected: dict[str, str]) -> float:
    """The reward of the published grading, slowly: 1 or 0. It raises KeyError for a test without an expectation."""
    log = re.sub("\x1b" + r"\[[0-9;]*m", "", log).replace("\r", "")
    ran = {}
    if "short test summary info" in log:
        for line in log.split("short test summary info")[1].strip().split("\n"):
            pieces = line.split("::")[1:]
            if "PASSED" in line:
                ran[".".join(pieces)] = "PASSED"
            elif "FAILED" in line:
                ran[".".join(pieces).split(" - ")[0]] = "FAILED"
            elif "ERROR" in line:
                ran[".".join(pieces).split(" - ")[0]] = "ERROR"
    cut = [
        {re.sub("\x1b" + r"\[\d+m", "", key).split(" - ")[0]: statuses[key] for key in sorted(statuses)}
        for statuses in (ran, expected)
    ]
    if len(cut[0]) != len(cut[1]):
        return 0.0
    try:
        return float(all(cut[1][name] == status for name, status in cut[0].items()))
    except KeyError:
        return 0.0


def log_of(*lines: str) -> str:
    return "\n".join(
        [
            "===== test session starts =====",
            "r2e_tests/test_1.py ..F [100%]",
            "===== short test summary info =====",
            *lines,
            "===== 1 failed, 2 passed in 0.12s =====",
            "",
        ]
    )


PASS = "PASSED r2e_tests/test_1.py::T::test_a"
FAIL = "FAILED r2e_tests/test_1.py::test_b[x - y] - AssertionError: assert 1 == 2"
ERR = "ERROR r2e_tests/test_2.py - ImportError: no module named calc"
LINES = {
    "as expected": [PASS, FAIL, ERR],
    "another order": [ERR, FAIL, PASS],
    "coloured": [
        f"\x1b[32mPASSED\x1b[0m {PASS.split(' ')[1]}",
        "\x1b[31mFAILED\x1b[0m r2e_tests/test_1.py::\x1b[1mtest_b[x\x1b[0m - y] - AssertionError",
        ERR,
    ],
    "carriage returns": [f"{PASS}\r", f"{FAIL}\r", f"{ERR}\r"],
    "one test missing": [PASS, ERR],
    "one more test": [PASS, FAIL, ERR, "PASSED r2e_tests/test_1.py::test_c"],
    "another test instead": [PASS, FAIL, "PASSED r2e_tests/test_1.py::test_c"],
    "expected failure passes": [PASS, FAIL.replace("FAILED", "PASSED").split("] -")[0] + "]", ERR],
    "failure instead of success": [f"{PASS.replace('PASSED', 'FAILED')} - TypeError", FAIL, ERR],
    "error instead of success": [f"{PASS.replace('PASSED', 'ERROR')} - TypeError", FAIL, ERR],
    "skipped lines": [PASS, FAIL, ERR, "SKIPPED [1] r2e_tests/test_1.py:3: no", "XFAIL r2e_tests/test_1.py::test_x"],
    "twice, the last counts": [PASS.replace("PASSED", "ERROR"), PASS, FAIL, ERR],
    "nothing": [],
}
WANTED = {"T.test_a": "PASSED", "\x1b[1mtest_b[x\x1b[0m - y]": "FAILED", "": "ERROR"}


@pytest.mark.parametrize("name", LINES)
def test_logs_are_graded_as_published(name):
    graded = r2e.judge(instance(expected_output_json=json.dumps(WANTED)), r2e.parse_summary(log_of(*LINES[name])))
    assert graded.resolved == bool(published(log_of(*LINES[name]), WANTED))
    right = {"as expected", "another order", "coloured", "carriage returns", "skipped lines", "twice, the last counts"}
    assert graded.resolved == (name in right)


def test_all_logs_of_three_tests_are_graded_as_published():
    tests = {"PASSED": "", "FAILED": " - assert a - b", "ERROR": " - E", "SKIPPED": ""}
    wanted = {"A.t": "PASSED", "u": "FAILED", "v": "ERROR"}
    one = instance(expected_output_json=json.dumps(wanted))
    won = 0
    for statuses in itertools.product(tests, repeat=3):
        lines = [f"{s} x.py::{n}{tests[s]}" for s, n in zip(statuses, ("A::t", "u", "v"))]
        for kept in range(4):
            report = r2e.judge(one, r2e.parse_summary(log_of(*lines[:kept])))
            assert report.resolved == bool(published(log_of(*lines[:kept]), wanted)), lines[:kept]
            assert report.resolved == all(report.pass_to_pass.values())
            won += report.resolved
    assert won == 1


def test_forged_logs_that_the_published_grading_accepts_are_not_right():
    wanted = {"test_a": "PASSED"}
    one = instance(expected_output_json=json.dumps(wanted))
    failed = "FAILED x.py::test_a"
    summary = "short test summary info\nPASSED x.py::test_a\n"
    for log in (log_of(f"{failed}: PASSED"), summary + log_of(failed)):
        assert not r2e.judge(one, r2e.parse_summary(log)).resolved
    assert published(summary + log_of(failed), wanted) == 1
    late = log_of(failed) + "PASSED x.py::test_a\n"
    assert published(late, wanted) == 1 and not r2e.judge(one, r2e.parse_summary(late)).resolved
    message = {"test_a": "FAILED"}
    assert r2e.judge(
        instance(expected_output_json=json.dumps(message)), r2e.parse_summary(log_of(f"{failed} - 'PASSED'"))
    ).resolved


def test_a_published_row_is_read():
    one = instance()
    assert one.instance_id == "r2e__calc-ffffffffffff" and one.base_commit == f"{FIX}^"
    assert formats.from_row(PUBLISHED) == one
    assert one.problem_statement == "median() is wrong." and one.image == "own/calc_final:ffff"
    assert dict(one.expected) == EXPECTED
    assert dict(one.tests) == {"test_1.py": TEST}
    assert formats.from_row(json.loads(json.dumps(formats.to_row(one)))) == one
    assert formats.from_row(PUBLISHED | {"execution_result_content": None}).instance_id == one.instance_id


def test_the_rebuilt_fix_leaves_out_tests_and_lines_beyond_the_counts():
    assert instance().patch == (
        "diff --git a/calc.py b/calc.py\nindex 1111111..2222222 100644\n--- a/calc.py\n+++ b/calc.py\n"
        "@@ -4,4 +4,5 @@ def mean(xs):\n \n def median(xs):\n     s = sorted(xs)\n-    return s[len(s) // 2]\n"
        "+    middle = len(s) // 2\n+    return s[middle] if len(s) % 2 else (s[middle - 1] + s[middle]) / 2\n"
    )
    new = file_diff(
        "new.py",
        hunk((0, 0), (1, None), "+x = 1", "\\No newline at end of file"),
        misc_line="new file mode 100644",
        minus="/dev/null",
    )
    assert r2e.gold_patch({"file_diffs": [new, file_diff("a/test_b.py"), file_diff("a/b_test.py")]}) == (
        "diff --git a/new.py b/new.py\nnew file mode 100644\nindex 1111111..2222222\n--- /dev/null\n+++ b/new.py\n"
        "@@ -0,0 +1 @@\n+x = 1\n\\ No newline at end of file\n"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"docker_image": None}, "columns of R2E-Gym, docker_image missing; got"),
        ({"parsed_commit_content": None}, "columns of R2E-Gym, parsed_commit_content missing"),
        ({"parsed_commit_content": "{"}, "a JSON object in parsed_commit_content, got '{'"),
        ({"parsed_commit_content": '{"file_diffs": [{}]}'}, "got another form: KeyError 'header'"),
        ({"expected_output_json": "{}"}, "at least one test and its status in expected_output_json, got '{}'"),
        ({"expected_output_json": "[]"}, "a JSON object in expected_output_json, got list"),
        ({"commit_hash": "v1.0"}, "40 hex digits in commit_hash, got 'v1.0'"),
        ({"execution_result_content": '{"test_file_names": ["a"]}'}, "got 1 and 0"),
    ],
)
def test_rows_that_cannot_be_read_say_why(tmp_path, change, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(PUBLISHED | change) + "\n")
    with pytest.raises(ValueError, match=message) as raised:
        formats.read_instances(path)
    assert f"{path} line 1: " in str(raised.value)


def test_a_folder_of_datasets_is_read_or_refused(tmp_path):
    folder = tmp_path / "rows"
    folder.mkdir()
    with pytest.raises(ValueError, match=r"found no state\.json"):
        formats.read_instances(folder)
    (folder / "state.json").write_text('{"_data_files": [{"filename": "data.arrow"}]}')
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train"]}')
    with pytest.raises(ValueError, match=r"the folder of one split"):
        formats.read_instances(tmp_path)
    arrow = pytest.importorskip("pyarrow", reason="reads Arrow")
    table = arrow.Table.from_pylist([PUBLISHED])
    with arrow.OSFile(str(folder / "data.arrow"), "wb") as sink, arrow.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    assert formats.read_instances(folder) == [instance()]
    (folder / "data.arrow").write_bytes(b"junk")
    with pytest.raises(ValueError, match=r"expected streams of Arrow"):
        formats.read_instances(folder)


def image_checkout(_, folder: Path) -> None:
    """What a checkout from an image has: untracked files, hidden tests among them."""
    files_checkout(CALC | {"deleted.py": ""})(instance(), folder)
    more = {"r2e_tests/test_1.py": TEST, "run_tests.sh": SCRIPT, ".venv/lib/big.bin": "x" * 2**21, "odd [*]": "x"}
    for name, text in more.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def calc_patch(text: str) -> str:
    return diff(CALC, CALC | {"calc.py": text})


EDITED_TESTS = diff({}, {"r2e_tests/test_1.py": "def test_old():\n    assert 0\n", "new.py": "x = 1\n"})
# the hidden test passes if this file stays beside it
CONFTEST = diff(
    {},
    {"r2e_tests/conftest.py": "import calc\n\nold = calc.median\ncalc.median = lambda x: 2.5 if x[3:] else old(x)\n"},
)
EDITED_SCRIPT = diff({}, {"run_tests.sh": "echo short test summary info\n"})
PATCHES = {
    "gold": (None, True),
    "empty": ("", False),
    "wrong": (calc_patch(FIXED.replace("/ 2\n", "/ 3\n")), False),
    "fixes what is expected to fail": (calc_patch(FIXED.replace("s = sorted(xs)\n", "s = sorted(xs) or [0]\n")), False),
    "junk": ("not a diff\n", False),
    "writes tests": (EDITED_TESTS, False),
    "gold, writes tests": (EDITED_TESTS + calc_patch(FIXED), True),
    "writes a conftest.py": (CONFTEST, False),
    "writes the script": (EDITED_SCRIPT, False),
}


@pytest.mark.parametrize("name", PATCHES)
def test_a_patch_is_right_if_all_tests_have_the_expected_status(tmp_path, name):
    patch, right = PATCHES[name]
    report = formats.grade(
        instance(),
        instance().patch if patch is None else patch,
        FakeRuntime(tmp_path),
        files_checkout(CALC) if name == "gold" else image_checkout,
        limits=Limits(seconds=60),
    )
    assert report.resolved == right, report.log
    assert report.applied == (name != "junk")
    assert list(tmp_path.iterdir()) == []


def test_without_hidden_tests_there_is_no_verdict(tmp_path):
    one = instance(execution_result_content=None)
    with pytest.raises(SandboxError, match="expected the hidden tests of 'r2e__calc-ffffffffffff'"):
        formats.grade(one, "", FakeRuntime(tmp_path), files_checkout(CALC), limits=Limits(seconds=60))
    assert not formats.grade(one, None, FakeRuntime(tmp_path), files_checkout(CALC), limits=Limits()).resolved


@pytest.mark.parametrize("checkout", [image_checkout, files_checkout(CALC)], ids=["of the image", "of the row"])
def test_a_patch_that_leaves_no_room_for_the_hidden_tests_is_unsolved(tmp_path, monkeypatch, checkout):
    def fails(self, path, data):
        raise raised("No space left on device")

    if checkout is image_checkout:
        monkeypatch.setattr(r2e, "_PLACE", "echo No space left on device; exit 1")
    monkeypatch.setattr(FakeWorkspace, "write", fails)
    raised = WorkspaceError
    report = formats.grade(instance(), instance().patch, FakeRuntime(tmp_path), checkout, limits=Limits(seconds=60))
    assert report.applied and not report.resolved and "No space left on device" in report.log
    raised = EngineError
    if checkout is not image_checkout:
        with pytest.raises(EngineError):
            formats.grade(instance(), "", FakeRuntime(tmp_path), checkout, limits=Limits(seconds=60))


def test_a_timeout_is_unsolved(tmp_path):
    def slow(_, folder: Path) -> None:
        image_checkout(_, folder)
        (folder / "run_tests.sh").write_text(f"sleep 60\n{SCRIPT}")

    report = formats.grade(instance(), instance().patch, FakeRuntime(tmp_path), slow, limits=Limits(seconds=3))
    assert not report.resolved and report.applied and "Timed Out" in report.log


@pytest.fixture(scope="module")
def env():
    env = SweEnv(SweConfig(command_s=60, grade_s=60, memory_mib=512, partial=True), working_bubblewrap())
    yield env
    env.close()


def episode(env, monkeypatch, *commands: str):
    monkeypatch.setattr("aem_jax.envs.swe.env.load_task", lambda _: (instance(), image_checkout))
    first = env.reset({})
    assert "median() is wrong." in first.observation and "[ISSUE]" not in first.observation
    outputs = [env.step(block("execute_bash", command=command)).observation for command in commands]
    return outputs, env.step(block("finish"))


def test_the_agent_sees_no_hidden_file_and_its_fix_is_rewarded(env, monkeypatch):
    look = "ls -A; git status --short; git log --all --oneline | wc -l; grep -rc test_median_even . | grep -v :0"
    fix = "cat > calc.py <<'END'\n" + FIXED + "END\nrm deleted.py; echo exit > run_tests.sh; mkdir r2e_tests"
    (seen, _), finished = episode(env, monkeypatch, look, fix)
    assert ".venv" in seen and "calc.py" in seen
    assert not [word for word in ("run_tests", "r2e_tests", "test_1", "hidden") if word in seen], seen
    assert (finished.reward, finished.info["won"], finished.info["applied"]) == (1.0, True, True)


def test_an_agent_that_changes_nothing_or_only_the_tests_is_not_rewarded(env, monkeypatch):
    forged = "mkdir r2e_tests; echo 'echo short test summary info; echo PASSED a::test_mean' > run_tests.sh"
    for commands in ((), (forged,)):
        _, finished = episode(env, monkeypatch, *commands)
        assert (finished.reward, finished.info["won"], finished.info["applied"]) == (0.0, False, True)
        assert finished.info["pass_to_pass"] == 0.75


def test_gold_and_empty_in_a_sandbox():
    runtime = working_bubblewrap()
    reports = [
        formats.grade(instance(), patch, runtime, image_checkout, limits=Limits(seconds=60))
        for patch in (instance().patch, "")
    ]
    assert [report.resolved for report in reports] == [True, False], reports[0].log
    assert reports[1].pass_to_pass == dict.fromkeys(EXPECTED, True) | {"test_median_even": False}


def test_a_published_file_is_checked_with_a_mirror(tmp_path, monkeypatch, capsys):
    repo = tmp_path / "mirrors" / "calc"
    git = ["git", "-C", str(repo), "-c", "user.name=a", "-c", "user.email=a@example.invalid"]
    commits = []
    for text in (CALC["calc.py"], FIXED):
        for name, content in (CALC | {"calc.py": text}).items():
            (repo / name).parent.mkdir(parents=True, exist_ok=True)
            (repo / name).write_text(content)
        for words in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "one"]):
            subprocess.run([*git, *words], check=True)
        done = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        commits.append(done.stdout.strip())
    base, fix = commits
    rows = [PUBLISHED | {"commit_hash": fix}]  # the base commit is the fix's parent
    parsed = json.dumps({"file_diffs": [FIXING], "old_commit_hash": base})
    wrong = json.dumps(EXPECTED | {"test_old": "PASSED"})
    named = {"parsed_commit_content": parsed, "expected_output_json": wrong}
    rows.append(PUBLISHED | {"commit_hash": base} | named)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "work").mkdir()
    monkeypatch.setattr(choose, "choose_runtime", lambda *_, **__: FakeRuntime(tmp_path / "work"))
    assert check.main([str(tmp_path / "rows.jsonl"), "--repos", str(tmp_path / "mirrors"), "--json"]) == 1
    problems = json.loads(capsys.readouterr().out)["problems"]
    (message,) = problems.pop(f"r2e__calc-{base[:12]}")
    assert message.endswith("its own patch does not solve it; 1 tests do not pass, ['test_old']") and not problems
