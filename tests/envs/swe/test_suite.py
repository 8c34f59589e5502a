"""The task suite of bug-fixing by choice: its tasks and agents."""

import dataclasses
import json
import threading
from pathlib import Path
from typing import cast

import pytest
from envs.swe.samples import calc
from envs.swe.test_choices import by_source

from aem_jax.config.environments import task_suite
from aem_jax.config.presets import read_preset
from aem_jax.envs.play import play
from aem_jax.envs.serving.config import PoolConfig
from aem_jax.envs.suite import SuiteOptions, TaskSuite
from aem_jax.envs.swe import env as swe_env
from aem_jax.envs.swe import suite as swe_suite
from aem_jax.envs.swe.choices import ChoicesConfig, ChoicesEnv
from aem_jax.envs.swe.env import SweConfig
from aem_jax.envs.swe.instance import to_row
from aem_jax.envs.swe.sandbox.containers import Containers
from aem_jax.envs.swe.suite import swe_choices
from aem_jax.envs.swe.tasks import TasksConfig, full_payload, load_task, training_tasks
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


def test_an_agent_that_runs_the_tests_solves_all_and_a_random_one_few(suite: TaskSuite):
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


def test_a_thinking_tester_is_refused():
    with pytest.raises(ValueError, match="expert-thinks: expected False with swe-choices, got True"):
        swe_choices(ChoicesConfig(), SuiteOptions(expert_thinks=True))


def test_a_habit_is_refused():
    with pytest.raises(ValueError, match="expert-habit: expected 0 with swe-choices, got 0.5; only .* of alfworld"):
        swe_choices(ChoicesConfig(), SuiteOptions(expert_habit=0.5))


def test_the_tester_solves_tasks_with_several_bugs():
    config = ChoicesConfig(difficulties=("hard",), candidates=4, max_steps=20)
    suite = swe_choices(config, SuiteOptions())

    def failing(case, chosen) -> int:  # each remaining bug breaks two tests, each new mistake one
        wanted = {(edit.after, edit.before) for edit in case.edits}
        right = sum((edit.before, edit.after) in wanted for edit in chosen)
        return 2 * (len(case.edits) - right) + (len(chosen) - right)

    env = ChoicesEnv(config, failing)
    tester = suite.baselines["tester"]
    results = [play(env, task.payload, tester(task), 20)[-1].result.info["won"] for task in suite.training[:20]]
    assert all(results)


def test_payloads_for_tools_are_self_contained():
    config = read_preset("swe-paper", "qwen3-32b")
    suite = task_suite(config)
    named = training_tasks(TasksConfig(), seed=config.seed)[:3]
    for task, name in zip(suite.training[:3], named):
        instance, _ = load_task(json.loads(json.dumps(task.payload)))
        assert instance == load_task(full_payload(name.payload))[0] and task.id == name.id
    tasks, _ = suite.evaluation("test", 2)
    assert set(tasks[0].payload) == {"instance", "files"} and suite.demonstrator is None


def test_a_file_is_one_set_for_tools_and_refused_for_choices(tmp_path: Path):
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


def test_images_are_fetched_ahead_on_the_host_of_the_servers_alone(monkeypatch):
    fetched, told = [], threading.Event()

    class Engine(Containers):
        def fetch(self, instance, checkout, *, limits, since):
            fetched.append((instance.instance_id, limits.memory_mib))
            told.set()
            return False

    monkeypatch.setattr(swe_env, "choose_runtime", lambda *_, **__: Engine("docker"))
    elsewhere = SuiteOptions(pool=PoolConfig(urls=("far:8000",)))
    assert swe_suite.swe(SweConfig(), elsewhere).prepare is None
    suite = swe_suite.swe(SweConfig(memory_mib=512), SuiteOptions())
    assert suite.prepare is not None
    suite.prepare(suite.training[:3])
    assert told.wait(30)
    instance, _ = load_task(suite.training[0].payload)
    assert fetched == [(instance.instance_id, 512)]  # then there was no room
