"""Rows of SWE-rebench, SWE-smith, SWE-Gym and SWE-bench 4.x: of our own making, in the published columns."""

import json
import subprocess
import sys
from types import ModuleType
from typing import Any

import pytest
from envs.swe.samples import CALC, FIXED, GOLD, ROW, TEST_PATCH, FakeRuntime, diff
from envs.swe.sandboxes import working_bubblewrap
from envs.swe.test_calls import block

from aem_jax.envs.swe import check, formats, variants
from aem_jax.envs.swe.env import SweConfig, SweEnv
from aem_jax.envs.swe.grading import judge
from aem_jax.envs.swe.instance import Resources, SweBenchInstance
from aem_jax.envs.swe.log_parsers import parse_pytest_verbose
from aem_jax.envs.swe.repos import mirror_checkout
from aem_jax.envs.swe.sandbox import choose
from aem_jax.envs.swe.sandbox.workspace import Limits

LIMITS = Limits(seconds=60)
TESTS = {"FAIL_TO_PASS": ["tests/test_calc.py::test_median_even"]}
TESTS["PASS_TO_PASS"] = ["tests/test_calc.py::test_mean", "tests/test_calc.py::test_median_odd"]

TEST, NEW = "tests/test_calc.py", "tests/new.py"

REBENCH = {
    "instance_id": "own__calc-2",
    "repo": "own/calc",
    "base_commit": "a" * 40,
    "created_at": 1609298073000,
    "patch": GOLD,
    "test_patch": f"diff --git a/{TEST} b/{TEST}\n{TEST_PATCH}diff --git a/{NEW} b/{NEW}\nnew file mode 100644\n"
    f"{diff({}, {NEW: 'y = 2'})}\n",
    "problem_statement": "median() is wrong for lists of even length.",
    "pr_description": "",
    "interface": "",
    "language": "python",
    "meta": {"llm_metadata": []},
    **TESTS,
    "install_config": {
        "base_image_name": "python:3.11",
        "docker_specs": None,
        "install": ["pip install -e ."],
        "log_parser": "parse_log_pytest",
        "log_parsers": None,
        "test_cmd": ["true", "python -m pytest -rA -p no:cacheprovider tests/test_calc.py"],
    },
    "image_name": "docker.io/own/calc:2",
}

# SWE-smith's repository has no bug; its tests contain those that fail with the bug.
SOUND = CALC | {"conftest.py": "", "calc.py": FIXED, "tests/test_calc.py": CALC["tests/test_calc.py"]}
SOUND["tests/test_even.py"] = (
    "from calc import median\n\n\ndef test_median_even():\n    assert median([1, 2, 3, 4]) == 2.5\n"
)
BUG = diff({"calc.py": FIXED}, {"calc.py": CALC["calc.py"]})
SMITH = {
    "instance_id": "own__calc.12345678.lm_rewrite__abcdefgh",
    "repo": "swesmith/own__calc.12345678",
    "patch": BUG,
    "FAIL_TO_PASS": ["tests/test_even.py::test_median_even"],
    "PASS_TO_PASS": TESTS["PASS_TO_PASS"],
    "image_name": "swesmith.x86_64.own__calc.12345678",
    "problem_statement": "median() is wrong for lists of even length.",
}


@pytest.fixture(scope="module")
def mirrors(tmp_path_factory):
    """Mirrors of both repositories, and the commit of SWE-rebench's."""
    folder = tmp_path_factory.mktemp("mirrors")
    commits = []
    for name, files in (("own__calc", CALC), ("swesmith__own__calc.12345678", SOUND)):
        repo = folder / name
        for path, text in files.items():
            (repo / path).parent.mkdir(parents=True, exist_ok=True)
            (repo / path).write_text(text)
        git = ["git", "-C", str(repo), "-c", "user.name=a", "-c", "user.email=a@example.invalid"]
        for words in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "base"]):
            subprocess.run([*git, *words], check=True)
        done = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        commits.append(done.stdout.strip())
    return folder, commits[0]


def row_of(name: str, mirrors) -> dict:
    if name == "SWE-smith":
        return SMITH
    first = {"version": "1.0", "environment_setup_commit": mirrors[1]} if name == "SWE-rebench, first release" else {}
    return REBENCH | {"base_commit": mirrors[1]} | first


FORMATS = ("SWE-rebench V2", "SWE-rebench, first release", "SWE-smith")


