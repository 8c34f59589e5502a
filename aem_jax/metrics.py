"""Numbers of a run: JSON lines for programs, TensorBoard events and, optionally, Weights & Biases for people.

`metrics.jsonl` is the authoritative record: one line a step, complete or absent. A run resumed at step s first drops
the lines from s on, so its file equals that of an uninterrupted run, but for the metrics that depend on the clock. They
are named `time/…` and `throughput/…`; `comparable` removes them.

`evaluations.jsonl` has a line for each `Evaluation`, written by `record` and read by `read_evaluation`.
"""

import errno
import json
import logging
import math
import os
import secrets
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from aem_jax.files import parse_json, valid_text, write_text

log = logging.getLogger(__name__)

CLOCK = ("time/", "throughput/")
"""Prefixes of the metrics that depend on the clock; all others are equal in two equal runs."""


@dataclass(frozen=True)
class MetricsConfig:
    """Where metrics are written, besides `metrics.jsonl`, and those that cost time."""

    tensorboard: bool = True
    """Write TensorBoard events to the run's `tensorboard/`."""
    wandb_project: str = ""
    """Weights & Biases project; empty for none. Needs the extra `wandb`."""
    efficiency_every: int = 0
    """Steps between measurements of aem/efficiency, AEM's gain of return per step relative to the base algorithm's; one
    takes six gradients of half the groups. 0: none."""

    def __post_init__(self) -> None:
        if self.efficiency_every < 0:
            raise ValueError(f"expected metrics.efficiency_every of at least 0 (never), got {self.efficiency_every}")


@dataclass(frozen=True)
class Rate:
    """A share of successes in [0, 1] with its 95 % interval (Wilson), and the number of episodes."""

    success: float
    low: float
    high: float
    count: int


@dataclass(frozen=True)
class Evaluation:
    """One pass of an agent over a fixed set of tasks.

    Attributes:
        set: name of the set, with its hash.
        split: the split that the set is drawn from.
        rate: success over all tasks, without those that the environment broke or whose first prompt was too long.
        by_task_type: success by task type.
        mean_score: mean of the task's own score, in [0, 1]; the success where it has none.
        mean_turns: mean number of turns of an episode.
        mean_return: mean undiscounted return of an episode.
        env_errors: number of episodes left out because the environment broke.
        overlong_prompts: number of tasks left out because their first prompt has more than `rollout.prompt_tokens`.
        step: training step, in an evaluation that was read from a record.
        phase: phase of the run, or name of the agent, in an evaluation that was read from a record.
    """

    set: str
    split: str
    rate: Rate
    by_task_type: Mapping[str, Rate]
    mean_score: float | None
    mean_turns: float | None
    mean_return: float | None
    env_errors: int = 0
    overlong_prompts: int = 0
    step: int = 0
    phase: str = ""

    def record(self, step: int, phase: str) -> dict[str, Any]:
        """One line of `evaluations.jsonl`."""
        return {
            "step": step,
            "phase": phase,
            "set": self.set,
            "split": self.split,
            **asdict(self.rate),
            "by_task_type": {task_type: asdict(rate) for task_type, rate in self.by_task_type.items()},
            "mean_score": self.mean_score,
            "mean_turns": self.mean_turns,
            "mean_return": self.mean_return,
            "env_errors": self.env_errors,
            "overlong_prompts": self.overlong_prompts,
        }


