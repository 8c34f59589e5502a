"""Complete runs as processes: their files, and how they are stopped, killed and resumed."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from aem_jax.checkpoint.step import read_record
from aem_jax.launch import cli, evaluation
from aem_jax.metrics import comparable, read_lines

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
SMALL = Path(__file__).with_name("small.toml")
NUM_STEPS = 8


def start(folder: Path, environment: dict[str, str], *words: str, command: str = "train") -> subprocess.Popen[str]:
    line = [sys.executable, "-m", "aem_jax.launch", command, "--preset", str(SMALL), "--runs-dir", str(folder), *words]
    line += ["--metrics.efficiency-every", "4"] if command == "train" else []
    return subprocess.Popen(
        line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, env=environment
    )


def finish(process: subprocess.Popen[str], status: int = 0) -> str:
    out, _ = process.communicate(timeout=500)
    assert process.returncode == status, out
    return out


def until_steps(process: subprocess.Popen[str], run: Path, count: int) -> None:
    """Waits until the run's metrics have `count` steps."""
    deadline = time.monotonic() + 500
    while len(read_lines(run / "metrics.jsonl")) < count:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.02)


def numbers(run: Path) -> list[dict]:
    return [comparable(record) for record in read_lines(run / "metrics.jsonl")]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted run."""
    import os

    ours = {"JAX_NUM_CPU_DEVICES", "JAX_NUMPY_RANK_PROMOTION"}
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    folder = tmp_path_factory.mktemp("runs")
    finish(start(folder, environment))
    return folder / "small"


def test_a_run_writes_its_files(finished: Path):
    for name in ("config.json", "metrics.jsonl", "evaluations.jsonl", "transcripts.json", "report.html"):
        assert (finished / name).stat().st_size > 0, name
    assert list((finished / "tensorboard").glob("events*")) and (finished / "tokenizer" / "tokenizer.json").exists()
    assert {"0", "4", "8"} <= {path.name for path in (finished / "checkpoints").iterdir()}
    steps = read_lines(finished / "metrics.jsonl")
    assert [record["step"] for record in steps] == list(range(NUM_STEPS))
    for record in steps:
        assert record["parity/max"] <= 1e-4 and record["compile/recompiles"] == 0
        assert record["learner/kl_reference"] >= -1e-6
    measured = {record["step"] for record in steps if {"aem/efficiency", "aem/gain", "aem/gain_base"} <= record.keys()}
    assert measured == {0, 4}
    # the reference is the policy before the first update, which also gave the sampler's logprobs
    assert steps[0]["learner/kl_reference"] == pytest.approx(0, abs=1e-5)
    phases = [(line["phase"], line["step"]) for line in read_lines(finished / "evaluations.jsonl")]
    baselines = [(name, 0) for name in ("oracle", "searcher", "random")]
    assert phases == [*baselines, ("warmstart", 0), ("train", 4), ("final", NUM_STEPS)]


def test_a_run_that_is_killed_during_an_evaluation_loses_no_step(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run, play = tmp_path / "small", evaluation.evaluate_policy

    def killed(rollout, params, tasks, key, **names):
        if len(read_lines(run / "metrics.jsonl")) in kills:
            kills.remove(len(read_lines(run / "metrics.jsonl")))
            raise KeyboardInterrupt
        return play(rollout, params, tasks, key, **names)

    monkeypatch.setattr(evaluation, "evaluate_policy", killed)
    kills = [4, NUM_STEPS]
    line = ["train", "--preset", str(SMALL), "--runs-dir", str(tmp_path), "--train.save-every", "1000"]
    line += ["--metrics.efficiency-every", "4"]
    for done in (4, NUM_STEPS):
        assert cli.main(line) == 130
        assert len(read_lines(run / "metrics.jsonl")) == max(saved(run)) == done
    assert cli.main(line) == 0
    assert read_lines(run / "evaluations.jsonl") == read_lines(finished / "evaluations.jsonl")
    scores = {step: read_record(run / "checkpoints", step)["score"] for step in sorted(saved(run))}
    ends = {line["step"]: line["success"] for line in read_lines(run / "evaluations.jsonl") if line["step"]}
    assert scores == {0: None, **ends}


def saved(run: Path) -> set[int]:
    return {int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdigit()}


def test_a_run_that_was_stopped_killed_and_resumed_has_the_same_numbers(
    finished: Path, tmp_path: Path, user_environment
):
    """SIGTERM saves. The same command resumes, is killed at a step without a checkpoint, and resumes again."""
    run = tmp_path / "small"
    process = start(tmp_path, user_environment, "--train.save-every", "1000")
    until_steps(process, run, 1)
    process.send_signal(signal.SIGTERM)
    finish(process, status=143)
    done = len(read_lines(run / "metrics.jsonl"))
    assert done < NUM_STEPS and done in saved(run)

    process, count = start(tmp_path, user_environment), 0
    while count <= max(saved(run)):
        process.send_signal(signal.SIGCONT)
        until_steps(process, run, max(done, count) + 1)
        process.send_signal(signal.SIGSTOP)
        count = len(read_lines(run / "metrics.jsonl"))
    output = finish(start(tmp_path, user_environment), status=2)  # the same command while the first process is alive
    assert (
        f"expected no other process that writes to {tmp_path}" in output and f"got process {process.pid} on" in output
    )
    process.send_signal(signal.SIGKILL)
    process.communicate()

    output = finish(start(tmp_path, user_environment))
    assert "warm start" not in output
    assert "KV caches take" in output  # before anything is allocated
    assert numbers(run) == numbers(finished)
    ours, theirs = (read_lines(folder / "evaluations.jsonl") for folder in (run, finished))
    assert ours == theirs


def test_evaluate_prints_json_of_a_checkpoint_of_a_run_given_by_name(finished: Path, user_environment):
    out = finish(start(finished.parent, user_environment, "--name", "small", "--step", "4", command="evaluate"))
    printed = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    (then,) = [record for record in read_lines(finished / "evaluations.jsonl") if record["phase"] == "train"]
    assert then["step"] == 4 and printed == [{**then, "phase": "evaluate"}]


def test_a_checkpoint_of_a_run_is_exported(finished: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    line = ["export", str(tmp_path / "model"), "--preset", str(SMALL), "--runs-dir", str(finished.parent), "--step"]
    assert cli.main([*line, "5"]) == 2
    assert "expected a checkpoint of step 5 in" in capfd.readouterr().err
    assert cli.main([*line, "4"]) == 0
    assert f"step 4 of {finished} -> {tmp_path / 'model'}" in capfd.readouterr().out


def test_analyze_reads_the_checkpoints_of_a_run(finished: Path, capfd):
    # after so little training all responses are equally uncertain: the 0.1-nat rule would make every group flat
    line = ["analyze", str(finished), "--against", str(finished), "--states", "5", "--draws", "8", "--min-range", "0"]
    jax.config.update("jax_numpy_rank_promotion", "allow")  # as users have it
    assert cli.main(line) == 0
    results = json.loads((finished / "analysis" / "analysis.json").read_text())
    assert (results["run"], results["step"], results["rollout"]["episodes"]) == ("small", NUM_STEPS, 8)
    assert len(results["proxy"]["points"]) == results["proxy"]["states"] == 5 and results["proxy"]["draws"] == 8
    assert all(point["alpha"] != 1 and point["error"] > 0 for point in results["proxy"]["points"])
    assert {name: point["own_states"] <= 5 for name, point in results["drift"].items()} == dict.fromkeys(
        ("positive", "negative"), True
    )
    for name in ("analysis.html", "proxy.png", "drift.png", "dynamics.png"):
        assert (finished / "analysis" / name).stat().st_size > 1000, name
    assert "signs opposed" in capfd.readouterr().out


def test_a_finished_run_is_not_changed(finished: Path):
    before = numbers(finished)
    again = ["train", "--preset", str(SMALL), "--runs-dir", str(finished.parent), "--metrics.efficiency-every", "4"]
    jax.config.update("jax_numpy_rank_promotion", "allow")  # as users have it
    assert cli.main(again) == 0
    assert numbers(finished) == before


def refused(folder: Path, capfd: pytest.CaptureFixture[str], *words: str) -> str:
    """What the command prints, in this process; `test_cli.py` tests the status of a process."""
    jax.config.update("jax_numpy_rank_promotion", "allow")  # as users have it: the tests' own setting is warned of
    assert cli.main(["--preset", str(SMALL), "--runs-dir", str(folder), *words]) == 2
    return "".join(capfd.readouterr())


def test_a_changed_setting_that_affects_numbers_is_refused_by_name(finished: Path, capfd):
    out = refused(finished.parent, capfd, "--name", "small", "--aem.strength", "0")
    assert "--aem.strength 1.0, got 0.0" in out and "Traceback" not in out


def test_rows_that_the_mesh_cannot_split_are_refused_before_training(tmp_path: Path, user_environment):
    words = ("--batch.rows", "3", "--runtime.cpu-devices", "2", "--mesh.data", "2")
    out = finish(start(tmp_path, user_environment, *words), status=2)
    assert (
        "--batch.rows: expected a multiple of mesh.data × mesh.fsdp × mesh.expert = 2, got 3" in out
        and "warm start" not in out
    )


def test_a_folder_that_cannot_be_written_is_refused_in_one_line(tmp_path: Path, capfd):
    (tmp_path / "file").write_text("")
    out = refused(tmp_path / "file", capfd)
    assert out.startswith("error: ") and out.count("\n") == 1
