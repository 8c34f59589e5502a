"""Whether the efficiency ρ of a credit rule predicts the gain of its variant, and what a grid of cells answers."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import rankdata

from experiments.cells import (
    ALL,
    BEFORE,
    DIFFERS,
    GAINS,
    LATER,
    compared,
    effects,
    excess,
    percents,
    with_bounds,
)
from experiments.efficiency import BASE, Measurement, fieller, gain_of, of_cell, resolved
from experiments.grid import Grid, Variant
from experiments.measures import MEASURES, Interval, differences, interval, shown
from experiments.results import Result, of_variant
from scripts.generated_page import table

RESAMPLES = 4_000

LEAST_CELLS = 6
"""Cells that a correlation needs."""

FIRST, ALONG, DIFFERENCE = "ρ at step 0", "ρ of all measured steps together", "e − e of GRPO at step 0"

Array = np.ndarray


@dataclass(frozen=True)
class Point:
    """One variant in one cell: numbers of its seeds, f64[S].

    Attributes:
        cell: name of the cell.
        start: name of its warm start, which it shares with other cells.
        variant: the variant.
        seeds: i[S].
        gains: name of a measure → success, variant minus comparison.
        own: e of the variant's rule: at step 0, and the sum over all measured steps.
        base: likewise of the base rule.
        resolved: bool[S], whether the base rule's e at step 0 is resolved.
    """

    cell: str
    start: str
    variant: Variant
    seeds: Array
    gains: Mapping[str, Array]
    own: Sequence[Array]
    base: Sequence[Array]
    resolved: Array


def points_of(grid: Grid, results: Sequence[Result], measurements: Sequence[Measurement]) -> list[Point]:
    """Returns the compared variants of each cell, with the seeds that all cells of its warm start have completely."""
    points, lines = [], {}
    for cell in grid.cells:
        for line in of_cell(grid, measurements, cell):
            lines[cell.name, line["seed"], line["step"]] = line
    for cell in grid.cells:
        seeds = sorted(
            set.intersection(*(_complete(grid, results, lines, c.name) for c in grid.cells if c.start == cell.start))
        )
        for variant in compared(grid):
            ours, theirs = (of_variant(results, name, cell.name) for name in (variant.name, variant.against))
            of = lambda rule, cell=cell, seeds=seeds: tuple(
                np.array([math.fsum(gain_of(lines[cell.name, s, step], rule) for step in steps) for s in seeds])
                for steps in (grid.measured.steps[:1], grid.measured.steps)
            )
            gains = {
                name: np.array([MEASURES[name].of(ours[s]) - MEASURES[name].of(theirs[s]) for s in seeds])
                for name in GAINS
            }
            known = np.array([resolved(lines[cell.name, s, 0]) for s in seeds], bool)
            if seeds:
                points.append(
                    Point(cell.name, cell.start, variant, np.array(seeds), gains, of(variant.rule), of(BASE), known)
                )
    return points


def _complete(grid: Grid, results: Sequence[Result], lines: Mapping, cell: str) -> set[int]:
    """The seeds of a cell that have all runs and measurements."""
    names = {variant.name for variant in compared(grid)} | {variant.against for variant in compared(grid)}
    seeds = set.intersection(*(set(of_variant(results, name, cell)) for name in names))
    return {seed for seed in seeds if all((cell, seed, step) in lines for step in grid.measured.steps)}


def ratio_of(point: Point) -> Interval:
    """ρ at step 0 of a cell: of the sums over its seeds; NaN where the base rule's is not resolved."""
    if len(point.seeds) > 1:
        return fieller(point.base[0], point.own[0])
    value = float(point.own[0][0] / point.base[0][0]) if point.resolved[0] else math.nan
    return Interval(value, math.nan, math.nan, 1)