def read_evaluation(record: Mapping[str, Any]) -> Evaluation | None:
    """The evaluation of a line of `evaluations.jsonl`; missing fields have defaults. None without a success."""
    rate = _read_rate(record)
    if rate is None:
        return None
    by_task_type = record.get("by_task_type")
    rates = {name: _read_rate(value) for name, value in by_task_type.items()} if isinstance(by_task_type, dict) else {}
    return Evaluation(
        set=str(record.get("set", "")),
        split=str(record.get("split", "evaluation")),
        rate=rate,
        by_task_type={task_type: value for task_type, value in rates.items() if value is not None},
        mean_score=_number_or_none(record.get("mean_score")),
        mean_turns=_number_or_none(record.get("mean_turns")),
        mean_return=_number_or_none(record.get("mean_return")),
        env_errors=int(_number_or_none(record.get("env_errors")) or 0),
        overlong_prompts=int(_number_or_none(record.get("overlong_prompts")) or 0),
        step=int(_number_or_none(record.get("step")) or 0),
        phase=str(record.get("phase", "train")),
    )


def _read_rate(record: Any) -> Rate | None:
    if not isinstance(record, dict) or not is_number(record.get("success")):
        return None
    success = float(record["success"])
    low, high = (_number_or_none(record.get(name)) for name in ("low", "high"))
    return Rate(
        success=success,
        low=success if low is None else min(low, success),
        high=success if high is None else max(high, success),
        count=int(_number_or_none(record.get("count")) or 0),
    )


def is_number(value: Any) -> bool:
    """Whether a value of a record is a number, NaN excluded."""
    return isinstance(value, int | float) and value == value


def _number_or_none(value: Any) -> float | None:
    return float(value) if is_number(value) else None


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, float | int | None]:
    """Nested mappings of scalars → one level of plain Python numbers, keys joined by `/`.

    Args:
        values: scalars (Python, numpy or jax) or mappings of them, to any depth.
        prefix: of all keys.

    Returns:
        Numbers by name, in the input's order. A number that is not finite is None, since JSON has no such numbers.

    Raises:
        ValueError: a leaf is not one number.
    """
    flat: dict[str, float | int | None] = {}
    for name, value in values.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{key}/")
            continue
        array = np.asarray(value)
        if array.size != 1 or (array.dtype.kind not in "biuf" and array.dtype.name != "bfloat16"):
            got = f"{array.dtype} of shape {array.shape}" if array.size != 1 else repr(value)
            raise ValueError(f"expected one number under {key!r}, got {got}; reduce or drop it before it is written")
        number = array.reshape(()).item()
        flat[key] = number if math.isfinite(number) else None
    return flat


def comparable(record: Mapping[str, Any]) -> dict[str, Any]:
    """A line of `metrics.jsonl` without the metrics that depend on the clock: equal for equal runs."""
    return {name: value for name, value in record.items() if not name.startswith(CLOCK)}


def read_lines(path: Path | str) -> list[dict[str, Any]]:
    """The records of a JSON-lines file in order; a missing file has none.

    A last line that a kill cut short is skipped. Any other damaged line is skipped with a warning, so that it ends
    neither the run nor its report.
    """
    path = Path(path)
    if not path.exists():
        return []
    # The unfinished last line may be complete but for its line break.
    *lines, unfinished = path.read_bytes().split(b"\n")
    records = []
    for number, line in enumerate([*lines, unfinished], start=1):
        if not line.strip():
            continue
        source = f"{path} line {number}"
        try:
            record = parse_json(line, source)
            if not isinstance(record, dict):
                raise ValueError(f"{source}: expected a JSON mapping, got {type(record).__name__}")
        except ValueError as error:
            if number <= len(lines):
                log.warning("left out: %s", error)
        else:
            records.append(record)
    return records


def append_line(path: Path | str, record: Mapping[str, Any]) -> None:
    """Appends one record as one line in one write, so that a reader or a resumed run gets the complete line or none.

    Raises:
        OSError: there is no room for the line; the file is as before.
    """
    line = (json_line(record) + "\n").encode()
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        before = os.fstat(descriptor).st_size
        if os.write(descriptor, line) < len(line):
            os.ftruncate(descriptor, before)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    finally:
        os.close(descriptor)


