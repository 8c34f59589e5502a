"""Tables of a grid of cells: the gain of each variant over its comparison, and the efficiency ρ of its credit rule."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from experiments.efficiency import BASE, Measurement, gain_of, of_cell, ratio
from experiments.grid import START, Grid, Variant
from experiments.measures import MEASURES, Interval, Measure, combined, differences, interval, number, part, shown
from experiments.results import Result, key_of, of_variant, successes
from scripts.generated_page import table

GAINS = ("final", "mean")
"""Measures of success, by their names in `MEASURES`."""

ALL, DIFFERS = ("all cells", ""), " − "
"""The row of all cells, and what stands between two levels in the row of their difference."""

BEFORE, LATER = "step 0", "later steps"


def compared(grid: Grid) -> list[Variant]:
    """Returns the variants that are compared and whose credit rule was measured."""
    return [variant for variant in grid.variants if variant.against and variant.rule]


def everywhere(grid: Grid) -> list[Variant]:
    """Returns the variants that are compared and run in all cells."""
    return [variant for variant in grid.variants if variant.against and not variant.cells]


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
        "measurements are missing. The numbers below come from the finished ones.\n"
    )


def gain_table(grid: Grid, results: Sequence[Result], name: str, control: str) -> str:
    """A row for each cell: success of the comparison, the paired gain of each variant, and of the first over a control.

    Gains are in points.
    """
    measure, variants = MEASURES[name], everywhere(grid)
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
        Gains of `ALL` cells, of (factor, level), and of (factor, "second − first") where a factor has two levels: means
        over cells, each with the variance of its own seeds. Empty without a seed.
    """
    gains = {cell.name: differences(results, variant, against, measure, cell.name) for cell in grid.cells}
    seeds = sorted(set.intersection(*(set(of_seed) for of_seed in gains.values())))
    samples = [[gains[cell.name][seed] for seed in seeds] for cell in grid.cells]
    even = lambda chosen: np.array(chosen, float) / sum(chosen)
    weights = {ALL: even([True] * len(grid.cells))}
    for index, factor in enumerate(grid.factors):
        of_level = {level: even([cell.levels[index] == level for cell in grid.cells]) for level in factor.levels}
        weights |= {(factor.name, level): each for level, each in of_level.items()}
        if len(of_level) == 2:
            (first, before), (second, after) = of_level.items()
            weights[factor.name, f"{second}{DIFFERS}{first}"] = after - before
    return {labels: combined(samples, each.tolist()) for labels, each in weights.items()} if seeds else {}


def size_table(grid: Grid, results: Sequence[Result]) -> str:
    """A row for each cell, and one for all: the mean norm of a variant's gradients relative to its comparison's."""
    variants = everywhere(grid)
    rows, sizes = [], {}
    for cell in grid.cells:
        for variant in variants:
            ours, theirs = (of_variant(results, name, cell.name) for name in (variant.name, variant.against))
            known = ours.keys() & theirs.keys()
            sizes[cell.name, variant.name] = {s: _norm(ours[s]) / _norm(theirs[s]) for s in sorted(known)}
        own = [[*sizes[cell.name, variant.name].values()] for variant in variants]
        if any(own):
            rows.append([*cell.levels, *(with_bounds(interval(values)) for values in own)])
    every = [[[*sizes[cell.name, variant.name].values()] for cell in grid.cells] for variant in variants]
    if all(all(of_cells) for of_cells in every):
        even = [1 / len(grid.cells)] * len(grid.cells)
        means = (with_bounds(combined(of_cells, even)) for of_cells in every)
        rows.append([ALL[0], *[""] * (len(grid.factors) - 1), *means])
    header = [*_factors(grid), *(variant.title for variant in variants)]
    return table(header, rows) if rows else "No runs yet."


def _norm(result: Result) -> float:
    return part("learner/grad_norm", 0, 1)(result)


def beside_table(grid: Grid, results: Sequence[Result], variant: str, beside: str) -> str:
    """A row for each measure: gains of a variant that runs in some cells and of another one, means over these cells.

    Gains over the comparison, in points, of the seeds that both have in all of these cells.
    """
    known = next(each for each in grid.variants if each.name == variant)
    rows = []
    for name in GAINS:
        gains = {
            pair: {cell: differences(results, *pair, MEASURES[name], cell) for cell in known.cells}
            for pair in ((variant, known.against), (beside, known.against), (beside, variant))
        }
        seeds = sorted(set.intersection(*(set(each) for of_cells in gains.values() for each in of_cells.values())))
        if seeds:
            even = [1 / len(known.cells)] * len(known.cells)
            values = (
                combined([[each[seed] for seed in seeds] for each in of_cells.values()], even)
                for of_cells in gains.values()
            )
            rows.append([MEASURES[name].title, str(len(seeds)), *map(_points, values)])
    titles = [known.title, grid.title(beside), f"{grid.title(beside)} over {known.title}"]
    return table(["gain in", "seeds", *titles], rows) if rows else "No runs yet."