def git_diff(before: dict[str, str], after: dict[str, str]) -> str:
    """A patch with git's headers, which `git apply --recount` needs between files."""
    patch = diff(before, after)
    (path,) = {name for name in {**before, **after} if before.get(name) != after.get(name)}
    new = "" if path in before else "new file mode 100644\n"
    return f"diff --git a/{path} b/{path}\n{new}{patch}"


EDITS_TESTS = git_diff(CALC, CALC | {"tests/test_calc.py": "def test_mean():\n    pass\n"})
PATCHES = {
    "gold": (None, True),
    "empty": ("", False),
    "wrong": (diff(CALC, CALC | {"calc.py": FIXED.replace("/ 2\n", "/ 3\n")}), False),
    "breaks other tests": (diff(CALC, CALC | {"calc.py": FIXED.replace("sum(xs) / len(xs)", "0")}), False),
    "no test can run": (diff(CALC, CALC | {"calc.py": "def mean(xs:\n"}), False),
    "junk": ("not a diff\n", False),
    "edits the tests": (EDITS_TESTS, False),
    "gold, edits the tests": (GOLD + EDITS_TESTS, True),
    "writes the hidden test": (
        git_diff({}, {"tests/test_even.py": "def test_median_even():\n    pass\n"}),
        False,
    ),
    "writes a new test of the test patch": (git_diff({}, {"tests/new.py": "x = 1\n"}), False),
    "gold, writes a new test of the test patch": (GOLD + git_diff({}, {"tests/new.py": "x = 1\n"}), True),
    "puts a file in place of the hidden test's folder": (
        f"diff --git a/{TEST} b/{TEST}\ndeleted file mode 100644\n{diff({TEST: CALC[TEST]}, {})}"
        + git_diff({}, {"tests": "x = 1\n"}),
        False,
    ),
    "gold, writes the hidden test": (GOLD + git_diff({}, {"tests/test_even.py": "x = 1\n"}), True),
}


@pytest.mark.parametrize("patch", PATCHES)
@pytest.mark.parametrize("form", FORMATS)
def test_patches_are_graded(tmp_path, mirrors, form, patch):
    text, right = PATCHES[patch]
    instance = formats.from_row(row_of(form, mirrors))
    checkout = mirror_checkout(mirrors[0])
    graded = formats.grade(
        instance, instance.patch if text is None else text, FakeRuntime(tmp_path), checkout, limits=LIMITS
    )
    assert graded.resolved == right, graded.log
    assert graded.applied == (patch != "junk")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("form", FORMATS)
def test_an_episode_in_a_sandbox(mirrors, form, monkeypatch):
    instance = formats.from_row(json.loads(json.dumps(formats.to_row(formats.from_row(row_of(form, mirrors))))))
    env = SweEnv(SweConfig(command_s=60, grade_s=60, memory_mib=512), working_bubblewrap())
    monkeypatch.setattr("aem_jax.envs.swe.env.load_task", lambda _: (instance, mirror_checkout(mirrors[0])))
    look = "git status --short; git log --all --oneline | wc -l; grep -rc test_median_even . | grep -v :0; cat calc.py"
    fix = "cat > calc.py <<'END'\n" + FIXED + "END\nmkdir -p tests; echo 'x = 1' > tests/test_even.py"
    for command, won in (("true", False), (fix, True)):
        assert "median() is wrong" in env.reset({}).observation
        seen = env.step(block("execute_bash", command=look)).observation
        assert seen.startswith("1\ndef mean") and "s[len(s) // 2]" in seen, seen  # the bug, no history, no hidden test
        env.step(block("execute_bash", command=command))
        finished = env.step(block("finish"))
        assert (finished.info["won"], finished.info["applied"]) == (won, True), finished.info
    env.close()


def test_a_hidden_file_is_in_no_object_of_the_agents_repository(mirrors, monkeypatch):
    instance = formats.from_row(SMITH)
    env = SweEnv(SweConfig(command_s=60, memory_mib=512), working_bubblewrap())
    monkeypatch.setattr("aem_jax.envs.swe.env.load_task", lambda _: (instance, mirror_checkout(mirrors[0])))
    env.reset({})
    search = (
        "git cat-file --batch-all-objects --batch | grep -c -e test_median_even -e 'middle = len'; ls -A tests .git"
    )
    seen = env.step(block("execute_bash", command=search)).observation
    assert seen.startswith("0\n") and "hidden" not in seen and "test_even" not in seen, seen
    env.close()


