"""A run records its inputs: changed inputs are named, moved ones count as equal, older runs can be resumed."""

import json
import logging
import os
from dataclasses import replace
from pathlib import Path

import jax
import pytest

from aem_jax.checkpoint.checksum import checksums
from aem_jax.config import inputs, saved
from aem_jax.config.presets import read_preset
from aem_jax.config.run import RunConfig
from aem_jax.envs.alfworld.env import AlfworldConfig
from aem_jax.envs.openenv.suite import OpenEnvConfig
from aem_jax.envs.registry import TRAINED
from aem_jax.envs.swe.env import SweConfig
from aem_jax.envs.swe.tasks import TasksConfig
from aem_jax.errors import ConfigError
from aem_jax.launch import frozen_weights
from aem_jax.launch.context import open_run
from aem_jax.models import ModelConfig, Policy, save_pretrained
from aem_jax.models.config import ModelChoice
from aem_jax.models.lora import LoraConfig
from aem_jax.models.pretrained import read_config
from aem_jax.overrides import apply, override, split
from aem_jax.sharding import MeshConfig, make_mesh

TINY = ModelConfig(64, 8, 8, 1, 1, 1, 8)


def openenv(folder: Path) -> RunConfig:
    """A run with an environment in a file and task files."""
    for name in ("tasks", "held-out"):
        (folder / f"{name}.jsonl").write_text('{"seed": 1}\n')
    (folder / "env.py").write_text("class Env: pass\n")
    tasks, held_out = (str(folder / f"{name}.jsonl") for name in ("tasks", "held-out"))
    asked = OpenEnvConfig(serve=f"{folder}/env.py:Env", tasks=tasks, evaluation_tasks=held_out)
    return RunConfig(environment=asked)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


@pytest.mark.parametrize(("file", "option"), [("tasks", "--openenv.tasks"), ("held-out", "--openenv.evaluation-tasks")])
def test_a_task_file_that_changed_is_named(run: Path, file: str, option: str, caplog):
    config = openenv(run.parent)
    saved.save(config, run)
    inputs.check_sources(run, config, "refuse")
    path = run.parent / f"{file}.jsonl"
    path.write_text('{"seed": 2}\n')
    with pytest.raises(ConfigError, match=f"{option}: expected {path} as it was when .* began, .*another --name"):
        inputs.check_sources(run, config, "refuse")
    inputs.check_sources(run, config, "warn")
    assert f"{option}: expected {path} as it was" in caplog.text
    path.unlink()
    with pytest.raises(ConfigError, match=f"cannot read {path}"):
        inputs.check_sources(run, config, "refuse")


def test_changed_code_of_an_environment_is_a_warning(run: Path, caplog):
    config = openenv(run.parent)
    saved.save(config, run)
    (run.parent / "env.py").write_text("class Env: pass  # faster\n")
    inputs.check_sources(run, config, "refuse")
    assert [record.levelno for record in caplog.records] == [logging.WARNING] and "--openenv.serve" in caplog.text


def test_a_file_that_moved_is_the_same_and_another_is_not(run: Path):
    config = openenv(run.parent)
    saved.save(config, run)
    moved, other = run.parent / "moved.jsonl", run.parent / "other.jsonl"
    (run.parent / "tasks.jsonl").rename(moved)
    other.write_text('{"seed": 3}\n')
    saved.check_resumable(config, override(config, {"openenv.tasks": str(moved)}), run)
    with pytest.raises(ConfigError, match=r"was begun with --openenv.tasks .*tasks.jsonl, got .*other.jsonl"):
        saved.check_resumable(config, override(config, {"openenv.tasks": str(other)}), run)


def test_folders_of_data_are_known_by_their_tasks(tmp_path: Path, run: Path):
    data = tmp_path / "data"
    games = [data / "json_2.1.1" / "train" / f"game-{i}" for i in range(30)]
    for game in games:
        game.mkdir(parents=True)
        for name in ("game.tw-pddl", "traj_data.json", "picture.png"):
            (game / name).write_text(game.name)
    config = RunConfig(environment=AlfworldConfig(data=str(data)))
    saved.save(config, run)
    (games[3] / "picture.png").write_text("another")
    inputs.check_sources(run, config, "refuse")
    data.rename(tmp_path / "moved")
    moved = override(config, {"alfworld.data": str(tmp_path / "moved")})
    assert inputs.is_same(run, moved, "alfworld.data")
    game = tmp_path / "moved" / "json_2.1.1" / "train" / "game-7"
    (game / "traj_data.json").write_text("game-8")
    assert not inputs.is_same(run, moved, "alfworld.data")
    (game / "traj_data.json").unlink()
    assert not inputs.is_same(run, moved, "alfworld.data")


