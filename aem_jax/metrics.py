"""Numbers of a run: JSON lines for programs, TensorBoard events and, if wanted, Weights & Biases for people.

`metrics.jsonl` is the record that counts: one line per step, complete or absent. A run resumed at step s drops its
lines from s on before it goes on, so that its file equals that of a run which was never stopped, but for the clock:
what depends on it stands under `time/` and `throughput/`, and `comparable` leaves that out.
"""

import json
import logging
import math
import os
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from aem_jax.files import parse_json, valid_text, write_text

log = logging.getLogger(__name__)

CLOCK = ("time/", "throughput/")
"""Prefixes of the metrics that depend on the clock: two equal runs differ in these and in no others."""


@dataclass(frozen=True)
class MetricsConfig:
    """Where the numbers of a run go. `metrics.jsonl` is always written."""

    tensorboard: bool = True
    """Write TensorBoard events into the run's `tensorboard/`."""
    wandb_project: str = ""
    """Weights & Biases project to log to; empty for none. Needs the extra `wandb`."""


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, float | int | None]:
    """Nested mappings of scalars → one level, keys joined by `/`, plain Python numbers.

    Args:
        values: scalars (Python, numpy or jax) or mappings of them, to any depth.
        prefix: what all keys begin with.

    Returns:
        numbers by name, in the order given; a number that is not finite is None, for which JSON has a word.

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
            found = f"{array.dtype} of shape {array.shape}" if array.size != 1 else repr(value)
            raise ValueError(f"expected one number under {key!r}, got {found}; reduce or drop it before it is written")
        number = array.reshape(()).item()
        flat[key] = number if math.isfinite(number) else None
    return flat


def comparable(record: Mapping[str, Any]) -> dict[str, Any]:
    """A line of `metrics.jsonl` without what depends on the clock: equal for equal runs."""
    return {name: value for name, value in record.items() if not name.startswith(CLOCK)}


def read_lines(path: Path | str) -> list[dict[str, Any]]:
    """The records of a JSON-lines file in order. A missing file is empty.

    A last line that a kill cut short is left out. So is any other line that is no record, with a warning: a run and its
    report do not end for it.
    """
    path = Path(path)
    if not path.exists():
        return []
    # An unfinished last line may be whole but for its line break.
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
    """Appends one record as one line in one write: a reader, or a run that comes back, sees all of it or none."""
    line = json_line(record) + "\n"
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)


def json_line(record: Any) -> str:
    """A record as JSON that can be encoded: numbers that are not finite become null, half surrogate pairs U+FFFD."""
    return valid_text(json.dumps(_finite(record), allow_nan=False, ensure_ascii=False))


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def drop_lines(path: Path | str, step: int) -> None:
    """Drops the records of `step` and later ones, and any line cut short, from a JSON-lines file. Atomic."""
    path = Path(path)
    if not path.exists():
        return
    kept = [record for record in read_lines(path) if record.get("step", -1) < step]
    write_text(path, "".join(json_line(record) + "\n" for record in kept))


class MetricsWriter:
    """Writes one line of numbers per step to everything that the config names. A context manager.

    Writing is done in a thread of its own, in order, so that no step waits for a disk or a service. An error in it
    comes up at the next call.

    Args:
        run_dir: the run's folder, made if it is not there.
        config: where the numbers go.
        start_step: first step that this process will write; what an earlier process wrote from there on is dropped.
        run_config: the run's settings, shown beside the curves where the place has room for them.

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
        """Writes the numbers of one step; returns them as they will stand in the file."""
        record = {"step": int(step), **flatten(values)}
        self.later(lambda: self._write(step, record))
        return record

    def later(self, work: Callable[[], None]) -> None:
        """Does work behind what is being written.

        Raises:
            OSError: what was to be written before could not be; so with other errors of earlier work.
        """
        while self._unfinished and self._unfinished[0].done():
            self._unfinished.popleft().result()
        self._unfinished.append(self._thread.submit(work))

    def wait(self) -> None:
        """Until all is written; raises as `later`."""
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
        """Waits for what is being written, and closes what is open; raises as `later`."""
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
    from tensorboardX import SummaryWriter  # 0.5 s of protobuf, for those who want it

    return SummaryWriter(str(folder), purge_step=start_step or None)


def _open_wandb(project: str, run_dir: Path, run_config: Mapping[str, Any] | None) -> Any:
    try:
        import wandb
    except ImportError:
        raise ValueError(
            f"expected wandb to be installed for metrics.wandb_project {project!r}, got no such module; "
            "pip install 'aem_jax[wandb]' or leave wandb_project empty"
        ) from None
    settings = dict(run_config or {})
    return wandb.init(project=project, name=run_dir.name, dir=str(run_dir), config=settings, resume="allow")
