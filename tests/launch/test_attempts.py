"""Attempts that end before a run's first checkpoint: nothing of them is kept under other settings."""

import json
import shutil
from pathlib import Path

from aem_jax.checkpoint import CheckpointError, Checkpoints
from aem_jax.launch import cli

SMALL = Path(__file__).with_name("small.toml")
SHORT = [
    "--train.num-steps",
    "0",
    "--warmstart.episodes",
    "0",
    "--evaluation.splits",
    "--evaluation.baselines",
    "false",
]


def train(folder: Path, *words: str) -> int:
    return cli.main(["train", "--preset", str(SMALL), "--runs-dir", str(folder), "--name", "run", *SHORT, *words])


def vocabulary(run: Path) -> int:
    return len(json.loads((run / "tokenizer" / "tokenizer.json").read_text())["model"]["vocab"])


def claimed(checkpoints: Checkpoints) -> None:
    raise CheckpointError("another process writes")


def test_settings_may_change_until_there_is_a_checkpoint(tmp_path: Path, capfd, monkeypatch):
    run = tmp_path / "run"
    assert train(tmp_path, "--mesh.data", "5") == 2  # of eight devices; noticed after the tokenizer was made
    before = vocabulary(run)
    assert not (run / "config.json").exists()
    assert train(tmp_path, "--tokenizer.vocab-size", "400") == 0
    assert vocabulary(run) < before and json.loads((run / "config.json").read_text())["tokenizer"]["vocab_size"] == 400

    assert train(tmp_path, "--tokenizer.vocab-size", "350") == 2
    assert "was begun with --tokenizer.vocab-size 400, got 350" in capfd.readouterr().err
    shutil.rmtree(run / "checkpoints")  # as if it had ended before the first one
    with monkeypatch.context() as patch:  # as if it went on in another process
        patch.setattr(Checkpoints, "claim", claimed)
        assert train(tmp_path, "--tokenizer.vocab-size", "350") == 2
    assert "another process writes" in capfd.readouterr().err
    assert (run / "tokenizer").exists() and json.loads((run / "config.json").read_text())["tokenizer"][
        "vocab_size"
    ] == 400
    assert train(tmp_path, "--tokenizer.vocab-size", "350") == 0
    assert vocabulary(run) < 400 and json.loads((run / "config.json").read_text())["tokenizer"]["vocab_size"] == 350
