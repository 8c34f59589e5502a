"""Checkpoints: written by orbax in the background, complete or absent; the last few and the best one are kept.

This module adds what orbax leaves open. A run that cannot save, or cannot read its save back, stops before it trains. A
save that fails leaves the last good checkpoint, and the error names it. A damaged checkpoint is skipped for the one
before it. Reading changes nothing in the folder, and works while a run writes to it. A writer claims the folder first.
"""

import logging
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TypeVar

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from aem_jax.checkpoint import step as step_files
from aem_jax.checkpoint.lock import FolderLock, LockedError
from aem_jax.checkpoint.step import CheckpointError, LiteralPath, first_line
from aem_jax.distributed import SINGLE_PROCESS, ProcessGroup

State = TypeVar("State")

_log = logging.getLogger("aem_jax.checkpoint")

SLACK = 64 * 2**20
"""Bytes that a checkpoint leaves free, for the other files of a run."""
LOCK = ".lock"
"""File in the folder that names its writer."""
ASIDE = "unreadable"
"""Folder in it for checkpoints that could not be read."""


@dataclass(frozen=True)
class CheckpointConfig:
    """The checkpoints to keep."""

    keep: int = 3
    """Number of latest checkpoints."""
    keep_best: bool = True
    """Also the checkpoint with the highest score."""
    keep_first: bool = True
    """Also the checkpoint of step 0, the KL reference (with LoRA, the frozen weights may be it instead)."""

    def __post_init__(self):
        if self.keep < 1:
            raise ValueError(f"expected keep ≥ 1, got {self.keep}")


Choice = int | Literal["latest", "best"]
"""A checkpoint of a run: its step, the latest, or the one with the highest score."""


