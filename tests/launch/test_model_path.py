"""Training starts from a model in Hugging Face format, through the normal command."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from safetensors.numpy import load_file, save_file

from aem_jax.config import components, validate
from aem_jax.config.presets import read_preset
from aem_jax.config.run import RunConfig
from aem_jax.errors import ConfigError
from aem_jax.launch import cli, context, initial
from aem_jax.metrics import read_lines
from aem_jax.models import ModelConfig, Policy, from_pretrained, save_pretrained
from aem_jax.models.config import ModelChoice
from aem_jax.models.families import config_to_hf
from aem_jax.overrides import apply, split
from aem_jax.tokenizer import ChatTokenizer

SMALL = Path(__file__).with_name("small.toml")
CONFIG = ModelConfig(512, 32, 48, 2, 4, 2, 8, qk_norm=None, qkv_bias=True, max_positions=512)  # of Qwen2.5's form


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer and random weights."""
    folder = tmp_path_factory.mktemp("model")
    texts = ["-= Welcome =- You are in the middle of a room.", "<action>go to shelf 1</action>", "Nothing happens."]
    ChatTokenizer.train(texts * 3, vocab_size=400).save_pretrained(folder / "tokenizer")
    save_pretrained(folder / "model", CONFIG, Policy(CONFIG).init(jax.random.key(0)), source=folder / "tokenizer")
    return folder / "model"


@pytest.mark.slow
def test_a_run_from_files_trains_two_steps(model: Path, tmp_path: Path, monkeypatch, capsys):
    """Training uses a relative path. The export runs in another working folder, after the model has changed."""
    shutil.copytree(model, tmp_path / "begin")
    words = ["--preset", str(SMALL), "--runs-dir", str(tmp_path), "--name", "run", "--model.path", "begin"]
    words += ["--model.dtype", "float32", "--warmstart.episodes", "8", "--warmstart.steps", "1"]
    words += ["--warmstart.batch-episodes", "4", "--train.num-steps", "2"]
    words += ["--rollout.context-tokens", "1024", "--rollout.prompt-tokens", "700", "--evaluation.size", "2"]
    words += ["--evaluation.every", "0", "--metrics.tensorboard", "false"]
    with monkeypatch.context() as patch:
        patch.chdir(tmp_path)
        assert cli.main(words) == 0
    metrics = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert [record["step"] for record in metrics] == [0, 1]
    assert all(record["parity/max"] < 1e-4 for record in metrics)
    evaluations = read_lines(tmp_path / "run" / "evaluations.jsonl")
    assert evaluations[0]["phase"] == "zero-shot"
    assert {record["phase"] for record in evaluations[1:]} == {"oracle", "searcher", "random", "warmstart", "final"}
    assert "zero-shot" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "config.json").read_text())["model"]["path"] == str(tmp_path / "begin")
    (tmp_path / "begin" / "config.json").write_text("{}")

    export = ["export", str(tmp_path / "out"), *words[:6]]
    assert cli.main(export) == 0
    assert cli.main(export) == 2
    assert "expected a new or empty folder to write a model to" in capsys.readouterr().err
    before, after = (from_pretrained(folder, dtype="float32") for folder in (model, tmp_path / "out"))
    assert after.config == before.config
    changes = jax.tree.map(lambda a, b: float(abs(a - b).max()), before.params, after.params)
    assert 0 < max(jax.tree.leaves(changes)) < 0.1
    chat = ChatTokenizer.from_pretrained(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == list(chat.stop_ids)


def test_the_files_determine_the_model(model: Path):
    config = components.model_config(ModelChoice(path=str(model), dtype="float32"), 400)
    assert (config.num_layers, config.qkv_bias, config.qk_norm, config.vocab_size) == (2, True, None, 512)
    assert components.model_config(ModelChoice(path=str(model)), 400).dtype == "bfloat16"
    float32: Any = jnp.float32
    assert components.model_config(ModelChoice(path=str(model), dtype=float32), 400) == config
    with pytest.raises(ValueError, match="expected a vocabulary of at least 513"):
        components.model_config(ModelChoice(path=str(model)), 513)


def test_export_names_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["export", "--preset", str(SMALL)]) == 2
    assert cli.main(["export", str(tmp_path / "out"), "--preset", str(SMALL), "--runs-dir", str(tmp_path)]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert "expected one folder to write to, got 0" in first and "no run in" in second


def test_sizes_with_a_path_are_refused(model: Path):
    words = ["--model.path", str(model), "--model.num-layers", "3"]
    with pytest.raises(ConfigError, match="--model.num-layers: expected none with --model.path"):
        validate.check(apply(read_preset("alfworld-tiny"), split(words)[1]))


def test_unusable_weights_are_an_error_of_the_option(model: Path, tmp_path: Path):
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    held = load_file(folder / "model.safetensors")
    save_file({**held, "model.norm.weight": held["model.norm.weight"] * float("nan")}, folder / "model.safetensors")
    config = RunConfig(model=ModelChoice(path=str(folder)))
    run: Any = SimpleNamespace(config=config, mesh=None)
    with pytest.raises(ConfigError, match=r"--model.path: expected finite numbers in .*, got NaN .* model.norm.weight"):
        initial.initial_parameters(run, Policy(CONFIG), {})
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="--model.path: expected model.safetensors or .*, got neither"):
        initial.initial_parameters(run, Policy(CONFIG), {})


def test_an_unreadable_config_is_named(tmp_path: Path):
    config = config_to_hf(CONFIG, "float32") | {"num_hidden_layers": "two"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    asked = RunConfig(model=ModelChoice(path=str(tmp_path)))
    anything: Any = None
    with pytest.raises(ValueError, match=r"config.json: expected num_hidden_layers"):
        context.make_tokenizer(
            asked, anything, tmp_path / "tokenizer", ChatTokenizer.from_pretrained, anything, anything
        )
