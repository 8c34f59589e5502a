import ast
import subprocess

import pytest
from envs.swe.samples import FakeRuntime

from aem_jax.envs.swe import check
from aem_jax.envs.swe.generate import tasks as generated
from aem_jax.envs.swe.generate.mutate import KINDS, Edit, apply, edits
from aem_jax.envs.swe.generate.packages import package, packages
from aem_jax.envs.swe.instance import from_row, to_row
from aem_jax.envs.swe.tasks import TasksConfig, eval_set, full_payload, generated_tasks, load_task, training_tasks
from scripts.survey_bugs import broken_tests

SOURCE = '''"""Doc: 1 < 2."""
LIMIT = 3


def top(values, count=2):
    # é
    if count < 1:
        raise ValueError("count < 1")
    return sorted(values)[:count] + [LIMIT]
'''


def test_edits_by_hand():
    assert {(edit.before, edit.after, edit.kind) for edit in edits(SOURCE)} == {
        ("2", "3", "off by one"),
        ("2", "1", "off by one"),
        ("1", "2", "off by one"),
        ("1", "0", "off by one"),
        ("count < 1", "count <= 1", "comparison"),
        ("count < 1", "count > 1", "comparison"),
        ('if count < 1:\n        raise ValueError("count < 1")', "pass", "missing statement"),
        ("sorted(values)", "values", "missing copy"),
        ("sorted(values)[:count] + [LIMIT]", "sorted(values)[:count] - [LIMIT]", "arithmetic"),
    }
    assert {edit.function for edit in edits(SOURCE)} == {"top"}


def test_an_edit_changes_only_its_span():
    for edit in edits(SOURCE):
        changed = apply(SOURCE, [edit])
        assert changed == SOURCE[: edit.start] + edit.after + SOURCE[edit.end :] != SOURCE
        ast.parse(changed)


def test_edits_are_applied_together():
    first, second = Edit(0, 1, "a", "long", "k", "f"), Edit(2, 3, "c", "", "k", "f")
    assert apply("abcd", [second, first]) == "longbd"
    with pytest.raises(ValueError, match="do not overlap"):
        apply("abcd", [first, Edit(0, 2, "ab", "x", "k", "f")])
    with pytest.raises(ValueError, match="expected 'a' at 0, got 'b'"):
        apply("bcd", [first])


def test_there_are_enough_bugs_of_every_kind():
    bugs = generated.bugs()
    assert len(packages()) == 16
    for split, least in (("train", 80), ("valid", 15), ("test", 25)):
        assert len(generated_tasks(split)) >= least
    assert {bug.difficulty for bug in bugs} == set(generated.DIFFICULTIES)
    assert {edit.kind for bug in bugs for edit in bug.edits} == set(KINDS)
    assert len({bug.id for bug in bugs}) == len(bugs)


def test_splits_share_no_edit():
    edits_by_split: dict[str, set] = {}
    for bug in generated.bugs():
        for edit in bug.edits:
            edits_by_split.setdefault(bug.split, set()).add((bug.package, edit.start, edit.end, edit.after))
    assert not edits_by_split["train"] & edits_by_split["valid"]
    in_test = {package for package, *_ in edits_by_split["test"]}
    elsewhere = {package for package, *_ in edits_by_split["train"] | edits_by_split["valid"]}
    assert len(in_test) == 3 and not in_test & elsewhere


def test_the_catalogue_lists_the_tests_that_a_bug_breaks():
    # tests detect one bug of a package; the package itself passes
    bug = next(bug for bug in generated.bugs() if bug.package == "roman")
    original = package("roman")
    assert broken_tests(original, original.source) == {}
    assert broken_tests(original, apply(original.source, bug.edits)) == bug.broken


def test_a_trial_that_loops_forever_has_no_result():
    original = package("roman")
    assert broken_tests(original, original.source.replace("number -= value", "pass")) is None


def test_an_instance_has_swebenchs_schema_and_its_patches_apply(tmp_path):
    task = generated_tasks("train")[0]
    instance, (_, checkout) = generated.instance(task.payload["bug"]), load_task(full_payload(task.payload))
    assert from_row(to_row(instance)) == instance
    checkout(instance, tmp_path)

    def git(*arguments: str, stdin: str = "") -> str:
        command = ["git", "-C", str(tmp_path), *arguments]
        return subprocess.run(command, input=stdin, capture_output=True, text=True, check=True).stdout

    assert git("rev-parse", "HEAD").strip() == instance.base_commit
    original = package(task.payload["bug"].rsplit("-", 1)[0])
    hidden = [name.split("::")[1] for name in instance.fail_to_pass]
    assert not any(f"def {name}(" in (tmp_path / original.tests_path).read_text() for name in hidden)
    git("apply", stdin=instance.patch)
    assert (tmp_path / original.module_path).read_text() == original.source
    git("apply", stdin=instance.test_patch)
    assert (tmp_path / original.tests_path).read_text() == original.tests


def test_every_bug_has_a_consistent_instance():
    for bug in generated.bugs():
        instance = generated.instance(bug.id)
        names = {*instance.fail_to_pass, *instance.pass_to_pass}
        assert len(instance.fail_to_pass) == len(bug.broken)
        assert len(names) == package(bug.package).tests.count("\ndef test_")
        for edit in bug.edits:  # the statement describes the failure, not its location
            assert len(edit.before) < 8 or edit.before not in instance.problem_statement


@pytest.mark.parametrize("difficulty", generated.DIFFICULTIES)
def test_a_task_of_each_difficulty_is_solved_only_by_its_fix(tmp_path, difficulty):
    assert check.problems(generated_tasks("test", [difficulty])[0], FakeRuntime(tmp_path)) == []


def test_the_check_reports_a_wrong_task(tmp_path, monkeypatch):
    task = generated_tasks("train")[0]
    instance, (_, checkout) = generated.instance(task.payload["bug"]), load_task(full_payload(task.payload))
    row = to_row(instance)
    wrong = from_row(row | {"patch": "", "FAIL_TO_PASS": row["PASS_TO_PASS"]})
    monkeypatch.setattr(check, "load_task", lambda payload: (wrong, checkout))
    (problem,) = check.problems(task, FakeRuntime(tmp_path))
    assert "without a fix ['tests/" in problem


def test_evaluation_sets_are_fixed_and_named_by_their_content():
    config = TasksConfig()
    tasks, name = eval_set(config, "valid", 8)
    assert eval_set(config, "valid", 8) == (tasks, name)
    assert name.startswith("valid-8-") and name != eval_set(config, "test", 8)[1]
    assert len(eval_set(config, "valid", 10_000)[0]) == len(generated_tasks("valid"))
    assert {task.task_type for task in eval_set(TasksConfig(difficulties=("hard",)), "test", 3)[0]} == {"hard"}
    ids = [task.id for task in training_tasks(config, seed=1)]
    assert ids == [task.id for task in training_tasks(config, seed=1)] != [t.id for t in training_tasks(config, seed=2)]
    assert sorted(ids) == sorted(task.id for task in generated_tasks("train"))


def test_invalid_settings_and_payloads_are_refused():
    with pytest.raises(ValueError, match="difficulties among easy, medium, hard"):
        TasksConfig(difficulties=("simple",))
    with pytest.raises(ValueError, match="split to be one of train, valid, test"):
        eval_set(TasksConfig(), "valid_seen", 3)
    with pytest.raises(ValueError, match="expected a payload with 'bug'"):
        full_payload({"bug": "roman-10000"})
    with pytest.raises(ValueError, match="expected 'bug', or 'instances' and 'id'"):
        full_payload({})