def test_large_files_are_known_by_size_begin_end_and_blocks_between(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(inputs, "WHOLE_BYTES", 1000)
    monkeypatch.setattr(inputs, "_BLOCK_BYTES", 10)
    file, digests = tmp_path / "large", set()
    for content in (b"a" * 7000, b"a" * 7001, b"b" + b"a" * 6999, b"a" * 6999 + b"b", b"a" * 3000 + b"b" * 4000):
        file.write_bytes(content)
        digests.add(inputs.digest(file, [file]))
    assert len(digests) == 5


@pytest.mark.parametrize("name", ["config.json", "tokenizer/tokenizer.json", "model/config.json"])
def test_the_run_s_own_files_are_those_that_it_wrote(run: Path, tmp_path: Path, name: str):
    (run / "tokenizer").mkdir()
    (run / "tokenizer" / "tokenizer.json").write_text('{"a": 1}')
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"rope_theta": 1.0}')
    config = RunConfig(model=ModelChoice(path=str(tmp_path / "model")))
    saved.save(config, run)
    assert saved.load(run) == config
    text = (run / name).read_text()
    (run / name).write_text(text.replace("1", "2"))
    with pytest.raises(ConfigError, match=f"{run / name}: expected the file as the run wrote it, got another content"):
        saved.load(run)
    (run / name).write_text(text)
    saved.save(replace(config, train=replace(config.train, num_steps=7)), run, begun=True)  # not damage
    assert saved.load(run).train.num_steps == 7
    (run / name).unlink()
    with pytest.raises(ConfigError, match="no run in" if name == "config.json" else "as the run wrote it, got none"):
        saved.load(run)


def test_the_model_s_config_is_the_run_s_from_its_first_checkpoint_on(run: Path, tmp_path: Path):
    theirs = tmp_path / "model" / "config.json"
    theirs.parent.mkdir()
    config = RunConfig(model=ModelChoice(path=str(theirs.parent)))
    for begun, content, kept in ((False, "1", "1"), (False, "2", "2"), (True, "3", "2")):
        theirs.write_text(content)
        saved.save(config, run, begun)
        assert (run / "model" / "config.json").read_text() == kept
    theirs.unlink()
    theirs.parent.rmdir()
    assert saved.model_files(config, run) == run / "model"
    saved.save(config, run, begun=True)


def test_the_copy_of_the_config_ties_the_head_only_if_the_weights_do(run: Path, tmp_path: Path):
    untied = replace(TINY, tied_head=False)
    save_pretrained(tmp_path / "model", untied, Policy(untied).init(jax.random.key(0)))
    theirs = tmp_path / "model" / "config.json"
    theirs.write_text(json.dumps(json.loads(theirs.read_text()) | {"tie_word_embeddings": True}))
    saved.save(RunConfig(model=ModelChoice(path=str(theirs.parent))), run)
    assert not read_config(run / "model", TINY.dtype).tied_head


def test_a_run_from_before_the_record_goes_on_and_gets_one(run: Path):
    config = openenv(run.parent)
    saved.save(config, run)
    (run / inputs.FILE).unlink()
    assert saved.load(run) == config
    saved.check_resumable(config, config, run)
    inputs.check_sources(run, config, "refuse")
    saved.save(config, run, begun=True)
    assert {"openenv.tasks", "openenv.evaluation_tasks", "openenv.serve", "config.json"} == set(inputs.load(run))
    (run / inputs.FILE).write_text("{")
    with pytest.raises(ConfigError, match=r"inputs.json: expected JSON, got .*; put a copy of inputs.json back"):
        saved.load(run)