class Checkpoints:
    """The checkpoints of one run, in one folder, with one subfolder a step.

    Nothing in the folder changes before `claim` or the first `save`. With several processes, each writes the shards on
    its own devices into a folder that all of them see, and all of them call the same methods in the same order.
    """

    def __init__(
        self,
        folder: Path | str,
        config: CheckpointConfig = CheckpointConfig(),
        processes: ProcessGroup = SINGLE_PROCESS,
    ):
        self.folder = Path(folder).resolve()
        self._config, self._processes = config, processes
        self._fits = False
        self._lock: FolderLock | None = None
        self._manager: ocp.CheckpointManager | None = None
        self._writing: dict[int, float | None] = {}  # step -> score of the checkpoint in progress

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self.close()
        except CheckpointError as failed:
            if error is None:
                raise
            _log.error("%s", failed)  # the first error is the one to raise

    def claim(self) -> None:
        """Makes this the only writer of the folder until `close`, and creates the folder.

        Raises:
            CheckpointError: another process writes to it, it cannot be written, or the processes of the run see
                different steps in it.
        """
        if self._manager is not None:
            return
        step_files.check_path(self.folder)
        _probe(self.folder, self._processes.index)
        if self._processes.is_first:
            self._lock = _locked(self.folder)
            if not self.steps:
                step_files.mark(self.folder)
        try:
            self._manager = ocp.CheckpointManager(
                LiteralPath(self.folder),
                options=ocp.CheckpointManagerOptions(preservation_policy=_Kept(self)),
                item_names=(step_files.STATE, step_files.RECORD),
            )
            seen = self._processes.gather_json(self.steps)
            if any(steps != seen[0] for steps in seen):
                raise CheckpointError(f"expected the same steps in {self.folder} from every process, got {seen}")
        except BaseException:
            self._release()
            raise

    @property
    def is_writer(self) -> bool:
        """Whether this has claimed the folder."""
        return self._manager is not None

    @property
    def latest(self) -> int | None:
        """Step of the latest checkpoint, one in progress included; None if there is none."""
        return max(self.steps, default=None)

    @property
    def best(self) -> int | None:
        """Step of the checkpoint with the highest score; None if none has a score."""
        return self._best(self.steps)

    def find(self, choice: Choice) -> int | None:
        """The step of a chosen checkpoint, as `restore` takes it: None for the latest that can be read. Collective.

        Raises:
            CheckpointError: there is no such checkpoint.
        """
        if choice == "latest":
            return None
        # Those of one process: a run that still writes changes them, and all must read the same one.
        steps, best = self._processes.broadcast((self.steps, self.best if choice == "best" else None))
        found = best if choice == "best" else choice
        if found in steps:
            return found
        wanted = (
            "a checkpoint with a score (of an evaluation)" if choice == "best" else f"a checkpoint of step {choice}"
        )
        there = f"those of steps {', '.join(map(str, steps))}" if steps else "none"
        raise CheckpointError(f"expected {wanted} in {self.folder}, got {there}")

    @property
    def steps(self) -> list[int]:
        """Current steps of all checkpoints, in order, including damaged ones and one in progress.

        Raises:
            CheckpointError: the folder cannot be read.
        """
        try:
            names = os.listdir(self.folder)
        except (FileNotFoundError, NotADirectoryError):
            names = []
        except OSError as error:
            raise CheckpointError(f"cannot read {self.folder}: {error.strerror}") from error
        return sorted({int(name) for name in names if _is_step(name)} | set(self._writing))

    def save(
        self, step: int, state: Any, *, extra: Mapping[str, Any] | None = None, score: float | None = None
    ) -> None:
        """Writes a checkpoint in the background; the state may be donated as soon as this returns.

        The first save of a run is completed and read back in part, so that an unusable folder shows before the run
        trains. A step that already has a checkpoint is skipped.

        Args:
            step: training steps done.
            state: pytree of arrays.
            extra: a JSON mapping to save with it.
            score: of the checkpoint; the highest is the best.

        Raises:
            CheckpointError: this save, or the previous one in the background, failed; or another process has taken over
                the folder.
        """
        self.claim()
        self.wait()
        assert self._manager is not None
        if step in self.steps:
            return
        if self._lock is not None:
            try:
                self._lock.check()
            except LockedError as error:
                raise CheckpointError(f"{error} has taken over {self.folder}, which this process wrote to") from None
        if not self._fits:
            self._remove_partial()  # left by a run that was killed
        self.check_space(state)
        score = None if score is None or not math.isfinite(score) else float(score)
        try:
            saved = step_files.items(self.folder, step, state, score, extra or {})
            self._writing = {step: score}
            self._manager.save(step, args=saved, force=True)
        except Exception as error:
            raise self._failed(error) from error
        if not self._fits:
            self.wait()
            try:
                step_files.read_back(self.folder, step, state)
            except Exception as error:
                raise CheckpointError(
                    f"expected to read back what was written to {self.folder}, got {first_line(error)}; "
                    "choose another folder"
                ) from error
            self._fits = True

    def score(self, step: int, score: float) -> None:
        """Gives a saved checkpoint its score; the highest is the best. Waits until it is written. Collective.

        A score comes after the checkpoint, because an evaluation may be killed: nothing trained is lost then.

        Raises:
            CheckpointError: the checkpoint could not be written, or its record cannot be.
        """
        self.wait()
        if self._processes.is_first and math.isfinite(score) and self._score(step) is None:
            try:
                step_files.write_score(self.folder, step, float(score))
            except (OSError, ValueError) as error:
                raise CheckpointError(f"cannot record the score of step {step} in {self.folder}: {error}") from error
        self._processes.barrier()

    def wait(self) -> None:
        """Waits until no checkpoint is in progress.

        Raises:
            CheckpointError: a checkpoint could not be written.
        """
        if self._manager is None:
            return
        try:
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
        except Exception as error:
            raise self._failed(error) from error
        self._writing = {}

    def restore(self, abstract_state: State, step: int | None = None) -> State:
        """The state of a step, or of the latest that can be read.

        A checkpoint that cannot be read, or whose arrays differ from what was written, is skipped with a warning, and
        the one before it is read. If this is the folder's writer, the damaged one moves into `unreadable/`.

        Args:
            abstract_state: pytree of `jax.ShapeDtypeStruct` with the shardings to restore into.
            step: a step of `steps`; the latest by default.

        Raises:
            CheckpointError: there is none, or none can be read.
        """
        self.wait()
        failures: dict[int, Exception] = {}
        while True:
            # Listed again each time, because a run that still writes deletes old checkpoints.
            listed = self._processes.broadcast(self.steps if step is None else [step])
            wanted = max(set(listed) - failures.keys(), default=None)
            if wanted is None:
                raise CheckpointError(_unreadable(self.folder, failures)) from next(iter(failures.values()), None)
            state = None
            try:
                state = step_files.read_state(self.folder, wanted, abstract_state)
            except Exception as error:
                failures[wanted] = error
            if not self._processes.max(wanted in failures):
                self._skip(failures, wanted)
                assert state is not None
                return state
            failures.setdefault(wanted, CheckpointError("another process cannot read it"))

    def extra(self, step: int | None = None) -> dict[str, Any]:
        """The mapping saved with the state of a step, or of the latest.

        Raises:
            CheckpointError: it cannot be read.
        """
        self.wait()
        step = self.latest if step is None else step
        if step is None:
            raise CheckpointError(f"no checkpoint in {self.folder}")
        try:
            return step_files.read_record(self.folder, step)["extra"]
        except (OSError, ValueError) as error:
            raise CheckpointError(f"cannot read the values saved with step {step} in {self.folder}: {error}") from error

    def close(self) -> None:
        """Completes the checkpoint in progress and releases the folder.

        Raises:
            CheckpointError: it could not be written.
        """
        try:
            self.wait()
        finally:
            self._release()

    def check_space(self, state: Any) -> None:
        """Checks that the disk has space for a checkpoint; before the first one, for all that are kept at a time.

        Args:
            state: pytree of arrays or shape structs.

        Raises:
            CheckpointError: too little space; the message says how much is needed.
        """
        if not self._processes.is_first:
            return  # the folder is shared
        size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
        copies = 1
        if not self._fits:
            copies = 1 + self._config.keep + self._config.keep_best + self._config.keep_first - len(self.steps)
        needed, free = max(copies, 1) * size + SLACK, shutil.disk_usage(self.folder).free
        if free < needed:
            raise CheckpointError(
                f"expected {needed / 2**30:.2f} GiB free for {max(copies, 1)} checkpoints of {size / 2**30:.2f} GiB in "
                f"{self.folder}, got {free / 2**30:.2f}; free some or keep fewer. {self._last_good()}"
            )

    def kept(self, steps: Sequence[int]) -> set[int]:
        """The steps among these that the config keeps."""
        latest = set(sorted(steps)[-self._config.keep :])
        best = self._best(steps) if self._config.keep_best else None
        return latest | ({0} if self._config.keep_first else set()) | ({best} if best is not None else set())

    def _best(self, steps: Sequence[int]) -> int | None:
        scores = {step: self._score(step) for step in steps}
        return max(
            (pair for pair in scores.items() if pair[1] is not None), key=lambda pair: pair[::-1], default=[None]
        )[0]

    def _score(self, step: int) -> float | None:
        if step in self._writing:
            return self._writing[step]
        try:
            return step_files.read_record(self.folder, step)["score"]
        except (OSError, ValueError):
            return None  # an unreadable checkpoint is not the best

    def _failed(self, error: Exception) -> CheckpointError:
        """Removes the partial checkpoint, and returns an error that names the last good one."""
        self._writing = {}
        self._remove_partial()
        if self._manager is not None:
            self._manager.reload()
        return CheckpointError(
            f"cannot write a checkpoint into {self.folder}: {first_line(error)}. {self._last_good()}"
        )

    def _remove_partial(self) -> None:
        if self._processes.is_first:
            for partial in self.folder.glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(partial, ignore_errors=True)

    def _last_good(self) -> str:
        good = self.steps
        return f"The last good checkpoint is that of step {good[-1]}" if good else "There is no good checkpoint yet"

    def _skip(self, failures: Mapping[int, Exception], taken: int) -> None:
        """Warns of the checkpoints that were skipped for that of step `taken`; the writer moves them aside."""
        claimed = self._manager is not None
        for step, error in failures.items() if self._processes.is_first else ():
            if not (self.folder / str(step)).exists():
                continue  # the run that writes deleted it while it was read
            how = "cannot be read and is put aside" if claimed else "cannot be read"
            _log.warning("checkpoint of step %d %s, step %d is taken: %s", step, how, taken, first_line(error))
            if claimed:
                self._put_aside(self.folder / str(step))
        if failures and self._manager is not None:
            self._processes.barrier()
            self._manager.reload()

    def _put_aside(self, path: Path) -> None:
        aside = self.folder / ASIDE / path.name
        aside.parent.mkdir(exist_ok=True)
        if aside.is_dir() and not aside.is_symlink():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            aside.unlink(missing_ok=True)
        path.rename(aside)

    def _release(self) -> None:
        manager, held = self._manager, self._lock
        self._manager = self._lock = None
        try:
            if manager is not None:
                manager.close()
        finally:
            if held is not None:
                held.release()