def correlation(points: Sequence[Point], predictor: str, gain: str, by_run: bool = False) -> Interval:
    """Spearman's correlation of predictor and gain over the cells of each variant, with a 95 % bootstrap over seeds.

    Ranks are those within a variant, centred: differences between variants do not count. The cells are fixed. A
    resample draws seeds for each warm start; all cells and variants that begin from it share the draw. Points whose
    predictor is not resolved are omitted. NaN with points of fewer than `LEAST_CELLS` cells.

    Args:
        points: of one variant or more.
        predictor: `FIRST`, `ALONG` or `DIFFERENCE`.
        gain: name of a measure.
        by_run: whether each run is a point. Otherwise a cell is: its mean gain, and its e added over seeds.
    """
    step = int(predictor == ALONG)
    kept = [point for point in points if predictor == DIFFERENCE or _is_resolved(point, step, by_run)]
    if len({point.cell for point in kept}) < LEAST_CELLS:
        return Interval(math.nan, math.nan, math.nan, 0)
    rng = np.random.default_rng(0)
    drawn = {}
    for point in kept:  # the first row is the sample itself
        if point.start not in drawn:
            count = len(point.seeds)
            drawn[point.start] = np.vstack([np.arange(count), rng.integers(count, size=(RESAMPLES, count))])

    def ranks(values: Sequence[Array]) -> Array:
        ranked = rankdata(np.concatenate(values, axis=1).round(9), axis=1)
        return ranked - ranked.mean(axis=1, keepdims=True)

    x, y = [], []
    for variant in dict.fromkeys(point.variant.name for point in kept):
        predictors, gains = [], []
        for point in kept:
            if point.variant.name != variant:
                continue
            draws = drawn[point.start]
            columns = [values[draws] for values in (point.own[step], point.base[step], point.gains[gain])]
            if by_run:
                columns = [column[:, point.resolved[draws[0]] | (predictor == DIFFERENCE)] for column in columns]
            else:
                columns = [column.mean(axis=1, keepdims=True) for column in columns]
            own, base, change = columns
            with np.errstate(divide="ignore", invalid="ignore"):
                predictors.append(own - base if predictor == DIFFERENCE else own / base)
            gains.append(change)
        x.append(ranks(predictors))
        y.append(ranks(gains))
    a, b = np.concatenate(x, axis=1), np.concatenate(y, axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        values = np.sum(a * b, axis=1) / np.sqrt(np.sum(a * a, axis=1) * np.sum(b * b, axis=1))
    known = values[1:][np.isfinite(values[1:])]
    low, high = np.quantile(known, (0.025, 0.975)) if len(known) else (math.nan, math.nan)
    return Interval(float(values[0]), float(low), float(high), a.shape[1])


def _is_resolved(point: Point, step: int, by_run: bool) -> bool:
    """Whether ρ has a meaning: of one run at least, or of the cell."""
    if by_run:
        return bool(point.resolved.any()) and step == 0
    if len(point.seeds) > 1:
        return math.isfinite(fieller(point.base[step], point.own[step]).mean)
    return bool(point.resolved[0])


def relation_table(points: Sequence[Point]) -> str:
    """A row for each predictor and measure: its correlation with the gain."""
    if not points:
        return "No cell has both a gain and a measurement yet."
    own, rows = _of_aem(points), []
    for predictor in (FIRST, DIFFERENCE, ALONG):
        for gain in GAINS:
            found = (
                correlation(own, predictor, gain),
                correlation(own, predictor, gain, by_run=True),
                correlation(points, predictor, gain),
            )
            texts = (f"{with_bounds(x)}, {x.count} points" if math.isfinite(x.mean) else "–" for x in found)
            rows.append([predictor, MEASURES[gain].title, *texts])
    return table(["predictor", "gain in", "AEM, cells", "AEM, runs", "all variants, cells of each"], rows)


def answer(
    grid: Grid,
    results: Sequence[Result],
    measurements: Sequence[Measurement],
    points: Sequence[Point],
    variant: str,
    control: str,
) -> list[str]:
    """Sentences from the numbers of a complete grid: what a variant wins against its base and its control, where,
    whether a step of it gains more return, and whether ρ predicts what it wins."""
    own, base, rival = (grid.title(name) for name in (variant, grid.variants[0].name, control))
    sentences = []
    for name in GAINS:
        measure = MEASURES[name]
        gains = effects(grid, results, measure, variant, grid.variants[0].name)
        beside = effects(grid, results, measure, variant, control)[ALL]
        of_cells = {
            cell.name: interval([*differences(results, variant, grid.variants[0].name, measure, cell.name).values()])
            for cell in grid.cells
        }
        levels = {level: value for (_, level), value in gains.items() if DIFFERS in level}
        sentences.append(
            f"{measure.title.capitalize()}: over all cells, {own} differs from {base} by {_signed(gains[ALL])}, and "
            f"from the {rival} by {_signed(beside)}. {_listed('In single cells', of_cells)} "
            f"{_listed('Between levels', levels)}"
        )
    rule = next(known.rule for known in grid.variants if known.name == variant)
    rule_of = {known.name: known.rule for known in grid.variants}
    shares = excess(grid, measurements, rule, BASE), excess(grid, measurements, rule, rule_of[control])
    sentences.append(
        f"A step of {own} gains {percents(shares[0][BEFORE])} more return than one of {base} of the same size before "
        f"training, and {percents(shares[0][LATER])} at later steps; than one of the {rival}, "
        f"{percents(shares[1][BEFORE])} and {percents(shares[1][LATER])}. Sums over cells."
    )
    for gain in GAINS:
        found = {name: correlation(_of_aem(points), name, gain) for name in (FIRST, DIFFERENCE)}
        texts = [
            f"{name} {_verb(value)} ({with_bounds(value)}, {value.count} cells)"
            for name, value in found.items()
            if math.isfinite(value.mean)
        ]
        if texts:
            sentences.append(f"Order of the cells by what {own} wins ({MEASURES[gain].title}): {', '.join(texts)}.")
    return sentences


def _verb(value: Interval) -> str:
    return "predicts it" if value.low > 0 else "contradicts it" if value.high < 0 else "is not shown to predict it"


def _signed(value: Interval) -> str:
    return shown(value, percent=True, signed=True)


def _listed(where: str, values: Mapping[str, Interval]) -> str:
    """The values whose interval does not contain 0, or that there is none."""
    clear = {name: value for name, value in values.items() if value.low > 0 or value.high < 0}
    if not clear:
        return f"{where}, no interval excludes 0."
    some = "; ".join(f"{name} {_signed(value)}" for name, value in clear.items())
    return f"{where}, {len(clear)} of {len(values)} intervals exclude 0: {some}."


def _of_aem(points: Sequence[Point]) -> list[Point]:
    return [point for point in points if point.variant.rule == "aem"]


HELPERS = (points_of, relation_table, answer)
"""Functions that a section's template calls."""