def json_line(record: Any) -> str:
    """A record as valid JSON: numbers that are not finite become null, lone surrogates U+FFFD."""
    return valid_text(json.dumps(_finite(record), allow_nan=False, ensure_ascii=False))


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def drop_lines(path: Path | str, step: int) -> None:
    """Drops the records from `step` on, and damaged lines, from a JSON-lines file; atomic."""
    path = Path(path)
    if not path.exists():
        return
    kept = [record for record in read_lines(path) if record.get("step", -1) < step]
    write_text(path, "".join(json_line(record) + "\n" for record in kept))


class MetricsWriter:
    """Writes the metrics of each step to all destinations of the config. A context manager.

    A background thread writes, in order, so that no step waits for a disk or a service. The next call raises an error
    of that thread.

    Args:
        run_dir: the run's folder; created if it does not exist.
        config: the destinations.
        start_step: first step that this process writes; lines of an earlier process from there on are dropped.
        run_config: the run's settings, for Weights & Biases.

    Raises:
        ValueError: `wandb_project` is set and wandb is not installed.
    """

    def __init__(
        self,
        run_dir: Path | str,
        config: MetricsConfig = MetricsConfig(),
        *,
        start_step: int = 0,
        run_config: Mapping[str, Any] | None = None,
    ):
        self.run_dir = Path(run_dir)
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self.path = self.run_dir / "metrics.jsonl"
        drop_lines(self.path, start_step)
        self._tensorboard = _open_tensorboard(self.run_dir / "tensorboard", start_step) if config.tensorboard else None
        self._wandb = _open_wandb(config.wandb_project, self.run_dir, run_config) if config.wandb_project else None
        self._thread = ThreadPoolExecutor(1, "metrics")
        self._unfinished: deque[Future[None]] = deque()

    def write(self, step: int, values: Mapping[str, Any]) -> dict[str, float | int | None]:
        """Writes the metrics of one step; returns the line of the file."""
        record = {"step": int(step), **flatten(values)}
        self.submit(lambda: self._write(step, record))
        return record

    def submit(self, work: Callable[[], None]) -> None:
        """Queues work for the writing thread.

        Raises:
            OSError: an earlier write failed; other errors of earlier work likewise.
        """
        while self._unfinished and self._unfinished[0].done():
            self._unfinished.popleft().result()
        self._unfinished.append(self._thread.submit(work))

    def wait(self) -> None:
        """Waits until everything queued is written; raises as `submit`."""
        while self._unfinished:
            self._unfinished.popleft().result()

    def _write(self, step: int, record: Mapping[str, float | int | None]) -> None:
        append_line(self.path, record)
        if self._tensorboard is not None:
            for name, value in record.items():
                if name != "step" and value is not None:
                    self._tensorboard.add_scalar(name, value, step)
            self._tensorboard.flush()
        if self._wandb is not None:
            self._wandb.log(dict(record), step=step)

    def close(self) -> None:
        """Waits as `wait`, then closes all destinations; raises as `submit`."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            self._close()

    def _close(self) -> None:
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _open_tensorboard(folder: Path, start_step: int) -> Any:
    from tensorboardX import SummaryWriter  # takes 0.5 s, so it is imported only where it is used

    return SummaryWriter(str(folder), purge_step=start_step or None)


def _open_wandb(project: str, run_dir: Path, run_config: Mapping[str, Any] | None) -> Any:
    try:
        import wandb
    except ImportError:
        raise ValueError(
            f"expected wandb to be installed for metrics.wandb_project {project!r}, got no such module; "
            "pip install 'aem_jax[wandb]' or leave wandb_project empty"
        ) from None
    settings, known = dict(run_config or {}), run_dir / "wandb_id"
    if not known.exists():
        write_text(known, secrets.token_hex(4))
    identity = {"id": known.read_text(encoding="utf-8"), "resume": "allow"}  # a resumed run goes on in the same one
    return wandb.init(project=project, name=run_dir.name, dir=str(run_dir), config=settings, **identity)
