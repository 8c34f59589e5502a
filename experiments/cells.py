"""Tables of a grid of cells: the gain of each variant over its comparison, and the efficiency ρ of its credit rule."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from experiments.efficiency import BASE, Measurement, gain_of, of_cell, ratio, shares_above
from experiments.grid import START, Cell, Grid, Variant
from experiments.measures import MEASURES, Interval, Measure, differences, interval, number, shown
from experiments.results import Result, key_of, of_variant, successes
from scripts.generated_page import table

GAINS = ("final", "mean")
"""Measures of success, by their names in `MEASURES`."""

ALL, DIFFERS = ("all cells", ""), " − "
"""The row of all cells, and what stands between two levels in the row of their difference."""


def compared(grid: Grid) -> list[Variant]:
    """Returns the variants that are compared and whose credit rule was measured."""
    return [variant for variant in grid.variants if variant.against and variant.rule]


def missing_runs(grid: Grid, results: Sequence[Result], measurements: Sequence[Measurement]) -> str:
    """Says how much of the grid is missing; nothing if it is complete."""
    runs, known = grid.runs(Path()), {key_of(result) for result in results}
    lines = {(key_of(line), line["step"]) for line in measurements}
    measured = [run for run in runs if run.variant in grid.measured.variants]
    no_run = sum((run.cell, run.variant, run.seed) not in known for run in runs)
    no_line = sum(
        ((run.cell, run.variant, run.seed), step) not in lines for run in measured for step in grid.measured.steps
    )
    if not no_run and not no_line:
        return ""
    return (
        f"**Incomplete**: {no_run} of {len(runs)} runs and {no_line} of {len(measured) * len(grid.measured.steps)} "
        "measurements are missing. The numbers below come from the finished ones."
    )


def gain_table(grid: Grid, results: Sequence[Result], name: str, control: str) -> str:
    """A row for each cell: success of the comparison, the paired gain of each variant, and of the first over a control.

    Gains are in points.
    """
    measure, variants = MEASURES[name], [variant for variant in grid.variants if variant.against]
    rows = []
    for cell in grid.cells:
        base = of_variant(results, variants[0].against, cell.name)
        if not base:
            continue
        of_base = shown(interval([measure.of(base[seed]) for seed in sorted(base)]), measure.percent)
        changes = [differences(results, *pair, measure, cell.name).values() for pair in _pairs(grid, control)]
        rows.append([*cell.levels, str(len(base)), of_base, *(_points(interval([*change])) for change in changes)])
    header = [*_factors(grid), "seeds", grid.title(variants[0].against), *_titles(grid, control)]
    return table(header, rows) if rows else "No runs yet."


def effect_table(grid: Grid, results: Sequence[Result], name: str, control: str) -> str:
    """A row for all cells, each level of a factor, and the difference of its levels: mean paired gains, in points."""
    columns = [effects(grid, results, MEASURES[name], *pair) for pair in _pairs(grid, control)]
    rows = [
        [*labels, str(value.count), *(_points(column[labels]) for column in columns)]
        for labels, value in columns[0].items()
    ]
    return table(["factor", "level", "seeds", *_titles(grid, control)], rows) if rows else "No seed has all cells yet."


def effects(
    grid: Grid, results: Sequence[Result], measure: Measure, variant: str, against: str
) -> dict[tuple[str, str], Interval]:
    """Mean gains over groups of cells, paired by seed.

    Args:
        grid: the grid.
        results: its runs; seeds without all cells are omitted.
        measure: the measure of success.
        variant: the variant.
        against: what it is compared with.

    Returns:
        Gains of `ALL` cells, of (factor, level), and of (factor, "second − first") where a factor has two levels. An
        interval is over seeds, of each seed's mean over cells. Empty without a seed.
    """
    gains = {cell.name: differences(results, variant, against, measure, cell.name) for cell in grid.cells}
    seeds = sorted(set.intersection(*(set(of_seed) for of_seed in gains.values())))
    means = lambda cells: [math.fsum(gains[cell.name][seed] for cell in cells) / len(cells) for seed in seeds]
    found = {ALL: means(grid.cells)}
    for index, factor in enumerate(grid.factors):
        of_level = {level: means([c for c in grid.cells if c.levels[index] == level]) for level in factor.levels}
        found |= {(factor.name, level): values for level, values in of_level.items()}
        if len(of_level) == 2:
            (first, before), (second, after) = of_level.items()
            found[factor.name, f"{second}{DIFFERS}{first}"] = [y - x for x, y in zip(before, after, strict=True)]
    return {labels: interval(values) for labels, values in found.items()} if seeds else {}


def ratio_table(grid: Grid, measurements: Sequence[Measurement], rule: str) -> str:
    """A row for each cell: ρ of a rule at each measured step, of mean gains over seeds."""
    rows = []
    for cell in grid.cells:
        lines = of_cell(grid, measurements, cell)
        if lines:
            at = lambda step, lines=lines: ratio([line for line in lines if line["step"] == step], rule)
            rows.append([*cell.levels, *(with_bounds(at(step)) for step in grid.measured.steps)])
    header = [*_factors(grid), *(f"step {step}" for step in grid.measured.steps)]
    return table(header, rows) if rows else "Not measured yet."


def excess_table(grid: Grid, measurements: Sequence[Measurement], control: str) -> str:
    """A row for each cell: the base rule's gain at step 0, the excess of each rule, and of the first over its control.

    In return per unit of step size; means over seeds.
    """
    own, rows = compared(grid), []
    first = own[0].rule
    pairs = [*((variant.rule, BASE) for variant in own), (first, control)]
    for cell in grid.cells:
        lines = [line for line in of_cell(grid, measurements, cell) if line["step"] == 0]
        if lines:
            of_base = interval([gain_of(line, BASE) for line in lines])
            excess = [interval([gain_of(line, rule) - gain_of(line, other) for line in lines]) for rule, other in pairs]
            texts = [shown(of_base, percent=False), *(shown(x, percent=False, signed=True) for x in excess)]
            rows.append([*cell.levels, str(len(lines)), *texts])
    titles = {variant.rule: variant.title for variant in own}
    header = [grid.title(grid.variants[0].name), *titles.values(), f"{titles[first]} over the {titles[control]}"]
    return table([*_factors(grid), "seeds", *header], rows) if rows else "Not measured yet."


def ahead_table(grid: Grid, measurements: Sequence[Measurement]) -> str:
    """A row for each cell: share of resamples in which a rule's gain exceeds the base rule's; means over seeds.

    It needs no resolved gain of the base rule. At step 0, and at all later steps together.
    """
    columns = [(variant, first) for first in (True, False) for variant in compared(grid)]

    def means(cells: Sequence[Cell]) -> list[str]:
        lines = [line for cell in cells for line in of_cell(grid, measurements, cell)]
        return [_mean(shares_above(lines, variant.rule, first), _percent) for variant, first in columns]

    measured = [cell for cell in grid.cells if of_cell(grid, measurements, cell)]
    rows = [[*cell.levels, *means([cell])] for cell in measured]
    rows.append(["all", *[""] * (len(grid.factors) - 1), *means(measured)])
    header = [f"{variant.title}, {'step 0' if first else 'later'}" for variant, first in columns]
    return table([*_factors(grid), *header], rows) if measured else "Not measured yet."


def responses_table(grid: Grid, results: Sequence[Result], measurements: Sequence[Measurement]) -> str:
    """A row for each cell: the policy before training, and what α has to work with there; means over seeds."""
    tokens, plain, share = "{:.1f}".format, partial(number, percent=False), _percent
    columns: Sequence[tuple[str, Callable[[Mapping], float | None], Callable[[float], str]]] = (
        ("tokens a response, median", lambda responses: responses["tokens"][1], tokens),
        ("token entropy, nats", lambda responses: responses["entropy"], plain),
        ("variance of H̄ within states", lambda responses: responses["entropy_within_states"], share),
        ("mean α where A > 0", lambda responses: responses["alpha_positive"], plain),
        ("mean α where A < 0", lambda responses: responses["alpha_negative"], plain),
        ("decisive turns of low entropy", lambda responses: responses["decisive_at_low_entropy"], share),
    )
    rows = []
    for cell in grid.cells:
        measured = [line for line in of_cell(grid, measurements, cell) if line["step"] == 0]
        lines, seeds = [line["responses"] for line in measured], {line["seed"] for line in measured}
        starts = [start for seed, start in of_variant(results, START, cell.start).items() if seed in seeds]
        if lines:
            values = ([value for line in lines if (value := of(line)) is not None] for _, of, _ in columns)
            texts = (_mean(value, show) for value, (*_, show) in zip(values, columns, strict=True))
            rows.append([*cell.levels, _mean([successes(s, "warmstart") for s in starts], _percent), *texts])
    header = [*_factors(grid), "success", *(title for title, *_ in columns)]
    return table(header, rows) if rows else "Not measured yet."


def _pairs(grid: Grid, control: str) -> list[tuple[str, str]]:
    """Each variant with its comparison, and the first one with its control."""
    variants = [variant for variant in grid.variants if variant.against]
    return [*((variant.name, variant.against) for variant in variants), (variants[0].name, control)]


def _titles(grid: Grid, control: str) -> list[str]:
    variants = [grid.title(variant.name) for variant in grid.variants if variant.against]
    return [*variants, f"{variants[0]} over the {grid.title(control)}"]


def _factors(grid: Grid) -> list[str]:
    return [factor.name for factor in grid.factors]


def _points(value: Interval) -> str:
    """An interval of differences; the unit stands in the table's title."""
    return shown(value, percent=True, signed=True).replace(" points", "")


def with_bounds(value: Interval) -> str:
    """Formats an interval as `1.05 (1.01 to 1.09)`."""
    texts = [f"{round(x, 2) + 0.0:.2f}".replace("-", "−") if math.isfinite(x) else "–" for x in value[:3]]
    return "–" if texts[0] == "–" else f"{texts[0]} ({texts[1]} to {texts[2]})"


def _mean(values: Sequence[float], show: Callable[[float], str]) -> str:
    value = interval(values).mean
    return show(value) if math.isfinite(value) else "–"


def _percent(value: float) -> str:
    return f"{number(value, percent=True)} %"


HELPERS = (missing_runs, gain_table, effect_table, ratio_table, excess_table, ahead_table, responses_table)
"""Functions that a section's template calls."""