def test_frozen_weights_are_known_by_their_numbers(run: Path, tmp_path: Path):
    policy, mesh = Policy(TINY), make_mesh(MeshConfig(), jax.devices()[:1])
    params = policy.init(jax.random.key(0))
    save_pretrained(tmp_path / "model", TINY, params)
    config = RunConfig(model=ModelChoice(path=str(tmp_path / "model")), lora=LoraConfig(rank=2))
    _, sums = frozen_weights.load(config, run, policy, mesh, None)
    inputs.write(run, {inputs.FROZEN: sums})
    assert inputs.load(run)[inputs.FROZEN] == sums
    rounded = jax.tree.map(lambda x, dtype: x.astype(dtype), params, policy.dtypes)
    assert sums == checksums(rounded["base"])
    moved = replace(config, model=ModelChoice(path=str(tmp_path / "moved")))
    save_pretrained(tmp_path / "moved", TINY, params, max_file_bytes=1000)  # the same numbers in other files
    saved.check_resumable(config, moved, run)
    frozen_weights.load(moved, run, policy, mesh, sums)
    save_pretrained(tmp_path / "other", TINY, {"base": {**params["base"], "embed": params["base"]["embed"] * 1.01}})
    other = replace(config, model=ModelChoice(path=str(tmp_path / "other")))
    with pytest.raises(
        ConfigError, match=r"weights in .*other have changed since .*\['embed'\].*put the old ones back"
    ):
        frozen_weights.load(other, run, policy, mesh, sums)


def test_paths_are_absolute_and_names_are_not(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    (tmp_path / "org" / "here").mkdir(parents=True)

    def kept(*words: str) -> RunConfig:
        environment = words[0].removeprefix("--").partition(".")[0] if words else ""
        chosen = ["--environment", environment] if environment in TRAINED else []
        return saved.absolute(apply(RunConfig(), split([*words, *chosen])[1]))

    assert kept("--model.path", "m").model.path == str(tmp_path / "m")
    assert kept("--model.path", "org/here").model.path == str(tmp_path / "org" / "here")
    assert kept("--model.path", "org/hub").model.path == "org/hub"
    assert kept("--model.path", "~/m").model.path == "/home/me/m"
    assert kept("--model.path", "models/m.gguf").model.path == str(tmp_path / "models" / "m.gguf")  # no name on the Hub
    named = kept("--swe.tasks.train", "generated", "--swe.tasks.evaluation", "a").environment
    assert named == SweConfig(tasks=TasksConfig(train="generated", evaluation=f"{tmp_path}/a"))
    assert kept("--openenv.serve", "env.py:Env").environment == OpenEnvConfig(serve=f"{tmp_path}/env.py:Env")
    assert kept("--openenv.serve", "pkg.module:Env").environment == OpenEnvConfig(serve="pkg.module:Env")
    for name in ("alfworld.data", "webshop.shop.data", "openenv.tasks", "warmstart.init-from", "swe.tasks.repos"):
        assert f"'{tmp_path}{os.sep}x'" in str(kept(f"--{name}", "x")), name
    assert kept() == RunConfig() and saved.absolute(kept("--model.path", "m")) == kept("--model.path", "m")


@pytest.mark.parametrize("name", ["runs-dir", "model.path", "openenv.tasks"])
def test_an_address_is_no_path(name: str):
    with pytest.raises(ConfigError, match=f"--{name}: expected a path, got gs://bucket/x; mount the storage"):
        saved.absolute(apply(read_preset("openenv-tiny"), split([f"--{name}", "gs://bucket/x"])[1]))


def test_a_relative_path_of_before_is_the_same_absolute(run: Path, monkeypatch):
    monkeypatch.chdir(run)
    before = RunConfig(model=ModelChoice(path="m"), environment=AlfworldConfig(data="data"))
    saved.check_resumable(before, saved.absolute(before), run)
    with pytest.raises(ConfigError, match="was begun with --model.path"):
        saved.check_resumable(before, replace(before, model=ModelChoice(path="/elsewhere/m")), run)


@pytest.mark.parametrize("writes", [True, False])
def test_checkpoints_without_the_config_that_they_were_made_with_are_refused(tmp_path: Path, monkeypatch, writes: bool):
    monkeypatch.setattr("aem_jax.distributed.runtime.set_up", lambda *_: None)
    (tmp_path / "checkpoints/1").mkdir(parents=True)
    refused = pytest.raises(ConfigError, match=r"expected the config.json that .* was begun with .*, got none")
    with refused, open_run(RunConfig(), tmp_path, writes=writes):
        raise AssertionError("opened")
    assert not (tmp_path / "inputs.json").exists()
