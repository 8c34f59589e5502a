"""Checkpoints: written in the background, complete or absent, the last few and the best one kept. The work is orbax's.

What is ours: a run that could not save says so before it trains, a save that fails leaves the last good checkpoint and
says which it is, and a checkpoint that cannot be read is put aside for the one before it.
"""

import logging
import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from aem_jax.hosts import ALONE, Hosts

State = TypeVar("State")

_log = logging.getLogger(__name__)

SLACK = 64 * 2**20
"""Bytes that have to stay free beside a checkpoint, for everything else that a run writes."""


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read; the message says why, and what is still good."""


@dataclass(frozen=True)
class CheckpointConfig:
    """Which checkpoints are kept."""

    keep: int = 3
    """The last so many."""
    keep_best: bool = True
    """Also the one with the highest score."""
    keep_first: bool = True
    """Also that of step 0, which KL to the reference needs (but not with LoRA where that is the frozen weights)."""

    def __post_init__(self):
        if self.keep < 1:
            raise ValueError(f"expected keep ≥ 1, got {self.keep}")


class Checkpoints:
    """The checkpoints of one run, in one folder, one subfolder a step.

    On several hosts each process writes what lies on its devices: the folder is one that all of them see, and all of
    them call the same methods in the same order.
    """

    def __init__(self, folder: Path | str, config: CheckpointConfig = CheckpointConfig(), hosts: Hosts = ALONE):
        """Opens or makes the folder. Reading what another process is writing is fine.

        Raises:
            CheckpointError: the folder cannot be written, or the processes of the run do not see the same in it.
        """
        self.folder = Path(folder).resolve()
        self._config, self._hosts = config, hosts
        self._fits = False
        _probe(self.folder, hosts.index)
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(preservation_policy=_preservation(config), best_fn=_score),
            item_names=("state", "extra"),
        )
        seen = hosts.gather_json(self.steps)
        if any(steps != seen[0] for steps in seen):
            raise CheckpointError(f"expected the same steps in {self.folder} from every process, got {seen}")

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self.close()
        except CheckpointError as failed:
            if error is None:
                raise
            _log.error("%s", failed)  # the first error is the one to show

    @property
    def latest(self) -> int | None:
        """Step of the latest checkpoint, that which is being written included; None if there is none."""
        return self._manager.latest_step()

    @property
    def best(self) -> int | None:
        """Step of the checkpoint with the highest score; None if none has one."""
        step = self._manager.best_step()
        return step if step is not None and "score" in (self._manager.metrics(step) or {}) else None

    @property
    def steps(self) -> list[int]:
        """Steps of all checkpoints, in order."""
        return sorted(self._manager.all_steps())

    def save(
        self, step: int, state: Any, *, extra: Mapping[str, Any] | None = None, score: float | None = None
    ) -> None:
        """Writes a checkpoint in the background; the state may be donated as soon as this returns.

        The first save of a run is waited for, so that a folder which cannot hold the run shows before it trains.
        A step that is there already is left as it is.

        Args:
            step: rollout steps done.
            state: pytree of arrays.
            extra: JSON mapping beside it: data-iterator state, PRNG key data, …
            score: decides which checkpoint is the best, higher is better.

        Raises:
            CheckpointError: this save, or the one before that ran in the background, failed.
        """
        self.wait()
        if step in self.steps:
            return
        if not self._fits:
            self._take_away_half_written()  # by a run that was killed
        self.check_space(state)
        try:
            self._manager.save(
                step,
                args=_items(state=ocp.args.StandardSave(state), extra=ocp.args.JsonSave(dict(extra or {}))),
                metrics={} if score is None else {"score": float(score)},
                force=True,
            )
        except Exception as error:
            raise self._failed(error) from error
        if not self._fits:
            self.wait()
            self._fits = True

    def wait(self) -> None:
        """Until nothing is being written.

        Raises:
            CheckpointError: what was being written could not be.
        """
        try:
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
        except Exception as error:
            raise self._failed(error) from error

    def restore(self, abstract_state: State, step: int | None = None) -> State:
        """The state of a step, or of the latest that can be read.

        A checkpoint that cannot be read is moved into `unreadable/` with a warning, and the one before it is taken.

        Args:
            abstract_state: pytree of `jax.ShapeDtypeStruct` with shardings: where every array goes on the mesh.
            step: a step of `steps`; the latest by default.

        Raises:
            CheckpointError: there is none, or none can be read.
        """
        self.wait()
        wanted = list(reversed(self.steps)) if step is None else [step]
        failures: dict[int, Exception] = {}
        for each in wanted:
            try:
                items = self._manager.restore(each, args=_items(state=ocp.args.StandardRestore(abstract_state)))
            except Exception as error:
                failures[each] = error
            if self._hosts.largest(each in failures):
                failures.setdefault(each, CheckpointError("another process cannot read it"))
                continue
            self._put_aside(failures, each)
            return items["state"]
        raise CheckpointError(_unreadable(self.folder, failures)) from next(iter(failures.values()), None)

    def extra(self, step: int | None = None) -> dict[str, Any]:
        """What was saved beside the state of a step, or of the latest.

        Raises:
            CheckpointError: it cannot be read.
        """
        self.wait()
        try:
            return self._manager.restore(step, args=_items(extra=ocp.args.JsonRestore()))["extra"]
        except Exception as error:
            raise CheckpointError(f"cannot read what was saved beside step {step} in {self.folder}: {error}") from error

    def close(self) -> None:
        """Waits for what is being written and lets go of the folder.

        Raises:
            CheckpointError: what was being written could not be.
        """
        try:
            self.wait()
        finally:
            self._manager.close()

    def check_space(self, state: Any) -> None:
        """Looks whether a checkpoint fits; before the first one, whether all that ever lie side by side do.

        Args:
            state: pytree of arrays or shape structs.

        Raises:
            CheckpointError: it does not; says how much is missing.
        """
        if not self._hosts.is_first:
            return  # one look at a shared folder is enough
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

    def _failed(self, error: Exception) -> CheckpointError:
        """Takes the half-written checkpoint away and says what is left."""
        self._take_away_half_written()
        self._manager.reload()
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        return CheckpointError(f"cannot write a checkpoint into {self.folder}: {first}. {self._last_good()}")

    def _take_away_half_written(self) -> None:
        if self._hosts.is_first:
            for half in self.folder.glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(half, ignore_errors=True)

    def _last_good(self) -> str:
        good = self.steps
        return f"The last good checkpoint is that of step {good[-1]}" if good else "There is no good checkpoint yet"

    def _put_aside(self, failures: Mapping[int, Exception], taken: int) -> None:
        for step, error in failures.items() if self._hosts.is_first else ():
            _log.warning(
                "checkpoint of step %d cannot be read and is put aside, step %d is taken: %s", step, taken, error
            )
            aside = self.folder / "unreadable"
            aside.mkdir(exist_ok=True)
            shutil.rmtree(aside / str(step), ignore_errors=True)
            (self.folder / str(step)).rename(aside / str(step))
        if failures:
            self._hosts.wait()
            self._manager.reload()


def _items(**items: Any) -> Any:
    return ocp.args.Composite(**items)


def _score(metrics: Mapping[str, float]) -> float:
    return metrics.get("score", -math.inf)


def _preservation(config: CheckpointConfig) -> Any:
    policies: list[Any] = [checkpoint_managers.LatestN(config.keep)]
    if config.keep_best:
        policies.append(checkpoint_managers.BestN(get_metric_fn=_score, n=1, keep_checkpoints_without_metrics=False))
    if config.keep_first:
        policies.append(checkpoint_managers.CustomSteps([0]))
    return checkpoint_managers.AnyPreservationPolicy(policies)


def _probe(folder: Path, process: int) -> None:
    """Writes a file and takes it away again: permissions, read-only mounts and quotas show only so."""
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
        f"no checkpoint in {folder} can be read into this state; that of step {step}: {error}. "
        "Has the model or the optimizer been changed since?"
    )