class _Kept(checkpoint_managers.PreservationPolicy):
    """Orbax's policy of which checkpoints to keep, from `Checkpoints.kept`."""

    def __init__(self, checkpoints: Checkpoints):
        self._checkpoints = checkpoints

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        kept = self._checkpoints.kept([checkpoint.step for checkpoint in checkpoints])
        return [checkpoint.step in kept for checkpoint in checkpoints]


def _is_step(name: str) -> bool:
    return name.isascii() and name.isdigit() and str(int(name)) == name


def _locked(folder: Path) -> FolderLock:
    def waiting(holder: str) -> None:
        _log.warning("%s wrote to %s; looking whether it still does", holder, folder)

    try:
        return FolderLock(folder / LOCK, waiting)
    except LockedError as error:
        raise CheckpointError(
            f"expected no other process that writes to {folder}, got {error}; wait until it has ended, or stop it"
        ) from None
    except OSError as error:
        raise CheckpointError(f"cannot lock {folder}: {error}") from error


def _probe(folder: Path, process: int) -> None:
    """Writes and deletes a file, the only test of permissions, read-only mounts and quotas."""
    probe = folder / f".probe-{process}-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with probe.open("wb") as file:
            file.write(b"\0" * 4096)
            file.flush()
            os.fsync(file.fileno())
        probe.unlink()
    except OSError as error:
        probe.unlink(missing_ok=True) if folder.is_dir() else None
        raise CheckpointError(
            f"expected a folder to write checkpoints into, got {folder}: {error.strerror}; choose another one"
        ) from error


def _unreadable(folder: Path, failures: Mapping[int, Exception]) -> str:
    if not failures:
        return f"no checkpoint in {folder}"
    step, error = next(iter(failures.items()))
    return (
        f"no checkpoint in {folder} can be read into this state; that of step {step}: {first_line(error)}. "
        "Has the model or the optimizer been changed since?"
    )
