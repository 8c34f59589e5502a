"""Reads the files of a run. A missing file or field is empty, never an error: broken runs need a report most."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aem_jax.files import read_json, valid_text
from aem_jax.metrics import Evaluation, is_number, read_evaluation, read_lines

log = logging.getLogger(__name__)

BEFORE, DURING, AFTER = "warmstart", "train", "final"
"""Phases of the policy's evaluations; any other phase is the name of a baseline (expert, random)."""


@dataclass(frozen=True)
class Run:
    """The files of a run, in memory.

    Attributes:
        name: name of the run's folder.
        config: the run's settings, nested as saved.
        metrics: one mapping a training step, in order of steps.
        evaluations: in the order of the file.
        transcripts: episodes as saved.
        warmstart: one mapping a step of supervised learning, in order of steps.
    """

    name: str
    config: Mapping[str, Any]
    metrics: Sequence[Mapping[str, Any]]
    evaluations: Sequence[Evaluation]
    transcripts: Sequence[Mapping[str, Any]]
    warmstart: Sequence[Mapping[str, Any]] = ()

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of one metric; steps without it are skipped."""
        return series(self.metrics, name)

    def names(self, prefix: str) -> list[str]:
        """Metrics whose name begins with `prefix`, in order of first appearance."""
        names = (name for record in self.metrics for name in record if name.startswith(prefix))
        return list(dict.fromkeys(names))

    def splits(self) -> list[str]:
        """Evaluation splits, in order of first appearance."""
        return list(dict.fromkeys(evaluation.split for evaluation in self.evaluations))

    def evaluated(self, split: str, *phases: str) -> list[Evaluation]:
        """Evaluations of one split in some phases, in the order of the file."""
        return [one for one in self.evaluations if one.split == split and one.phase in phases]

    def before(self, split: str) -> Evaluation | None:
        """The policy's latest evaluation before reinforcement learning."""
        return next(iter(self.evaluated(split, BEFORE)[-1:]), None)

    def after(self, split: str) -> Evaluation | None:
        """The policy's latest evaluation since reinforcement learning began; of a finished run, the final one."""
        return next(iter(self.evaluated(split, DURING, AFTER)[-1:]), None)

    def baselines(self, split: str) -> list[Evaluation]:
        """Latest evaluation of each baseline on a split."""
        policy = (BEFORE, DURING, AFTER)
        evaluations = (one for one in self.evaluations if one.split == split and one.phase not in policy)
        return list({evaluation.phase: evaluation for evaluation in evaluations}.values())


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
        evaluations=[e for e in map(read_evaluation, read_lines(run_dir / "evaluations.jsonl")) if e is not None],
        transcripts=[t for t in transcripts if isinstance(t, dict)] if isinstance(transcripts, list) else [],
        warmstart=_steps(run_dir / "warmstart.jsonl"),
    )


def series(records: Sequence[Mapping[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of one number; records without it are skipped."""
    points = [(record["step"], record[name]) for record in records if is_number(record.get(name))]
    return [step for step, _ in points], [float(value) for _, value in points]


def baseline_lines(evaluations: Sequence[Evaluation]) -> list[tuple[float, str]]:
    """(success, names) of baselines, best first; those within four points share a line."""
    lines: list[tuple[float, str]] = []
    for evaluation in sorted(evaluations, key=lambda evaluation: -evaluation.rate.success):
        success = evaluation.rate.success
        if lines and lines[-1][0] - success < 0.04:
            lines[-1] = (lines[-1][0], f"{lines[-1][1]}, {evaluation.phase}")
        else:
            lines.append((success, evaluation.phase))
    return lines


def _steps(path: Path) -> list[dict[str, Any]]:
    records = [record for record in read_lines(path) if is_number(record.get("step"))]
    return sorted(records, key=lambda record: record["step"])


def _read_json(path: Path) -> Any:
    """The value of a JSON file; None where it is missing or, with a warning, damaged."""
    try:
        return read_json(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        log.warning("left out of the report: %s", error)
        return None
