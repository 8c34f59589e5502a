"""Saved measurements of `analyze --efficiency`: one JSON line for each measured checkpoint of a grid's runs.

cell, variant, seed, step   identify the checkpoint
groups, episodes, success   of the rollouts that were played
rules                       rule -> `gain` (e, return per unit of step size), `difference` (e − e of the base rule) and
                            `ratio` (ρ = e / e of the base rule), each as value, low and high of a 95 % interval;
                            `above`, how surely ρ > 1. The file of when_aem has no differences, and its intervals are a
                            bootstrap's, too wide where a gain is hardly resolved
responses                   entropies, and what α had to work with
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from aem_jax.files import read_json_lines
from experiments.grid import Cell, Grid, Measured, Run
from experiments.measures import Interval, student_t
from experiments.results import Key, key_of, names_of, write_lines

Measurement = Mapping[str, Any]

BASE = "base"
"""Name of the base rule in measurements."""


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
    if measured.sketch:
        words += ["--sketch", str(measured.sketch)]
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
            name: {
                **{key: three(rule[key]) for key in ("gain", "difference", "ratio")},
                "above": _short(rule["above"]),
            }
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


def of_cell(grid: Grid, measurements: Sequence[Measurement], cell: Cell) -> list[Measurement]:
    """Returns the measurements of a cell, of the first measured variant."""
    return [line for line in measurements if key_of(line)[:2] == (cell.name, grid.measured.variants[0])]


def gain_of(line: Measurement, rule: str) -> float:
    """A rule's e; NaN if it was not finite."""
    value = line["rules"][rule]["gain"][0]
    return math.nan if value is None else value


def resolved(line: Measurement) -> bool:
    """Whether the interval of the base rule's gain is above 0, so that a ratio to it has a meaning."""
    low = line["rules"][BASE]["gain"][1]
    return low is not None and low > 0


def ratio(lines: Sequence[Measurement], rule: str) -> Interval:
    """ρ of mean gains over seeds, mean e / mean e of the base rule; see `fieller`.

    One line has the interval of its own measurement.
    """
    if len(lines) == 1:
        ratios = lines[0]["rules"][rule]["ratio"] if resolved(lines[0]) else [None] * 3
        value, low, high = (math.nan if bound is None else bound for bound in ratios)
        return Interval(value, low, high, 1)
    return fieller([gain_of(line, BASE) for line in lines], [gain_of(line, rule) for line in lines])


def fieller(base: Sequence[float] | np.ndarray, own: Sequence[float] | np.ndarray) -> Interval:
    """mean of `own` / mean of `base`, pairs of two seeds or more, with Fieller's 95 % interval.

        {ρ: 0 lies in the t-interval of the mean of own − ρ base}

    All is NaN where the base is not resolved: where the lower end of its interval is not above 0.
    """
    gains, count = np.array([base, own], np.float64), len(base)
    none = Interval(math.nan, math.nan, math.nan, count)
    if count < 2 or not np.isfinite(gains).all():
        return none
    below, above = (math.fsum(row) / count for row in gains)
    spread = student_t(count) ** 2 * np.cov(gains) / count
    square, mixed, rest = below**2 - spread[0, 0], below * above - spread[0, 1], above**2 - spread[1, 1]
    if not (below > 0 and square > 0):
        return none
    root = math.sqrt(max(mixed**2 - square * rest, 0.0))
    return Interval(above / below, (mixed - root) / square, (mixed + root) / square, count)


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