def typical_width(grid: Grid, results: Sequence[Result], name: str, variant: str) -> str:
    """The median over cells of the width of the interval of a variant's gain, in points."""
    against = next(known.against for known in grid.variants if known.name == variant)
    gains = [interval([*differences(results, variant, against, MEASURES[name], c.name).values()]) for c in grid.cells]
    widths = [value.high - value.low for value in gains if math.isfinite(value.low)]
    return f"{100 * statistics.median(widths):.0f} points" if widths else "unknown"


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
    rows = []
    for cell in grid.cells:
        lines = [line for line in of_cell(grid, measurements, cell) if line["step"] == 0]
        if lines:
            of_base = interval([gain_of(line, BASE) for line in lines])
            values = [
                interval([gain_of(line, rule) - gain_of(line, other) for line in lines])
                for rule, other in _rules(grid, control)
            ]
            texts = [shown(of_base, percent=False), *(shown(x, percent=False, signed=True) for x in values)]
            rows.append([*cell.levels, str(len(lines)), *texts])
    header = [*_factors(grid), "seeds", grid.title(grid.variants[0].name), *_excess_titles(grid, control)]
    return table(header, rows) if rows else "Not measured yet."


def relative_table(grid: Grid, measurements: Sequence[Measurement], control: str) -> str:
    """A row for step 0 and one for the later steps: the excess of each rule over the base rule, of all cells."""
    columns = [excess(grid, measurements, *pair) for pair in _rules(grid, control)]
    if not columns[0]:
        return "No seed has all cells yet."
    rows = [
        [when, str(value.count), *(percents(column[when]) for column in columns)] for when, value in columns[0].items()
    ]
    return table(["measured", "seeds", *_excess_titles(grid, control)], rows)


def excess(grid: Grid, measurements: Sequence[Measurement], rule: str, other: str) -> dict[str, Interval]:
    """(Σ e of a rule − Σ e of another) / Σ e of the base rule, sums over cells: mean over seeds, at step 0 and later.

    Seeds without all cells and steps are omitted. Empty without a seed.
    """
    lines = {
        (line["seed"], line["step"], cell.name): line
        for cell in grid.cells
        for line in of_cell(grid, measurements, cell)
    }
    wanted = [(step, cell.name) for step in grid.measured.steps for cell in grid.cells]
    seeds = [seed for seed in sorted({key[0] for key in lines}) if all((seed, *at) in lines for at in wanted)]
    found = {}
    for when, steps in ((BEFORE, grid.measured.steps[:1]), (LATER, grid.measured.steps[1:])):
        total = lambda seed, name, steps=steps: math.fsum(
            gain_of(lines[seed, step, cell.name], name) for step in steps for cell in grid.cells
        )
        values = [(total(seed, rule) - total(seed, other)) / total(seed, BASE) for seed in seeds]
        if values:
            found[when] = interval(values)
    return found


def responses_table(grid: Grid, results: Sequence[Result], measurements: Sequence[Measurement]) -> str:
    """A row for each cell: the policy before training, and what α has to work with there; means over seeds."""
    tokens, plain, share = "{:.1f}".format, partial(number, percent=False), _percent
    columns: Sequence[tuple[str, Callable[[Mapping], float | None], Callable[[float], str]]] = (
        ("tokens a response, median", lambda responses: responses["tokens"][1], tokens),
        ("token entropy, nats", lambda responses: responses["entropy"], plain),
        ("variance of H̄ within states", lambda responses: responses["entropy_within_states"], share),
        ("responses to states visited again", lambda responses: responses["repeated"] / responses["count"], share),
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
    variants = everywhere(grid)
    return [*((variant.name, variant.against) for variant in variants), (variants[0].name, control)]


def _titles(grid: Grid, control: str) -> list[str]:
    variants = [grid.title(variant.name) for variant in everywhere(grid)]
    return [*variants, f"{variants[0]} over the {grid.title(control)}"]


def _rules(grid: Grid, control: str) -> list[tuple[str, str]]:
    """Each compared rule with the base rule, and the first one with its control."""
    own = compared(grid)
    return [*((variant.rule, BASE) for variant in own), (own[0].rule, control)]


def _excess_titles(grid: Grid, control: str) -> list[str]:
    titles = {variant.rule: variant.title for variant in compared(grid)}
    return [*titles.values(), f"{next(iter(titles.values()))} over the {titles[control]}"]


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


def percents(value: Interval) -> str:
    """An interval of relative differences."""
    return shown(value, percent=True, signed=True).replace(" points", " %")


HELPERS = (
    missing_runs,
    typical_width,
    beside_table,
    gain_table,
    effect_table,
    size_table,
    ratio_table,
    excess_table,
    relative_table,
    responses_table,
)
"""Functions that a section's template calls."""
