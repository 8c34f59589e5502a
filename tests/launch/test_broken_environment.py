"""A run with a permanently broken environment stops with a one-line error, loses nothing, and resumes after a fix."""

import json
from pathlib import Path

from aem_jax.launch import cli

ENV = """
from pathlib import Path
from aem_jax.envs.testing.echo import EchoEnv

HERE = Path(__file__).parent


class Env(EchoEnv):
    def reset(self, task):
        with open(HERE / "resets", "a") as file:
            file.write("x")
        if (HERE / "resets").stat().st_size > 8 and not (HERE / "mended").exists():
            raise RuntimeError("the license\\nhas expired")
        return super().reset({"word": "north", "length": 2})
"""
SMALL = """
[train]
num_steps = 2
save_every = 1

[openenv]
actions = ["north", "south"]

[model]
hidden_size = 16
intermediate_size = 32
num_layers = 1
num_heads = 2
num_kv_heads = 1
head_dim = 8

[tokenizer]
episodes = 4
vocab_size = 300

[rollout]
groups_per_step = 2
group_size = 2
num_slots = 8
max_turns = 2
response_tokens = 4
context_tokens = 64
prompt_tokens = 32
decode_chunk = 4
extend_buckets = [32]
windows = []

[env]
num_servers = 1
sessions_per_server = 8

[batch]
rows = 8

[evaluation]
splits = []

[metrics]
tensorboard = false
"""


def test_a_broken_environment_stops_the_run_which_resumes_when_it_is_repaired(tmp_path: Path, capfd):
    """The tokenizer needs 4 resets and step 0 needs 4. In step 1 every task breaks, replacement tasks included."""
    (tmp_path / "env.py").write_text(ENV)
    (tmp_path / "small.toml").write_text(SMALL)
    presets = ["--preset", "openenv-tiny", str(tmp_path / "small.toml")]
    words = [*presets, "--openenv.serve", f"{tmp_path}/env.py:Env", "--runs-dir", str(tmp_path), "--name", "run"]
    assert cli.main(words) == 2
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith(
        "error: the run was stopped: no episode of step 1 could be played; the first error: task seed-"
    )
    assert "RuntimeError: the license has expired (line 13 of" in last and last.endswith("the same command resumes it")
    metrics = tmp_path / "run/metrics.jsonl"
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()] == [0]
    (tmp_path / "mended").write_text("")
    assert cli.main(words) == 0
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()] == [0, 1]
