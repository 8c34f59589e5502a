"""`python -m aem_jax.envs.swe.check FILE`: finds instances of a file that give no learning signal."""

import json
import subprocess
import sys

import pytest
from envs.swe.samples import CALC, FakeRuntime, calc

from aem_jax.envs.swe import repos
from aem_jax.envs.swe.check import main
from aem_jax.envs.swe.env import SweConfig
from aem_jax.envs.swe.instance import to_row
from aem_jax.envs.swe.sandbox import choose


@pytest.fixture(scope="module")
def mirror(tmp_path_factory):
    """A folder of mirrors with the sample's repository, and a row of it."""
    folder = tmp_path_factory.mktemp("mirrors")
    repo = folder / "own__calc"
    for name, text in CALC.items():
        (repo / name).parent.mkdir(parents=True, exist_ok=True)
        (repo / name).write_text(text)
    git = ["git", "-C", str(repo), "-c", "user.name=a", "-c", "user.email=a@example.invalid"]
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "base"]):
        subprocess.run([*git, *words], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    row = {name: text.replace(calc().base_commit, head) for name, text in to_row(calc()).items()}
    return folder, row


def check(tmp_path, monkeypatch, mirror, *changes, more=()):
    folder, row = mirror
    (tmp_path / "work").mkdir()
    monkeypatch.setattr(choose, "choose_runtime", lambda *_, **__: FakeRuntime(tmp_path / "work"))
    rows = [row | {"instance_id": f"own__calc-{i}"} | change for i, change in enumerate(changes)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return main([str(tmp_path / "data.jsonl"), "--repos", str(folder), *more])


def test_instances_whose_reward_does_not_depend_on_the_agent_are_reported(tmp_path, monkeypatch, capsys, mirror):
    passes_before = {"FAIL_TO_PASS": '["tests/test_calc.py::test_mean"]', "PASS_TO_PASS": "[]"}
    changes = ({}, {"patch": "junk"}, {"patch": ""}, passes_before, {"base_commit": "f" * 40}, {"repo": "own/other"})
    assert check(tmp_path, monkeypatch, mirror, *changes, more=["--json"]) == 1
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert report["tasks"] == 6
    expected = {
        "own__calc-1": "its own patch cannot be applied",
        "own__calc-2": "its own patch does not solve it; 1 tests do not pass, ['tests/test_calc.py::test_median_even']",
        "own__calc-3": "the empty patch solves it",
        "own__calc-4": "cannot be graded: expected commit ffff",
        "own__calc-5": "cannot be graded: ",
    }
    assert list(report["problems"]) == list(expected)
    for name, text in expected.items():
        assert text in report["problems"][name][0] and f"{name}: {text}" in captured.err


def test_a_git_timeout_is_reported_for_its_instance(tmp_path, monkeypatch, capsys, mirror):
    def stuck(*_, **__):
        raise subprocess.TimeoutExpired(["git", "read-tree"], 300)

    monkeypatch.setattr(repos, "_git", stuck)
    assert check(tmp_path, monkeypatch, mirror, {}) == 1
    assert "own__calc-0: cannot be graded: Command '['git', 'read-tree']' timed out" in capsys.readouterr().out


def test_grading_uses_the_limits_of_training(tmp_path, monkeypatch, mirror):
    used = []
    monkeypatch.setattr("aem_jax.envs.swe.check.file_problems", lambda task, runtime, limits: used.append(limits) or [])
    assert check(tmp_path, monkeypatch, mirror, {}) == 0
    assert used == [SweConfig().grade_limits]


def test_a_file_without_problems_is_a_success(tmp_path, monkeypatch, capsys, mirror):
    assert check(tmp_path, monkeypatch, mirror, {}) == 0
    assert capsys.readouterr().out.startswith("1 tasks (1 own/calc), 0 problems; ")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["none.jsonl"], "none.jsonl"),
        (["bad.txt"], "expected a file of .jsonl, .json, .parquet"),
        (["bad.jsonl"], "bad.jsonl line 1: expected JSON"),
        (["--jobs", "0"], "expected --jobs ≥ 1"),
        (["good.jsonl", "--repos", "none"], "expected a folder of git mirrors in --repos, got 'none'"),
        (["--memory-mib", "1"], "memory_mib of at least 64"),
        (["--runtime", "bubblewrap", "--packages", "no-such-package"], "the package 'no-such-package'"),
    ],
)
def test_errors_are_one_line(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.jsonl").write_text("{")
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1 and message in captured.err


@pytest.mark.parametrize(("raises", "status"), [("KeyboardInterrupt", 130), ("BrokenPipeError", 141)])
def test_ctrl_c_and_a_closed_pipe_end_it_without_a_traceback(raises, status):
    code = (
        "import runpy, sys, aem_jax.envs.swe.tasks as tasks; sys.argv = ['check']\n"
        f"def stop(*_): raise {raises}\n"
        "tasks.generated_tasks = stop; runpy.run_module('aem_jax.envs.swe.check', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (status, "", "")
