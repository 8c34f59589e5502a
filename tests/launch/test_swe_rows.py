"""Two steps of training on ten rows of R2E-Gym's published columns, with tools, a sandbox and a tiny policy."""

import json
import subprocess
from pathlib import Path

import jax
import pytest
from envs.swe.samples import CALC, FIXED
from envs.swe.sandboxes import working_bubblewrap
from envs.swe.test_r2e import FIXING, PUBLISHED

from aem_jax.envs.swe.env import PROMPT
from aem_jax.envs.swe.tools import describe
from aem_jax.launch import cli
from aem_jax.metrics import read_lines
from aem_jax.models import ModelConfig, Policy, save_pretrained
from aem_jax.tokenizer import ChatTokenizer

SMALL = """
environment = "swe"

[train]
num_steps = 2

[swe]
runtime = "bubblewrap"
max_steps = 2
command_s = 60.0
grade_s = 60.0
memory_mib = 512
disk_mib = 64

[model]
dtype = "float32"

[rollout]
groups_per_step = 5
group_size = 2
num_slots = 16
max_turns = 2
response_tokens = 8
context_tokens = 1536
prompt_tokens = 1024
decode_chunk = 8
extend_buckets = [256]
windows = []

[env]
num_servers = 1
sessions_per_server = 16
step_deadline_s = 300.0

[batch]
rows = 16

[learner]
# all episodes lose, so without it the gradient would be zero
entropy_coefficient = 0.01

[evaluation]
splits = []

[metrics]
tensorboard = false
"""


def rows(folder: Path) -> list[dict]:
    """Makes a mirror of a repository with ten commits that fix it, and returns their rows."""
    repo = folder / "calc"
    git = ["git", "-C", str(repo), "-c", "user.name=a", "-c", "user.email=a@example.invalid"]

    def commit(files) -> str:
        for name, text in files.items():
            (repo / name).parent.mkdir(parents=True, exist_ok=True)
            (repo / name).write_text(text)
        for words in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "one"]):
            subprocess.run([*git, *words], check=True)
        return subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()

    base = commit(CALC)
    parsed = json.dumps({"file_diffs": [FIXING], "old_commit_hash": base})
    fixes = [commit({"calc.py": f"{FIXED}# {number}\n"}) for number in range(10)]
    return [PUBLISHED | {"commit_hash": fix, "parsed_commit_content": parsed} for fix in fixes]


def model(folder: Path) -> Path:
    """A folder with a tokenizer and random weights."""
    texts = [PROMPT.format(repo="calc", issue="", tools=describe())] * 3
    ChatTokenizer.train(texts, vocab_size=512).save_pretrained(folder / "a")
    config = ModelConfig(512, 16, 32, 1, 2, 1, 8, qk_norm=None, qkv_bias=True, max_positions=2048)
    save_pretrained(folder / "model", config, Policy(config).init(jax.random.key(0)), source=folder / "a")
    return folder / "model"


@pytest.mark.slow
def test_ten_published_rows_train_two_steps(tmp_path: Path, capfd):
    working_bubblewrap()
    path, preset = tmp_path / "rows.jsonl", tmp_path / "small.toml"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows(tmp_path / "mirrors")))
    preset.write_text(SMALL)
    settings = {
        "--preset": preset,
        "--model.path": model(tmp_path),
        "--swe.tasks.train": path,
        "--swe.tasks.repos": tmp_path / "mirrors",
        "--runs-dir": tmp_path / "runs",
        "--name": "run",
    }
    words = [str(word) for pair in settings.items() for word in pair]
    assert cli.main(words) == 0, capfd.readouterr().err
    steps = read_lines(tmp_path / "runs" / "run" / "metrics.jsonl")
    assert [record["step"] for record in steps] == [0, 1]
    for record in steps:
        assert record["rollout/env_errors"] == record["rollout/retries"] == 0  # a grading that fails is one
        assert record["selection/groups"] == 5 and record["rollout/turns"] == 2.0
        assert record["rollout/success"] == 0.0 and record["rollout/truncated"] == 1.0
        assert record["parity/max"] <= 1e-4 and record["compile/recompiles"] == 0
        assert record["learner/grad_norm"] > 0 and record["learner/skipped"] == 0