def test_published_files_are_checked_with_mirrors(tmp_path, mirrors, monkeypatch, capsys):
    rows = [row_of(form, mirrors) | {"instance_id": f"own__calc-{i}"} for i, form in enumerate(FORMATS)]
    rows.append(rows[0] | {"instance_id": "own__calc-7", "patch": EDITS_TESTS})
    rows.append(
        rows[0] | {"instance_id": "own__calc-8", "install_config": {"test_cmd": "x", "log_parser": "parse_log_r"}}
    )
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "work").mkdir()
    monkeypatch.setattr(choose, "choose_runtime", lambda *_, **__: FakeRuntime(tmp_path / "work"))
    assert check.main([str(path), "--repos", str(mirrors[0]), "--json"]) == 1
    problems = json.loads(capsys.readouterr().out)["problems"]
    assert set(problems) == {"own__calc-7", "own__calc-8"}
    assert "its own patch does not solve it" in problems["own__calc-7"][0]
    assert "parse_log_r" in problems["own__calc-8"][0]


def test_v2_wants_every_test_passed_and_stops_at_the_first_failing_command(tmp_path, mirrors):
    instance = formats.from_row(row_of("SWE-rebench V2", mirrors))
    assert isinstance(instance, variants.RebenchInstance)
    fine = dict.fromkeys([*instance.fail_to_pass, *instance.pass_to_pass], "PASSED")
    assert judge(instance, fine).resolved
    for status in ("SKIPPED", "XFAIL", "FAILED", "ERROR"):
        assert not judge(instance, fine | {instance.pass_to_pass[0]: status}).resolved
    assert instance.image == "docker.io/own/calc:2" and instance.workdir == "/calc"
    stopped = REBENCH["install_config"] | {"test_cmd": ["false", REBENCH["install_config"]["test_cmd"][1]]}
    instance = formats.from_row(row_of("SWE-rebench V2", mirrors) | {"install_config": json.dumps(stopped)})
    report = formats.grade(instance, GOLD, FakeRuntime(tmp_path), mirror_checkout(mirrors[0]), limits=LIMITS)
    assert not report.resolved and "test session starts" not in report.log


def test_v2_applies_patches_as_published(tmp_path, mirrors):
    """Wrong counts and other white space are accepted; fuzz is not."""
    instance = formats.from_row(row_of("SWE-rebench V2", mirrors))
    checkout, runtime = mirror_checkout(mirrors[0]), FakeRuntime(tmp_path)
    spaces = GOLD.replace(" def median(xs):", " def  median(xs):")
    counts = GOLD.replace("+4,5 @@", "+4,9 @@")
    fuzzy = GOLD.replace(" def median(xs):\n", " def median(ys):\n")
    assert spaces != GOLD != counts
    for patch, applies in ((spaces, True), (counts, True), (fuzzy, False)):
        assert formats.grade(instance, patch, runtime, checkout, limits=LIMITS).applied == applies, patch


def test_a_row_of_swe_smith_is_read():
    instance = formats.from_row(SMITH)
    assert isinstance(instance, variants.SmithInstance)
    assert instance.image == "jyangballin/swesmith.x86_64.own_1776_calc.12345678" and instance.workdir == "/testbed"
    assert instance.bug_patch == BUG and instance.hidden == ("tests/test_even.py",)
    assert set(instance.test_files) == {"tests/test_calc.py"}
    assert "pytest --disable-warnings --color=no --tb=no --verbose tests/test_calc.py tests/test_even.py" in (
        instance.eval_script
    )
    named = formats.from_row(SMITH | {"image_name": "own/x:1", "FAIL_TO_PASS": '["a.py::b"]'})
    assert named.image == "own/x:1"


