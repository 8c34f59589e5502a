"""What a run left behind, read leniently: a missing file or field is empty, never an error, because a report of a run
that broke is the one that is needed most."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aem_jax.files import read_json, valid_text
from aem_jax.metrics import read_lines

log = logging.getLogger(__name__)

BEFORE, DURING, AFTER = "warmstart", "train", "final"
"""Phases of an evaluation of the policy; any other phase is a baseline, named by itself (expert, random)."""


@dataclass(frozen=True)
class Score:
    """Success on one set: share in [0, 1], its 95 % interval, and how many episodes it was counted over."""

    success: float
    low: float
    high: float
    count: int


@dataclass(frozen=True)
class Evaluation:
    """One pass over one fixed set of tasks."""

    step: int
    phase: str
    split: str
    set_name: str
    score: Score
    by_task_type: dict[str, Score]
    mean_turns: float | None
    mean_return: float | None
    mean_score: float | None = None


@dataclass(frozen=True)
class Run:
    """Everything that a report needs, in memory.

    Attributes:
        name: name of the run's folder.
        config: the run's settings, nested as saved.
        metrics: one mapping per training step, in order of steps.
        evaluations: in the order written.
        transcripts: episodes as saved, at most as many as there are.
        warmstart: one mapping per step of supervised learning, in order of steps.
    """

    name: str
    config: Mapping[str, Any]
    metrics: Sequence[Mapping[str, Any]]
    evaluations: Sequence[Evaluation]
    transcripts: Sequence[Mapping[str, Any]]
    warmstart: Sequence[Mapping[str, Any]] = ()

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of one metric, without the steps that lack it."""
        return series(self.metrics, name)

    def names(self, prefix: str) -> list[str]:
        """Metrics whose name begins with `prefix`, in the order that they first appear."""
        found = dict.fromkeys(name for record in self.metrics for name in record if name.startswith(prefix))
        return list(found)

    def splits(self) -> list[str]:
        """Evaluation splits, in the order that they first appear."""
        return list(dict.fromkeys(evaluation.split for evaluation in self.evaluations))

    def evaluated(self, split: str, *phases: str) -> list[Evaluation]:
        """Evaluations of one split in the phases named, in the order written."""
        return [found for found in self.evaluations if found.split == split and found.phase in phases]

    def before(self, split: str) -> Evaluation | None:
        """The policy before reinforcement learning."""
        return next(iter(self.evaluated(split, BEFORE)[-1:]), None)

    def after(self, split: str) -> Evaluation | None:
        """The policy at the end, or as far as the run got."""
        found = self.evaluated(split, AFTER) or self.evaluated(split, DURING)
        return found[-1] if found else None

    def baselines(self, split: str) -> list[Evaluation]:
        """Latest evaluation of each baseline on a split."""
        latest = {
            found.phase: found
            for found in self.evaluations
            if found.split == split and found.phase not in (BEFORE, DURING, AFTER)
        }
        return list(latest.values())


def read_run(run_dir: Path | str) -> Run:
    """Reads config.json, {metrics,evaluations,warmstart}.jsonl and transcripts.json of a run's folder.

    Raises:
        ValueError: the folder does not exist.
    """
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise ValueError(f"expected a run's folder, got {run_dir}, which is none; see runs/ for the runs there are")
    config = _read_json(run_dir / "config.json")
    transcripts = _read_json(run_dir / "transcripts.json")
    return Run(
        name=valid_text(run_dir.resolve().name),
        config=config if isinstance(config, dict) else {},
        metrics=_steps(run_dir / "metrics.jsonl"),
        evaluations=list(_evaluations(read_lines(run_dir / "evaluations.jsonl"))),
        transcripts=[t for t in transcripts if isinstance(t, dict)] if isinstance(transcripts, list) else [],
        warmstart=_steps(run_dir / "warmstart.jsonl"),
    )


def series(records: Sequence[Mapping[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of one number, without the records that lack it."""
    points = [(record["step"], record[name]) for record in records if _is_number(record.get(name))]
    return [step for step, _ in points], [float(value) for _, value in points]


def baseline_lines(evaluations: Sequence[Evaluation]) -> list[tuple[float, str]]:
    """(success, names) of baselines, best first; those within four points share a line, so that names stay apart."""
    lines: list[tuple[float, str]] = []
    for found in sorted(evaluations, key=lambda evaluation: -evaluation.score.success):
        if lines and lines[-1][0] - found.score.success < 0.04:
            lines[-1] = (lines[-1][0], f"{lines[-1][1]}, {found.phase}")
        else:
            lines.append((found.score.success, found.phase))
    return lines


def flat_config(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings → dotted names, as the command line takes them."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            flat |= flat_config(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _steps(path: Path) -> list[dict[str, Any]]:
    records = [record for record in read_lines(path) if _is_number(record.get("step"))]
    return sorted(records, key=lambda record: record["step"])


def _evaluations(records: Sequence[Mapping[str, Any]]) -> Iterator[Evaluation]:
    for record in records:
        score = _score(record)
        if score is None:
            continue
        task_types = record.get("by_task_type")
        scores = (
            {task_type: _score(value) for task_type, value in task_types.items()}
            if isinstance(task_types, dict)
            else {}
        )
        yield Evaluation(
            step=int(record["step"]) if _is_number(record.get("step")) else 0,
            phase=str(record.get("phase", DURING)),
            split=str(record.get("split", "evaluation")),
            set_name=str(record.get("set", "")),
            score=score,
            by_task_type={task_type: value for task_type, value in scores.items() if value is not None},
            mean_turns=_number_or_none(record.get("mean_turns")),
            mean_return=_number_or_none(record.get("mean_return")),
            mean_score=_number_or_none(record.get("mean_score")),
        )


def _score(record: Any) -> Score | None:
    if not isinstance(record, dict) or not _is_number(record.get("success")):
        return None
    success = float(record["success"])
    low, high = (_number_or_none(record.get(name)) for name in ("low", "high"))
    return Score(
        success=success,
        low=success if low is None else min(low, success),
        high=success if high is None else max(high, success),
        count=int(_number_or_none(record.get("count")) or 0),
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and value == value


def _number_or_none(value: Any) -> float | None:
    return float(value) if _is_number(value) else None


def _read_json(path: Path) -> Any:
    """The value of a file; None, with a warning, where it is damaged: a report shows what there is."""
    try:
        return read_json(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        log.warning("left out of the report: %s", error)
        return None
