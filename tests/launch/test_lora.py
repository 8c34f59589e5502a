"""LoRA through the normal command: from a model's files, and on random weights after a warm start."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from aem_jax.config import components, validate
from aem_jax.config.presets import read_preset
from aem_jax.errors import ConfigError
from aem_jax.launch import cli
from aem_jax.metrics import comparable, read_lines
from aem_jax.models import ModelConfig, Policy, from_pretrained, save_pretrained
from aem_jax.overrides import apply, split
from aem_jax.tokenizer import ChatTokenizer

pytestmark = pytest.mark.slow

SMALL = Path(__file__).with_name("small.toml")
CONFIG = ModelConfig(512, 32, 48, 2, 4, 2, 8, qk_norm=None, qkv_bias=True, max_positions=512)  # of Qwen2.5's form
SHORT = ("--evaluation.baselines", "false", "--evaluation.every", "0", "--evaluation.size", "2")
SHORT += ("--metrics.tensorboard", "false")


def train(folder: Path, *words: str) -> None:
    """Trains in this process."""
    assert cli.main(["train", "--preset", str(SMALL), "--runs-dir", str(folder), "--name", "run", *words]) == 0


def export(folder: Path, runs: Path, *words: str) -> None:
    assert (
        cli.main(["export", str(folder), "--preset", str(SMALL), "--runs-dir", str(runs), "--name", "run", *words]) == 0
    )


def check_export(run: Path, base: Path, out: Path, scale: float) -> None:
    """The merged model is the base plus the update in PEFT's files, to the second last bit of float32."""
    export(out / "merged", run.parent)
    export(out / "adapter", run.parent, "--adapter", "True")
    merged, adapter = from_pretrained(out / "merged", dtype="float32"), out / "adapter"
    wanted = load_file(base / "model.safetensors")
    pairs = load_file(adapter / "adapter_model.safetensors")
    for name in {name.rpartition(".lora_")[0] for name in pairs}:
        delta = pairs[f"{name}.lora_B.weight"] @ pairs[f"{name}.lora_A.weight"]
        assert np.abs(delta).max() > 0, name
        wanted[f"{name.removeprefix('base_model.model.')}.weight"] += np.float32(scale) * delta
    exported = load_file(out / "merged" / "model.safetensors")
    assert set(exported) == set(wanted)
    for name, value in wanted.items():
        np.testing.assert_allclose(exported[name], value, rtol=1e-5, atol=1e-7, err_msg=name)
    assert merged.config.dtype == "float32"
    stands_on = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert Path(stands_on).resolve() == base.resolve()


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict], bytes]:
    """A run on random weights that has lost its last checkpoint and was resumed, with its numbers and its frozen
    weights before that."""
    folder = tmp_path_factory.mktemp("runs")
    words = ("--lora.rank", "4", "--train.num-steps", "3", "--train.save-every", "1", *SHORT)
    run = folder / "run"
    train(folder, *words)
    before, base = numbers(run), (run / "frozen_weights" / "model.safetensors").read_bytes()
    shutil.rmtree(run / "checkpoints" / "3")
    train(folder, *words)
    return run, before, base


def numbers(run: Path) -> list[dict]:
    return [comparable(record) for record in read_lines(run / "metrics.jsonl")]


def test_a_run_from_files_trains_a_separate_adapter(tmp_path: Path):
    texts = ["-= Welcome =- You are in the middle of a room.", "<action>go to shelf 1</action>", "Nothing happens."]
    ChatTokenizer.train(texts * 3, vocab_size=400).save_pretrained(tmp_path / "tokenizer")
    model = tmp_path / "model"
    save_pretrained(model, CONFIG, Policy(CONFIG).init(jax.random.key(0)), source=tmp_path / "tokenizer")
    words = ["--model.path", str(model), "--model.dtype", "float32", "--train.num-steps", "2"]
    words += ["--rollout.context-tokens", "1024", "--rollout.prompt-tokens", "700", *SHORT]
    words += ["--warmstart.episodes", "0", "--checkpoint.keep-first", "False", "--learner.moments", "bfloat16"]
    words += ["--lora.rank", "4", "--lora.alpha", "8", "--lora.targets", "q_proj", "v_proj", "down_proj"]
    train(tmp_path, *words, "--lora.merge", "False")
    steps = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert [record["step"] for record in steps] == [0, 1]
    assert all(record["parity/max"] < 1e-4 for record in steps)
    # the reference is the original model: equal to the policy at first, up to rounding, and different later
    assert abs(steps[0]["learner/kl_reference"]) < 1e-10 < steps[1]["learner/kl_reference"]
    assert not (tmp_path / "run" / "frozen_weights").exists()
    check_export(tmp_path / "run", model, tmp_path / "out", scale=2.0)


def test_an_adapter_is_trained_after_a_warm_start_of_all_weights(
    resumed: tuple[Path, list[dict], bytes], tmp_path: Path
):
    run, _, _ = resumed
    steps = read_lines(run / "metrics.jsonl")
    assert [record["step"] for record in steps] == [0, 1, 2]
    for record in steps:
        assert record["parity/max"] <= 1e-4 and record["compile/recompiles"] == 0
    assert steps[0]["learner/kl_reference"] == pytest.approx(0, abs=1e-5)
    assert len(read_lines(run / "warmstart.jsonl")) == 4
    adapter, base = (
        sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        for folder in (run / "checkpoints" / str(len(steps)), run / "frozen_weights")
    )
    assert base > 50_000  # the weights, stored once; a checkpoint holds only the adapter and its moments
    assert adapter < 3 * base
    check_export(run, run / "frozen_weights", tmp_path / "out", scale=8.0)


def test_a_resumed_lora_run_has_the_same_numbers(resumed: tuple[Path, list[dict], bytes]):
    run, before, base = resumed
    assert (
        numbers(run) == before and (run / "checkpoints" / "3").exists()
    )  # the step was repeated, with the same numbers
    assert (run / "frozen_weights" / "model.safetensors").read_bytes() == base


def test_impossible_lora_settings_are_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    words = ["--preset", str(SMALL), "--runs-dir", str(tmp_path), "--name", "run"]
    assert cli.main([*words, "--lora.targets", "q_proj", "w_proj"]) == 2
    assert cli.main([*words, "--lora.rank", "-1"]) == 2
    assert cli.main([*words, "--lora.rank", "4", "--lora.alpha", "0"]) == 2
    assert cli.main([*words, "--lora.rank", "40"]) == 2
    lines = capsys.readouterr().err.splitlines()
    names, rank, alpha, most = [line for line in lines if line.startswith("error: ")]
    assert "--lora.targets" in names and "expected one of all, q_proj" in names and "got 'w_proj'" in names
    assert "--lora.rank: expected rank >= 0" in rank and "alpha > 0" in alpha
    assert "--lora.rank: expected rank of at most 16, the smaller side of k_proj [32, 16], got 40" in most


def test_a_reference_other_than_the_frozen_weights_requires_step_0():
    words = ["--checkpoint.keep-first", "False", "--learner.kl-coefficient", "0.1"]
    config = apply(read_preset(str(SMALL)), split(words)[1])
    lora = apply(config, split(["--lora.rank", "4"])[1])
    validate.check(lora)  # random weights: the warm start trains the base
    files = split(["--model.path", "/a/model"])[1]
    assert components.reference_is_frozen_weights(apply(lora, files | {"warmstart.episodes": ["0"]}))
    assert not components.reference_is_frozen_weights(apply(lora, files))
    with pytest.raises(ConfigError, match="--checkpoint.keep-first"):
        validate.check(config)
