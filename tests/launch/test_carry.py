"""A run with carry-over that is killed while groups are under way resumes with the same numbers."""

import shutil
from pathlib import Path

from aem_jax.checkpoint import Checkpoints
from aem_jax.launch import cli
from aem_jax.metrics import comparable, read_lines

from .test_broken_environment import SMALL

ENV = """
from aem_jax.envs.protocol import StepResult


class Env:
    def reset(self, task):
        self.left = 1 + task["seed"] % 4
        return StepResult(f"begin {task['seed']}", info={"won": False, "valid_action": True})

    def step(self, text):
        self.left -= 1
        won = self.left == 0 and len(text) % 2 == 0
        return StepResult(f"{len(text)} more", float(won), not self.left, info={"won": won, "valid_action": True})

    def close(self):
        pass
"""
CARRY = ("--rollout.carry-min-groups", "2", "--rollout.groups-per-step", "4", "--learner.importance-cap", "2")
LONGER = ("--rollout.max-turns", "4", "--rollout.context-tokens", "128", "--openenv.seeds", "6")


def test_a_killed_run_resumes_with_the_groups_under_way(tmp_path: Path, capfd):
    (tmp_path / "env.py").write_text(ENV)
    (tmp_path / "small.toml").write_text(SMALL)

    def train(name: str, num_steps: int) -> None:
        words = ["--preset", "openenv-tiny", str(tmp_path / "small.toml"), "--openenv.serve", f"{tmp_path}/env.py:Env"]
        words += ["--runs-dir", str(tmp_path), "--name", name, "--train.save-every", "2", *CARRY, *LONGER]
        assert cli.main([*words, "--train.num-steps", str(num_steps)]) == 0, capfd.readouterr().err

    numbers = lambda name: [comparable(record) for record in read_lines(tmp_path / name / "metrics.jsonl")]
    train("unbroken", 5)
    assert max(record["carry/age_max"] for record in numbers("unbroken")) >= 1
    assert all(record["compile/recompiles"] == 0 for record in numbers("unbroken"))
    train("killed", 3)
    checkpoints = tmp_path / "killed" / "checkpoints"
    shutil.rmtree(checkpoints / "3")  # as if it had been killed in step 2
    assert Checkpoints(checkpoints).extra(2)["carried"]["episodes"]
    train("killed", 5)
    assert numbers("killed") == numbers("unbroken")
