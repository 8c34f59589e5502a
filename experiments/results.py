"""Saved results of a grid's runs: one JSON line for each run, small enough to be committed.

cell, variant, seed   identify the run; there is no cell in a grid without factors
steps                 training steps
seconds               sum of `time/step` over its steps, on the machine as it was; excludes all other time
evaluations           (phase, step, split) -> successes and games
curves                metric -> means over consecutive bins of steps, at most as many as the grid says

Lines of runs whose folders are gone are kept, so the parts of a grid can run on different machines. Delete the file
after a change of the grid's settings.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from aem_jax.config import saved
from aem_jax.errors import ConfigError
from aem_jax.files import read_json_lines, write_text
from aem_jax.metrics import read_lines
from experiments.grid import BINS, Grid, Run

RESULTS = Path(__file__).resolve().parent / "results"
METRICS = (
    *("rollout/success", "rollout/turns", "rollout/valid_action", "rollout/mixed_groups", "rollout/response_tokens"),
    *("entropy/response", "aem/alpha_positive", "aem/alpha_negative", "aem/alpha_min", "aem/alpha_max"),
    *("aem/flat_groups", "advantage/positive_share", "advantage/nonzero_share", "learner/clip_fraction"),
    *("learner/grad_norm", "parity/max", "carry/age_mean", "carry/groups"),
)
"""Metrics that are saved as curves; a run's missing metrics are omitted."""

Result = Mapping[str, Any]

Key = tuple[str, str, int]
"""Cell, variant and seed of a run."""


def key_of(line: Mapping[str, Any]) -> Key:
    """Returns the run of a line."""
    return line.get("cell", ""), line["variant"], line["seed"]


def names_of(run: Run) -> dict[str, Any]:
    """Returns the fields of a line that name its run."""
    return ({"cell": run.cell} if run.cell else {}) | {"variant": run.variant, "seed": run.seed}


def summary(folder: Path, run: Run, bins: int = BINS) -> dict[str, Any] | None:
    """Returns the line of one run; None if it is not finished."""
    try:
        config = saved.load(folder)
    except ConfigError:
        return None
    metrics, last = read_lines(folder / "metrics.jsonl"), config.train.num_steps
    evaluations = [
        {name: line[name] for name in ("phase", "step", "split")}
        | {"wins": round((line["success"] or 0.0) * line["count"]), "games": line["count"]}
        for line in read_lines(folder / "evaluations.jsonl")
    ]
    if len(metrics) < last or not final_splits(folder, last) >= set(config.evaluation.splits):
        return None
    curves = {name: binned([line.get(name) for line in metrics], bins) for name in METRICS}
    return {
        **names_of(run),
        "steps": last,
        "seconds": round(math.fsum(line["time/step"] for line in metrics)),
        "evaluations": evaluations,
        "curves": {name: values for name, values in curves.items() if any(value is not None for value in values)},
    }


def final_splits(folder: Path, last: int) -> set[str]:
    """Returns the splits of a run with a final evaluation at step `last`."""
    lines = read_lines(folder / "evaluations.jsonl")
    return {line["split"] for line in lines if (line.get("phase"), line.get("step")) == ("final", last)}


def binned(values: Sequence[float | None], bins: int = BINS) -> list[float | None]:
    """Means over at most `bins` consecutive parts of (nearly) equal length, to 4 digits; None without values."""
    bins = min(bins, len(values))
    means: list[float | None] = []
    for index in range(bins):
        part = values[index * len(values) // bins : (index + 1) * len(values) // bins]
        known = [value for value in part if value is not None and math.isfinite(value)]
        means.append(float(f"{math.fsum(known) / len(known):.4g}") if known else None)
    return means


def write_results(grid: Grid, folder: Path, results: Path) -> Path:
    """Writes the lines of all finished runs of the grid, atomically. Saved lines of other runs of the grid are kept.

    Args:
        grid: the grid.
        folder: folder of its runs.
        results: output folder of GRID.jsonl.
    """
    path, runs = results / f"{grid.name}.jsonl", (*grid.starts(folder), *grid.runs(folder))
    saved_lines = {key_of(line): line for line in (read_results(path) if path.exists() else ())}
    lines = [
        line
        for run in runs
        if (line := summary(folder / run.name, run, grid.bins) or saved_lines.get((run.cell, run.variant, run.seed)))
    ]
    write_lines(path, lines)
    return path


def write_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Writes JSON lines, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines))


def read_results(path: Path) -> list[Result]:
    """Reads the lines of a grid's file.

    Raises:
        ValueError: a line is not a result.
    """
    results = []
    for number, result in read_json_lines(path):
        wanted = ("variant", "seed", "steps", "seconds", "evaluations", "curves")
        if missing := [name for name in wanted if name not in result]:
            raise ValueError(f"expected {', '.join(missing)} in line {number} of {path.name}, got none")
        results.append(result)
    return results


def successes(result: Result, phase: str = "final") -> float:
    """Fraction of games won in the phase's last evaluations, over all splits; NaN if there are none."""
    evaluations = [evaluation for evaluation in result["evaluations"] if evaluation["phase"] == phase]
    last_step = max((evaluation["step"] for evaluation in evaluations), default=0)
    last = [evaluation for evaluation in evaluations if evaluation["step"] == last_step]
    games = sum(evaluation["games"] for evaluation in last)
    return sum(evaluation["wins"] for evaluation in last) / games if games else math.nan


def of_variant(results: Sequence[Result], variant: str, cell: str = "") -> dict[int, Result]:
    """Returns the runs of a variant of a cell by seed."""
    return {key[2]: result for result in results if (key := key_of(result))[:2] == (cell, variant)}