def test_the_verbose_parser_reads_all_forms_of_a_line():
    log = """
tests/a.py::test_one PASSED                                              [  5%]
tests/a.py::test_two[x y] FAILED [ 10%]
[gw1] [ 15%] PASSED tests/a.py::test_three
[gw0] ERROR tests/a.py::test_four
tests/a.py::test_five SKIPPED (no reason) [ 20%]
PASSED tests/b.py::test_six
FAILED tests/b.py::test_seven - assert 1 == 2
SKIPPED [1] tests/b.py:3: reason
tests/a.py::test_eight PASSED [ 30%] in 0.12s
PASSED tests/b.py::test_nine in 3s
=========================== 5 PASSED ===========================
"""
    assert parse_pytest_verbose(log) == {
        "tests/a.py::test_one": "PASSED",
        "tests/a.py::test_two[x y]": "FAILED",
        "tests/a.py::test_three": "PASSED",
        "tests/a.py::test_four": "ERROR",
        "tests/b.py::test_six": "PASSED",
        "tests/b.py::test_seven": "FAILED",
        "tests/a.py::test_eight": "PASSED",
        "tests/b.py::test_nine": "PASSED",
    }


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (REBENCH | {"image_name": None}, "columns of SWE-rebench V2, image_name missing; got"),
        (REBENCH | {"install_config": {}}, "bash commands in install_config's test_cmd, got None"),
        (REBENCH | {"install_config": {"test_cmd": ["pytest"]}}, "text in install_config's log_parser, got None"),
        (REBENCH | {"install_config": "[]"}, r"an object in install_config, got \[\]"),
        (REBENCH | {"repo": "calc"}, "repo as <owner>/<name>, got 'calc'"),
        (REBENCH | {"repo": "own/.."}, "repo as <owner>/<name>, got 'own/..'"),
        ({**REBENCH, "environment_setup_commit": "x", "test_patch": ""}, "of SWE-rebench, test_patch missing; got"),
        (SMITH | {"problem_statement": ""}, "columns of SWE-smith, problem_statement missing"),
        (SMITH | {"FAIL_TO_PASS": ["TestX"]}, r"tests of pytest .* got 'TestX'; rows of other languages"),
        (SMITH | {"FAIL_TO_PASS": ["../x.py::t"]}, r"tests of pytest .* got '\.\./x.py::t'"),
        (SMITH | {"FAIL_TO_PASS": []}, "at least one test in FAIL_TO_PASS"),
        (SMITH | {"patch": "GIT binary patch\n"}, "patch: expected a patch of text, which can be reversed"),
        ({"text": "a"}, r"known by their columns: R2E-Gym \(.*SWE-smith \(image_name\).*; got \['text'\]"),
        (
            ROW | {"resources": {"gpus": 1}},
            "object of cpus, memory_mib, disk_mib, command_s, grade_s in resources, got",
        ),
        (ROW | {"resources": {"cpus": 0}}, "a number above 0 for cpus in resources, got 0"),
        (ROW | {"resources": {"memory_mib": 1.5}}, "an integer above 0 for memory_mib in resources, got 1.5"),
        (ROW | {"resources": {"memory_mib": 3}}, "memory_mib of at least 64"),
        (ROW | {"resources": "{"}, "resources: expected JSON"),
    ],
)
def test_rows_that_cannot_be_read_say_why(tmp_path, row, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=message) as raised:
        formats.read_instances(path)
    assert f"{path} line 1: " in str(raised.value)


@pytest.mark.parametrize("form", [*FORMATS, "SWE-bench 5.x"])
def test_a_rows_resources_are_its_limits(mirrors, form):
    row = (ROW if form == "SWE-bench 5.x" else row_of(form, mirrors)) | {
        "resources": {"cpus": 4, "memory_mib": 16384, "disk_mib": 30720.0, "grade_s": 600, "command_s": None}
    }
    instance = formats.from_row(row)
    assert instance.resources == Resources(cpus=4.0, memory_mib=16384, disk_mib=30720, grade_s=600.0)
    assert formats.from_row(json.loads(json.dumps(formats.to_row(instance)))) == instance
    command, grading = (
        make(Limits(seconds=90)) for make in (instance.resources.of_command, instance.resources.of_grading)
    )
    assert (command.cpus, command.memory_mib, command.disk_mib, command.seconds) == (4.0, 16384, 30720, 90)
    assert grading.seconds == 600
    used = []

    class Opened:
        name = "none"

        def open(self, instance, checkout, *, limits):
            used.append(limits)
            raise OSError("enough")

    with pytest.raises(OSError, match="enough"):
        formats.grade(instance, "", Opened(), mirror_checkout(mirrors[0]), limits=Limits())  # pyright: ignore
    env = SweEnv(SweConfig(), Opened())  # pyright: ignore[reportArgumentType]
    with pytest.raises(OSError, match="enough"):
        env.reset({"instance": formats.to_row(instance), "repos": str(mirrors[0])})
    assert [(limits.cpus, limits.disk_mib, limits.seconds) for limits in used] == [(4, 30720, 600), (4, 30720, 90)]


