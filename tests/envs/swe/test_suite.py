"""The task suite of bug-fixing by choice: its tasks and agents."""

import dataclasses
import json
from pathlib import Path
from typing import cast

import pytest
from envs.swe.samples import calc
from envs.swe.test_choices import by_source

from aem_jax.config.environments import task_suite
from aem_jax.config.presets import read_preset
from aem_jax.envs.play import play
from aem_jax.envs.suite import SuiteOptions, TaskSuite
from aem_jax.envs.swe.choices import ChoicesConfig, ChoicesEnv
from aem_jax.envs.swe.instance import to_row
from aem_jax.envs.swe.payload import load_task
from aem_jax.envs.swe.suite import swe_choices
from aem_jax.envs.swe.tasks import TasksConfig, training_tasks
from aem_jax.envs.swe.tasks import load_task as load_named
from aem_jax.errors import ConfigError
from aem_jax.overrides import apply
from aem_jax.overrides import split as split_words

CONFIG = read_preset("swe-tiny")
CHOICES = cast(ChoicesConfig, CONFIG.environment)


@pytest.fixture(scope="module")
def suite() -> TaskSuite:
    return task_suite(CONFIG)


def won(env: ChoicesEnv, task, act) -> bool:
    return play(env, task.payload, act, CHOICES.max_steps)[-1].result.info["won"]


def test_training_and_evaluation_share_no_bug(suite: TaskSuite):
    training = {task.payload["bug"] for task in suite.training}
    assert len(training) >= 80 and len(suite.training) == 100 * len(training)
    for split in CONFIG.evaluation.splits:
        tasks, name = suite.evaluation(split, 12)
        assert len(tasks) == 12 and name.startswith(f"{split}-12-")
        assert not {task.payload["bug"] for task in tasks} & training


def test_who_looks_at_the_tests_solves_and_chance_does_not(suite: TaskSuite):
    env = ChoicesEnv(CHOICES, by_source)
    tasks = suite.training[:60]
    rates = {
        name: sum(won(env, task, make(task)) for task in tasks) / len(tasks) for name, make in suite.baselines.items()
    }
    assert rates["tester"] == 1.0
    assert rates["random"] < 0.3
    assert suite.demonstrator is not None
    careless = sum(won(env, task, suite.demonstrator(task)) for task in tasks) / len(tasks)
    assert 0.2 < careless < 0.8  # a policy trained on its demonstrations can still improve


def test_the_tester_keeps_what_helps_where_there_are_several_bugs():
    config = ChoicesConfig(difficulties=("hard",), candidates=4, max_steps=20)
    suite = swe_choices(config, SuiteOptions())

    def failing(found, chosen) -> int:  # each bug that is left breaks two tests, each new mistake one more
        wanted = {(edit.after, edit.before) for edit in found.edits}
        right = sum((edit.before, edit.after) in wanted for edit in chosen)
        return 2 * (len(found.edits) - right) + (len(chosen) - right)

    env = ChoicesEnv(config, failing)
    tester = suite.baselines["tester"]
    results = [play(env, task.payload, tester(task), 20)[-1].result.info["won"] for task in suite.training[:20]]
    assert all(results)


def test_tasks_for_tools_hold_all_that_a_server_needs():
    config = read_preset("swe-paper", "qwen3-32b")
    suite = task_suite(config)
    named = training_tasks(TasksConfig(), seed=config.seed)[:3]
    for task, name in zip(suite.training[:3], named):
        instance, _ = load_task(json.loads(json.dumps(task.payload)))
        assert instance == load_named(name.payload)[0] and task.id == name.id
    tasks, _ = suite.evaluation("test", 2)
    assert set(tasks[0].payload) == {"instance", "files"} and suite.demonstrator is None


def test_files_are_one_set_for_tools_and_none_for_choices(tmp_path: Path):
    files = []
    for number in (1, 2):
        files.append(tmp_path / f"{number}.jsonl")
        files[-1].write_text(json.dumps(to_row(calc()) | {"instance_id": f"own__calc-{number}"}))
    named = ["--swe.tasks.train", str(files[0]), "--swe.tasks.evaluation", str(files[1])]
    config = apply(read_preset("swe-paper", "qwen3-32b"), split_words(named)[1])
    tasks, name = task_suite(config).evaluation("test", 500)  # the preset's one split
    assert [task.id for task in tasks] == ["own__calc-2"] and name.startswith("test-1-")
    two = dataclasses.replace(config, evaluation=CONFIG.evaluation)
    with pytest.raises(ValueError, match="--swe.tasks.evaluation, whose file is one set, got valid test; say"):
        task_suite(two)
    with pytest.raises(ConfigError, match="--swe.tasks.train is a setting of environment swe, and .* is swe-choices"):
        apply(CONFIG, split_words(named)[1])
