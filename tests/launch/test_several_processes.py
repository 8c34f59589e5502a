"""Runs of two processes through the normal command: refused when incompatible, killed, resumed, stopped."""

import signal
import subprocess
import time
from pathlib import Path

import pytest

from aem_jax.metrics import comparable, read_lines

from ..distributed.processes import finish, free_port, start

SMALL = Path(__file__).with_name("small.toml")
SHORT = (
    *("--evaluation.baselines", "false", "--evaluation.every", "0", "--evaluation.size", "4"),
    *("--warmstart.episodes", "8", "--warmstart.steps", "2", "--rollout.max-turns", "2"),
    *("--warmstart.only-successful", "false", "--tokenizer.episodes", "8"),
    *("--env.sessions-per-server", "4", "--train.save-every", "1", "--metrics.tensorboard", "false"),
)


def pair(folder: Path, environment: dict[str, str], *words: str, own=((), ())) -> list[subprocess.Popen[str]]:
    """Two processes of one device each; `own` holds the arguments of each process."""
    together = ("--runtime.coordinator", f"localhost:{free_port()}", "--runtime.num-processes", "2")
    return [
        start(
            ["-m", "aem_jax.launch", "--preset", str(SMALL), "--name", "run", "--runs-dir", str(folder), *SHORT]
            + ["--runtime.cpu-devices", "1", *together, "--runtime.process-id", str(index), *words, *own[index]],
            environment,
        )
        for index in (0, 1)
    ]


def until_steps(processes: list[subprocess.Popen[str]], run: Path, count: int) -> None:
    """Waits until the run's metrics have `count` steps and a checkpoint of the last step but one exists."""
    deadline = time.monotonic() + 500
    while len(read_lines(run / "metrics.jsonl")) < count or not (run / "checkpoints" / str(count - 1)).exists():
        for process in processes:
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.02)


def numbers(run: Path) -> list[dict]:
    return [comparable(record) for record in read_lines(run / "metrics.jsonl")]


@pytest.mark.slow
def test_two_processes_are_killed_resumed_stopped_and_finished_by_one(tmp_path: Path, user_environment):
    run = tmp_path / "run"
    processes = pair(tmp_path, user_environment, "--train.num-steps", "1000")
    until_steps(processes, run, 2)
    processes[1].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    output, _ = finish(processes, [75, -signal.SIGKILL], timeout_s=60)
    assert time.monotonic() - killed < 60
    assert "error: process 1 (on " in output and "the same command resumes it" in output
    before = numbers(run)

    processes = pair(tmp_path, user_environment, "--train.num-steps", "1000")
    until_steps(processes, run, len(before) + 1)
    processes[1].send_signal(signal.SIGTERM)
    output, quiet = finish(processes, [143, 143])
    assert "warm start" not in output and "train" not in quiet
    after = numbers(run)
    assert after[: len(before)] == before  # the repeated steps give the same numbers
    assert [record["step"] for record in after] == list(range(len(after)))
    assert (run / "checkpoints" / str(len(after))).exists()

    last = str(len(after) + 1)
    one = ["-m", "aem_jax.launch", "--preset", str(SMALL), "--name", "run", "--runs-dir", str(tmp_path), *SHORT]
    alone = start([*one, "--env.sessions-per-server", "8", "--train.num-steps", last], user_environment)
    finish([alone], [0])
    assert len(numbers(run)) == int(last) and (run / "report.html").exists()


@pytest.mark.slow
def test_processes_with_differing_settings_are_refused(tmp_path: Path, user_environment):
    different = ((), ("--aem.strength", "0.5"))
    for output in finish(pair(tmp_path, user_environment, own=different), [2, 2]):
        assert "error: --aem.strength: expected the same in all processes, got 1.0 in process 0 and 0.5 in" in output
        assert "Traceback" not in output


@pytest.mark.slow
def test_a_refusal_by_process_0_alone_ends_all_with_its_status(tmp_path: Path, user_environment):
    """A scheduler starts a lost run again, but not one that is refused."""
    (tmp_path / "run" / "checkpoints" / "1").mkdir(parents=True)  # a checkpoint without the run's config.json
    refused, told = finish(pair(tmp_path, user_environment), [2, 2])
    complaint = f"expected the config.json that {tmp_path / 'run'} was begun with beside its checkpoints"
    assert f"error: {complaint}" in refused
    assert f"left: {complaint}" in told and "once that is solved, the same command resumes it" in told
    assert "stack trace" not in told and "Traceback" not in refused + told


def test_a_missing_coordinator_is_refused_in_one_line(tmp_path: Path, user_environment):
    where = ("--runtime.coordinator", f"localhost:{free_port()}", "--runtime.num-processes", "2")
    words = ("--runtime.process-id", "1", "--runtime.connect-timeout-s", "1", *where)
    alone = start(
        ["-m", "aem_jax.launch", "--preset", str(SMALL), "--runs-dir", str(tmp_path), *words], user_environment
    )
    [output] = finish([alone], [75])
    assert "error: --runtime.coordinator: the other processes of the run were not met within 1 s" in output
