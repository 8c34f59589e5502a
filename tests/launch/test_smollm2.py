"""A preset of SmolLM2: one step of training with the real model."""

import subprocess
import sys
from pathlib import Path

import pytest

from aem_jax.metrics import read_lines

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]

TINY = [
    *("--train.num-steps", "1", "--warmstart.episodes", "0", "--rollout.groups-per-step", "1"),
    *("--rollout.group-size", "2"),
    *("--rollout.num-slots", "2", "--rollout.max-turns", "2", "--rollout.response-tokens", "16"),
    *("--rollout.context-tokens", "512", "--rollout.decode-chunk", "16", "--rollout.extend-buckets", "64"),
    *("--env.sessions-per-server", "2", "--batch.rows", "1", "--evaluation.size", "1"),
    *("--evaluation.baselines", "false", "--metrics.tensorboard", "false", "--model.dtype", "float32"),
    *("--selection.filter-equal-outcomes", "false"),  # two episodes of 16 tokens all end alike
]
"""Few tokens and few programs."""


def test_a_step_of_alfworld_smollm2(smollm2: Path, tmp_path: Path, user_environment: dict[str, str]):
    """As its user starts it; the preset names the model's file relative to the repository."""
    command = [sys.executable, "-m", "aem_jax.launch", "--preset", "alfworld-smollm2", "--runs-dir", str(tmp_path)]
    words = ["--name", "run", "--evaluation.splits", "valid_seen", "--rollout.windows"]
    # The tests' flags of XLA save compile time, but products of this size take twice as long.
    environment = {name: value for name, value in user_environment.items() if name != "XLA_FLAGS"}
    done = subprocess.run([*command, *TINY, *words], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    run = tmp_path / "run"
    (step,) = read_lines(run / "metrics.jsonl")
    assert step["rollout/turns"] == 2 and step["parity/max"] < 1e-3  # nats; in float32
    assert step["learner/tokens"] > 32 and (run / "report.html").exists()
