"""Whether the efficiency ρ of a credit rule predicts the gain of its variant, and what a grid of cells answers."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import rankdata

from experiments.cells import ALL, DIFFERS, GAINS, compared, effects, with_bounds
from experiments.efficiency import BASE, Measurement, gain_of, of_cell, ratio, shares_above
from experiments.grid import Grid, Variant
from experiments.measures import MEASURES, Interval, differences, interval, shown
from experiments.results import Result, of_variant
from scripts.generated_page import table

RESAMPLES = 10_000

LEAST_CELLS = 6
"""Cells that a correlation needs: of four in one order, every resample has a correlation of 1."""

FIRST, ALONG, DIFFERENCE = "ρ at step 0", "ρ, mean over the steps", "e − e of GRPO at step 0"

ALL_SEEDS = -1

Array = np.ndarray


@dataclass(frozen=True)
class Point:
    """One variant in one cell, with one seed.

    Attributes:
        cell: name of the cell.
        seed: the seed; `ALL_SEEDS` for all of the cell together.
        variant: the variant.
        gains: name of a measure → success, variant minus comparison.
        predictors: name of a predictor → its value; NaN if it was not measured or is not resolved.
    """

    cell: str
    seed: int
    variant: Variant
    gains: Mapping[str, float]
    predictors: Mapping[str, float]


def points_of(grid: Grid, results: Sequence[Result], measurements: Sequence[Measurement]) -> list[Point]:
    """Returns the compared variants of each cell and seed that have both a gain and a measurement at step 0."""
    points = []
    for cell in grid.cells:
        for variant in compared(grid):
            ours = of_variant(results, variant.name, cell.name)
            theirs = of_variant(results, variant.against, cell.name)
            for seed in sorted(ours.keys() & theirs.keys()):
                lines = [line for line in of_cell(grid, measurements, cell) if line["seed"] == seed]
                if any(line["step"] == 0 for line in lines):
                    gains = {name: MEASURES[name].of(ours[seed]) - MEASURES[name].of(theirs[seed]) for name in GAINS}
                    points.append(Point(cell.name, seed, variant, gains, _predictors(lines, variant.rule)))
    return points


def of_cells(grid: Grid, points: Sequence[Point], measurements: Sequence[Measurement]) -> list[Point]:
    """Returns a point for each cell and variant: mean gains, and predictors of gains that are added over seeds."""
    pooled = []
    for cell in grid.cells:
        for variant in compared(grid):
            own = [point for point in points if (point.cell, point.variant.name) == (cell.name, variant.name)]
            if own:
                seeds = {point.seed for point in own}
                lines = [line for line in of_cell(grid, measurements, cell) if line["seed"] in seeds]
                gains = {name: math.fsum(point.gains[name] for point in own) / len(own) for name in GAINS}
                pooled.append(Point(cell.name, ALL_SEEDS, variant, gains, _predictors(lines, variant.rule)))
    return pooled


def _predictors(lines: Sequence[Measurement], rule: str) -> dict[str, float]:
    at = {step: [line for line in lines if line["step"] == step] for step in sorted({line["step"] for line in lines})}
    ratios = {step: ratio(some, rule).mean for step, some in at.items()}
    along = [value for value in ratios.values() if math.isfinite(value)]
    gain = lambda name: math.fsum(gain_of(line, name) for line in at[0]) / len(at[0])
    return {
        FIRST: ratios[0],
        ALONG: math.fsum(along) / len(along) if along else math.nan,
        DIFFERENCE: gain(rule) - gain(BASE),
    }


def correlation(points: Sequence[Point], predictor: str, gain: str) -> Interval:
    """Spearman's correlation, with a 95 % bootstrap over cells and over the seeds in a cell.

    A resample gives weights to the ranks of the sample, all points of a cell and seed together. Points without the
    predictor are omitted. NaN with points of fewer than `LEAST_CELLS` cells.
    """
    kept = [
        point for point in points if math.isfinite(point.predictors[predictor]) and math.isfinite(point.gains[gain])
    ]
    if len({point.cell for point in kept}) < LEAST_CELLS:
        return Interval(math.nan, math.nan, math.nan, len(kept))
    x = rankdata([point.predictors[predictor] for point in kept])
    y = rankdata([point.gains[gain] for point in kept])
    rng, seeds_of = np.random.default_rng(0), {}
    for point in kept:
        seeds_of.setdefault(point.cell, {}).setdefault(point.seed, len(seeds_of.get(point.cell, ())))
    even = lambda count, size: rng.multinomial(count, np.full(count, 1 / count), size)
    cells = dict(zip(seeds_of, even(len(seeds_of), RESAMPLES).T, strict=True))
    seeds = {cell: even(len(known), RESAMPLES).T for cell, known in seeds_of.items()}
    weights = np.stack([cells[p.cell] * seeds[p.cell][seeds_of[p.cell][p.seed]] for p in kept], axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        value = float(_pearson(x, y, np.ones((1, len(kept))))[0])
        resamples = _pearson(x, y, weights)
    known = resamples[np.isfinite(resamples)]
    low, high = np.quantile(known, (0.025, 0.975)) if len(known) else (math.nan, math.nan)
    return Interval(value, float(low), float(high), len(kept))


def _pearson(x: Array, y: Array, weights: Array) -> Array:
    """Weighted correlation for each row of weights; NaN where one of the two is constant."""
    mean = lambda values: weights @ values / weights.sum(axis=1)
    covariance = lambda a, b: mean(a * b) - mean(a) * mean(b)
    return covariance(x, y) / np.sqrt(covariance(x, x) * covariance(y, y))


def relation_table(points: Sequence[Point], pooled: Sequence[Point]) -> str:
    """A row for each predictor and measure: its correlation with the gain, over seeds and over cells."""
    if not points:
        return "No cell has both a gain and a measurement yet."
    rows = []
    for predictor in (FIRST, ALONG, DIFFERENCE):
        for gain in GAINS:
            found = [correlation(some, predictor, gain) for some in (_of_aem(points), points, _of_aem(pooled), pooled)]
            texts = (f"{with_bounds(x)}, {x.count} points" if math.isfinite(x.mean) else "–" for x in found)
            rows.append([predictor, MEASURES[gain].title, *texts])
    every = ("AEM, cells and seeds", "all three, cells and seeds", "AEM, cells", "all three, cells")
    return table(["predictor", "gain in", *every], rows)


def answer(
    grid: Grid,
    results: Sequence[Result],
    measurements: Sequence[Measurement],
    points: Sequence[Point],
    pooled: Sequence[Point],
    variant: str,
    control: str,
) -> list[str]:
    """Sentences from the numbers of a complete grid: what a variant gains over its base and its control, where it gains
    more, whether a step of it gains more, and whether ρ predicts the gain."""
    rule = next(known.rule for known in grid.variants if known.name == variant)
    base, own = grid.variants[0].name, grid.title(variant)
    sentences = []
    for name in GAINS:
        measure, title = MEASURES[name], MEASURES[name].title.capitalize()
        gains = effects(grid, results, measure, variant, base)
        beside = effects(grid, results, measure, variant, control)[ALL]
        of_cells = {
            cell.name: interval([*differences(results, variant, base, measure, cell.name).values()])
            for cell in grid.cells
        }
        above = [cell for cell, value in of_cells.items() if value.low > 0]
        below = [cell for cell, value in of_cells.items() if value.high < 0]
        contrasts = [f"{level} {_signed(value)}" for (_, level), value in gains.items() if DIFFERS in level]
        sentences += [
            f"{title}: over all cells, {own} gains {_signed(gains[ALL])} over {grid.title(base)} and {_signed(beside)} "
            f"over the {grid.title(control)}.",
            f"Its gain over {grid.title(base)} has an interval above 0 in {len(above)} of {len(of_cells)} cells"
            f"{_listed(above)} and below 0 in {len(below)}{_listed(below)}. It differs between the levels of a factor: "
            f"{'; '.join(contrasts)}.",
        ]
    for first, when in ((True, "Before training"), (False, "At the three later checkpoints")):
        lines = [line for cell in grid.cells for line in of_cell(grid, measurements, cell)]
        shares = shares_above(lines, rule, first)
        sentences.append(
            f"{when}, a step of {own} gains more than one of {grid.title(base)} in most resamples of "
            f"{sum(share > 0.5 for share in shares)} of {len(shares)} measurements."
        )
    for some, who in (
        (_of_aem(points), f"the gain of {own} over cells and seeds"),
        (_of_aem(pooled), f"the gain of {own} over cells"),
        (pooled, "the gains of the three variants over cells"),
    ):
        value = correlation(some, FIRST, GAINS[-1])
        if math.isfinite(value.low):
            verb = "predicts" if value.low > 0 else "contradicts" if value.high < 0 else "is not shown to predict"
            sentences.append(
                f"ρ at step 0 {verb} {who} ({MEASURES[GAINS[-1]].title}): Spearman's correlation {with_bounds(value)}, "
                f"{value.count} points."
            )
    return sentences


def _signed(value: Interval) -> str:
    return shown(value, percent=True, signed=True)


def _listed(cells: Sequence[str]) -> str:
    return f" ({', '.join(cells)})" if cells else ""


def _of_aem(points: Sequence[Point]) -> list[Point]:
    return [point for point in points if point.variant.rule == "aem"]


HELPERS = (points_of, of_cells, relation_table, answer)
"""Functions that a section's template calls."""
