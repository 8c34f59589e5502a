"""The task suite of Harbor folders: splits, evaluation sets, deadlines, and what a run is told."""

import dataclasses
import json
import shutil

import pytest
from envs.harbor.test_task import TASKS, make

from aem_jax.config.environments import input_files, path_settings, task_suite
from aem_jax.config.presets import read_preset
from aem_jax.config.run import RunConfig
from aem_jax.envs.harbor import sandbox
from aem_jax.envs.harbor.config import HarborConfig
from aem_jax.envs.harbor.suite import FINISH, harbor, make_harbor, split_tasks
from aem_jax.envs.harbor.task import read_tasks
from aem_jax.envs.protocol import StepResult
from aem_jax.envs.serving.config import PoolConfig
from aem_jax.envs.suite import SuiteOptions
from aem_jax.envs.swe.sandbox.workspace import SandboxError
from aem_jax.errors import ConfigError
from aem_jax.overrides import apply
from aem_jax.overrides import split as split_words

POOL = PoolConfig(reset_deadline_s=900, step_deadline_s=900)
CONFIG = HarborConfig(tasks=str(TASKS), command_s=60)


def suite_of(config: HarborConfig = CONFIG, splits=("valid", "test"), pool: PoolConfig = POOL, seed: int = 0):
    return harbor(config, SuiteOptions(seed=seed, splits=splits, pool=pool))


def test_training_and_held_out_tasks_are_disjoint_and_their_payloads_are_folders():
    suite = suite_of()
    parts = {split: suite.evaluation(split, 99) for split in ("valid", "test", "train")}
    names = {split: [task.id for task in tasks] for split, (tasks, _) in parts.items()}
    assert sorted(name for part in names.values() for name in part) == sorted(folder.name for folder in TASKS.iterdir())
    assert sorted(task.id for task in suite.training) == names["train"] and len(names["train"]) == 11
    assert (len(names["valid"]), parts["valid"][1][:8], parts["test"][1][:7]) == (1, "valid-1-", "test-1-")
    assert all(task.payload == {"folder": str(TASKS / task.id)} for task in suite.training)
    assert [task.id for task in suite_of(seed=1).training] != [task.id for task in suite.training]
    act = suite.baselines["empty"](suite.training[0])
    assert act(StepResult("")) == FINISH and suite.demonstrator is None


def test_a_sets_name_changes_with_any_file_of_its_tasks(tmp_path):
    shutil.copytree(TASKS, tmp_path / "set")
    config = dataclasses.replace(CONFIG, tasks=str(tmp_path / "set"))
    tasks, name = suite_of(config).evaluation("valid", 5)
    assert suite_of().evaluation("valid", 5)[1] == name
    test = tmp_path / "set" / tasks[0].id / "tests/test.sh"
    test.write_text(test.read_text() + "# changed\n")
    assert suite_of(config).evaluation("valid", 5)[1] != name


def test_a_task_keeps_its_split_when_its_folder_moves():
    tasks = read_tasks(TASKS)
    parts = split_tasks(tasks, 0.5)
    assert {split: len(part) for split, part in parts.items()} == {"valid": 3, "test": 3, "train": 7}
    assert parts == split_tasks(tasks[::-1], 0.5)
    assert split_tasks(tasks, 0.0)["train"] == tasks and split_tasks(tasks[:2], 0.5)["valid"] == []


def test_another_folder_is_one_evaluation_set(tmp_path):
    for name in ("one", "two", "three"):
        make(tmp_path / "eval" / name)
    config = dataclasses.replace(CONFIG, evaluation=str(tmp_path / "eval"))
    suite = suite_of(config, ("test",))
    tasks, name = suite.evaluation("test", 2)
    assert [task.id for task in tasks] == ["one", "three"] and name.startswith("test-2-") and len(suite.training) == 13
    with pytest.raises(
        ValueError, match="expected one with --harbor.evaluation, whose file is one set, got valid test"
    ):
        suite_of(config)
    shutil.copytree(TASKS / "partial", tmp_path / "eval" / "partial")
    with pytest.raises(ValueError, match=r"--harbor.evaluation: expected no task of --harbor.tasks, got 1 \(partial\)"):
        suite_of(config, ("test",))


def test_refusals_name_the_setting(tmp_path):
    with pytest.raises(ValueError, match="--harbor.tasks: expected a folder of Harbor tasks .*, got none"):
        suite_of(HarborConfig())
    make(tmp_path / "set/gpu", "[environment]\ngpus = 1")
    config = dataclasses.replace(CONFIG, tasks=str(tmp_path / "set"))
    expected = r"(?s)--harbor.tasks: .*/gpu/task.toml: environment.gpus: expected no GPU, got 1.*--harbor.exclude gpu"
    with pytest.raises(ValueError, match=expected):
        suite_of(config)
    with pytest.raises(
        ValueError, match="--harbor.held-out: expected tasks for the split 'valid', got none of 13 with 0;"
    ):
        suite_of(dataclasses.replace(CONFIG, held_out=0.0))
    assert len(suite_of(dataclasses.replace(CONFIG, held_out=0.0), ()).training) == 13
    with pytest.raises(ValueError, match="expected split to be one of valid, test, train, got 'dev'"):
        suite_of(splits=("dev",))
    with pytest.raises(ValueError, match="expert-habit: expected 0 with harbor, got 0.5"):
        harbor(CONFIG, SuiteOptions(expert_habit=0.5, pool=POOL))


def test_deadlines_that_would_lose_episodes_are_refused():
    with pytest.raises(
        ValueError, match=r"--env.step-deadline-s: expected at least 180, for a command \(60 s\) and the veri"
    ):
        suite_of(pool=PoolConfig())
    with pytest.raises(
        ValueError, match="--env.reset-deadline-s: expected at least 660, for the build of an image, got 60"
    ):
        suite_of(pool=PoolConfig(step_deadline_s=900))
    suite_of(dataclasses.replace(CONFIG, ignore_images=True), pool=PoolConfig(step_deadline_s=900))


def test_a_machine_without_an_engine_cannot_serve_images(monkeypatch):
    def none(name, bubblewrap, host):
        raise SandboxError(f"no {name} here")

    monkeypatch.setattr(sandbox, "choose_runtime", none)
    with pytest.raises(
        OSError, match=r"no bubblewrap here|dockerfile/task.toml: expected docker or podman .*no docker here"
    ):
        make_harbor(CONFIG)


@pytest.mark.parametrize("presets", [["harbor-tiny"], ["harbor-paper", "qwen3-32b"]])
def test_the_presets_take_a_folder(presets):
    config = apply(read_preset(*presets), split_words(["--harbor.tasks", str(TASKS)])[1])
    suite = task_suite(config)
    assert json.loads(json.dumps(suite.settings))["tasks"] == str(TASKS) and suite.name == "harbor"
    assert path_settings(config) >= {"harbor.tasks", "harbor.evaluation"}
    root, files = input_files(config)["harbor.tasks"]
    assert root == TASKS and TASKS / "partial/tests/test.sh" in files


def test_settings_of_harbor_are_refused_with_another_environment():
    with pytest.raises(ConfigError, match="--harbor.tasks is a setting of environment harbor"):
        apply(RunConfig(), split_words(["--harbor.tasks", str(TASKS)])[1])
