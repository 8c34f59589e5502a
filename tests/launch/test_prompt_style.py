"""A run whose prompts list the admissible actions gets them from its servers, and stops where they are not sent."""

from pathlib import Path

from envs.servers import served

from aem_jax.launch import cli
from aem_jax.metrics import read_lines

SMALL = Path(__file__).with_name("small.toml")
SINGLE = ("--rollout.context", "window", "--rollout.prompt-style", "single", "--warmstart.episodes", "0")
SIZES = ("--rollout.prompt-tokens", "1000", "--rollout.context-tokens", "1024", "--rollout.extend-buckets", "256")
SHORT = ("--train.num-steps", "0", "--evaluation.size", "2", "--metrics.tensorboard", "false")


def evaluate(folder: Path, *words: str) -> int:
    return cli.main(["--preset", str(SMALL), "--runs-dir", str(folder), *SINGLE, *SIZES, *SHORT, *words])


def test_the_runs_own_servers_send_the_admissible_actions(tmp_path: Path, capfd):
    assert evaluate(tmp_path, "--name", "own") == 0, capfd.readouterr().err
    last = read_lines(tmp_path / "own" / "evaluations.jsonl")[-1]
    assert (last["phase"], last["count"], last["env_errors"]) == ("final", 2, 0) and last["mean_turns"] > 1


def test_the_first_reply_without_them_stops_the_run(tmp_path: Path, capfd):
    with served("alfworld", "--sessions", "8") as (url, _):
        assert evaluate(tmp_path, "--name", "others", "--env.urls", f"ws://{url}") == 2
    out = capfd.readouterr()
    assert "start servers of --env.urls with --send-admissible" in out.err
    assert "--send-admissible" in out.err.split("this run's are: ")[1].split("\n")[0]