OLD = {name: ROW[name] for name in ROW if name not in ("image", "log_parser", "eval_type", "eval_script")}


def specs(monkeypatch, package: str, scripts: str, repo: str = "own/calc") -> None:
    """Puts a package with the published tables in place of an installed one."""

    def parse_log_pytest(log, test_spec):
        raise AssertionError("the built-in parser is used")

    def make(instance, specs, env_name, folder, base, test_patch):
        assert (env_name, folder, base, test_patch) == ("testbed", "/testbed", OLD["base_commit"], OLD["test_patch"])
        return ["cd /testbed", ": '>>>>> Start Test Output'", specs["test_cmd"], ": '>>>>> End Test Output'"]

    tables: dict[str, dict[str, Any]] = {
        "constants": {"MAP_REPO_VERSION_TO_SPECS": {repo: {"1.0": {"test_cmd": "pytest -rA"}}}}
    }
    tables["log_parsers"] = {"MAP_REPO_TO_PARSER": {repo: parse_log_pytest}}
    modules = {f"{package}.harness.{name}": table for name, table in tables.items()}
    for name, values in (modules | {f"{package}.harness.{scripts}": {"make_eval_script_list": make}}).items():
        module = ModuleType(name)
        module.__dict__.update(values)
        for parent in (name.rsplit(".", i)[0] for i in range(1, name.count(".") + 1)):
            monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
        monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.parametrize(
    ("package", "scripts", "image"),
    [
        ("swebench", "test_spec.create_scripts", "swebench/sweb.eval.x86_64.own_1776_calc-1:latest"),
        ("swegym", "test_spec", "xingyaoww/sweb.eval.x86_64.own_s_calc-1:latest"),
    ],
)
def test_rows_of_release_4_and_swe_gym_take_their_commands_from_an_installed_package(
    monkeypatch, package, scripts, image
):
    hide(monkeypatch)
    specs(monkeypatch, package, scripts)
    instance = formats.from_row(OLD)
    assert type(instance) is SweBenchInstance and instance.image == image
    assert instance.log_parser == "parse_log_pytest" and instance.eval_type == "pass_and_fail"
    assert "pytest -rA" in instance.eval_script.split("\n")
    assert formats.from_row(OLD | {"image_name": None, "docker_image": "own/x"}).image == "own/x"
    monkeypatch.undo()
    assert formats.from_row(formats.to_row(instance)) == instance  # a server needs no package


def hide(monkeypatch) -> None:
    for name in [*sys.modules, "swebench", "swegym"]:
        if name.split(".")[0] in ("swebench", "swegym"):
            monkeypatch.setitem(sys.modules, name, None)


def test_rows_of_release_4_say_what_to_install(monkeypatch):
    hide(monkeypatch)
    expected = (
        r"row of SWE-bench 4.x or SWE-Gym without image, .* found no package with any; .*pip install 'swebench>=4,<5'"
    )
    with pytest.raises(ValueError, match=expected):
        formats.from_row(OLD)
    specs(monkeypatch, "swebench", "test_spec.create_scripts", repo="another/repo")
    with pytest.raises(
        ValueError, match="no test command of own/calc 1.0 in the installed swebench; reload .*swegym @"
    ):
        formats.from_row(OLD)
    with pytest.raises(ValueError, match="columns of SWE-bench 4.x or SWE-Gym, version missing; got"):
        formats.from_row({name: value for name, value in OLD.items() if name != "version"})


def test_rows_of_release_4_with_swebench_itself():
    tables = pytest.importorskip("swebench.harness.constants", reason="reads the tables of swebench 4.x")
    if not hasattr(tables, "MAP_REPO_VERSION_TO_SPECS"):
        pytest.skip("swebench 5 has no tables")
    row = OLD | {"instance_id": "pallets__flask-5014", "repo": "pallets/flask", "version": "2.3"}
    instance = formats.from_row(row | {"test_patch": f"diff --git a/{TEST} b/{TEST}\n{TEST_PATCH}"})
    assert isinstance(instance, SweBenchInstance)
    assert instance.image == "swebench/sweb.eval.x86_64.pallets_1776_flask-5014:latest"
    assert "pytest -rA tests/test_calc.py" in instance.eval_script and instance.log_parser == "parse_log_pytest"
