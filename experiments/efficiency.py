"""Saved measurements of `analyze --efficiency`: one JSON line for each measured checkpoint of a grid's runs.

cell, variant, seed, step   identify the checkpoint
groups, episodes, success   of the rollouts that were played
rules                       rule -> `gain` (e, return per unit of step size) and `ratio` (ρ = e / e of the base rule),
                            each as value, low and high of a 95 % interval; `above`, the share of resamples with ρ > 1
responses                   entropies, and what α had to work with
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from aem_jax.files import read_json_lines
from experiments.grid import Grid, Measured, Run
from experiments.results import Key, key_of, names_of, write_lines

Measurement = Mapping[str, Any]


def read_measurements(path: Path) -> list[Measurement]:
    """Returns the saved measurements; empty if there is no file."""
    return [line for _, line in read_json_lines(path)] if path.exists() else []


def path_of(grid: Grid, results: Path) -> Path:
    """Returns the file of a grid's measurements."""
    return results / f"{grid.name}.efficiency.jsonl"


def words(folder: Path, run: Run, step: int, measured: Measured) -> list[str]:
    """Returns the arguments of the measurement's command line, after `python -m aem_jax.launch`."""
    words = ["analyze", str(folder / run.name), "--efficiency", "True", "--step", str(step)]
    words += ["--groups", str(measured.groups)]
    return [*words, "--rules", *measured.rules] if measured.rules else words


def line_of(folder: Path, run: Run, step: int) -> dict[str, Any]:
    """Returns the line of a run's last measurement.

    Raises:
        ValueError: the last measurement was of another step.
    """
    results = json.loads((folder / run.name / "analysis" / "efficiency.json").read_text(encoding="utf-8"))
    if results["step"] != step:
        raise ValueError(f"expected the measurement of step {step} of {run.name}, got that of step {results['step']}")
    three = lambda estimate: [_short(estimate[name]) for name in ("value", "low", "high")]
    return {
        **names_of(run),
        "step": step,
        **{name: _short(results[name]) for name in ("groups", "episodes", "success", "seconds")},
        "rules": {
            name: {"gain": three(rule["gain"]), "ratio": three(rule["ratio"]), "above": _short(rule["above"])}
            for name, rule in results["rules"].items()
        },
        "responses": {name: _short(value) for name, value in results["responses"].items()},
    }


def add(grid: Grid, folder: Path, line: Measurement, path: Path) -> None:
    """Adds a line to the file of measurements, in the grid's order; the other lines are kept."""
    lines = {(key_of(old), old["step"]): old for old in read_measurements(path)}
    lines[key_of(line), line["step"]] = line
    order = {key: index for index, key in enumerate(map(_key, grid.runs(folder)))}
    known = sorted((item for item in lines.items() if item[0][0] in order), key=lambda at: (order[at[0][0]], at[0][1]))
    write_lines(path, (line for _, line in known))


def missing(grid: Grid, run: Run, saved: Sequence[Measurement]) -> list[int]:
    """Returns the steps of a run that are to be measured and are not saved."""
    if run.variant not in grid.measured.variants:
        return []
    there = {line["step"] for line in saved if key_of(line) == _key(run)}
    return [step for step in grid.measured.steps if step not in there]


def _key(run: Run) -> Key:
    return run.cell, run.variant, run.seed


def _short(value: Any) -> Any:
    """The same with numbers of 4 digits, and None for numbers that are not finite."""
    if isinstance(value, Mapping):
        return {name: _short(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_short(item) for item in value]
    if not isinstance(value, float):
        return value
    return float(f"{value:.4g}") if math.isfinite(value) else None
