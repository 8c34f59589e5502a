"""A grid of cells: the gain of each variant over its comparison, beside the efficiency ρ that was measured before."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from scipy.stats import rankdata

from experiments.efficiency import Measurement
from experiments.grid import START, Cell, Grid, Variant
from experiments.measures import MEASURES, RESAMPLES, Interval, differences, interval, number, shown
from experiments.results import Result, key_of, of_variant, successes
from scripts.generated_page import table

BASE = "base"
"""Name of the base rule in measurements."""

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


GAINS = ("final", "mean")
"""Measures of success, by their names in `MEASURES`."""
FIRST, ALONG, DIFFERENCE = "ρ at step 0", "ρ, mean over the steps", "e − e of GRPO at step 0"


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


def gain_table(grid: Grid, results: Sequence[Result], name: str) -> str:
    """A row for each cell: success of the comparison, and the paired gain of each variant, in points."""
    measure, variants = MEASURES[name], [variant for variant in grid.variants if variant.against]
    rows = []
    for cell in grid.cells:
        base = of_variant(results, variants[0].against, cell.name)
        if not base:
            continue
        of_base = shown(interval([measure.of(base[seed]) for seed in sorted(base)]), measure.percent)
        changes = [differences(results, variant.name, variant.against, measure, cell.name) for variant in variants]
        rows.append([*cell.levels, str(len(base)), of_base, *(_points(interval(change)) for change in changes)])
    header = [*_factors(grid), "seeds", grid.title(variants[0].against), *(grid.title(v.name) for v in variants)]
    return table(header, rows) if rows else "No runs yet."


def left_table(grid: Grid, results: Sequence[Result], variant: str, control: str) -> str:
    """A row for each cell: what is left of a variant's success beside a control's, in points, paired by seed."""
    rows = []
    for cell in grid.cells:
        left = [interval(differences(results, variant, control, MEASURES[name], cell.name)) for name in GAINS]
        if left[0].count:
            rows.append([*cell.levels, str(left[0].count), *map(_points, left)])
    header = [*_factors(grid), "seeds", *(MEASURES[name].title for name in GAINS)]
    return table(header, rows) if rows else "No runs yet."


def ratio_table(grid: Grid, measurements: Sequence[Measurement], rule: str) -> str:
    """A row for each cell: ρ of a rule at each measured step, of the gains added over seeds."""
    rows = []
    for cell in grid.cells:
        lines = _measured(grid, measurements, cell)
        if lines:
            at = lambda step, lines=lines: ratio([line for line in lines if line["step"] == step], rule)
            rows.append([*cell.levels, *(_three(at(step)) for step in grid.measured.steps)])
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
        lines = [line for line in _measured(grid, measurements, cell) if line["step"] == 0]
        if lines:
            of_base = interval([_gain(line, BASE) for line in lines])
            excess = [interval([_gain(line, rule) - _gain(line, other) for line in lines]) for rule, other in pairs]
            texts = [shown(of_base, percent=False), *(shown(x, percent=False, signed=True) for x in excess)]
            rows.append([*cell.levels, str(len(lines)), *texts])
    titles = {variant.rule: variant.title for variant in own}
    header = [grid.title(grid.variants[0].name), *titles.values(), f"{titles[first]} over the {titles[control]}"]
    return table([*_factors(grid), "seeds", *header], rows) if rows else "Not measured yet."


def _gain(line: Measurement, rule: str) -> float:
    value = line["rules"][rule]["gain"][0]
    return math.nan if value is None else value


def ahead_table(grid: Grid, measurements: Sequence[Measurement]) -> str:
    """A row for each cell: share of resamples in which a rule's gain exceeds the base rule's; means over seeds.

    It needs no resolved gain of the base rule. At step 0, and at all later steps together.
    """
    columns = [(variant, first) for first in (True, False) for variant in compared(grid)]

    def means(cells: Sequence[Cell]) -> list[str]:
        lines = [line for cell in cells for line in _measured(grid, measurements, cell)]
        return [_mean(_shares(lines, variant.rule, first), _percent) for variant, first in columns]

    measured = [cell for cell in grid.cells if _measured(grid, measurements, cell)]
    rows = [[*cell.levels, *means([cell])] for cell in measured]
    rows.append(["all", *[""] * (len(grid.factors) - 1), *means(measured)])
    header = [f"{variant.title}, {'step 0' if first else 'later'}" for variant, first in columns]
    return table([*_factors(grid), *header], rows) if measured else "Not measured yet."


def _shares(lines: Sequence[Measurement], rule: str, first: bool) -> list[float]:
    """Shares of resamples in which a rule is above the base rule, at step 0 or later."""
    shares = [line["rules"][rule]["above"] for line in lines if (line["step"] == 0) == first]
    return [share for share in shares if share is not None]


def ratio(lines: Sequence[Measurement], rule: str) -> Interval:
    """ρ of gains that are added over seeds, Σ e / Σ e of the base rule, with a bootstrap over seeds.

    One line has the interval of its own measurement. Without a resolved gain of the base rule all is NaN.
    """
    if len(lines) == 1:
        ratios = lines[0]["rules"][rule]["ratio"] if resolved(lines[0]) else [None] * 3
        value, low, high = (math.nan if bound is None else bound for bound in ratios)
        return Interval(value, low, high, 1)
    gains = np.array([[line["rules"][name]["gain"][0] for name in (rule, BASE)] for line in lines], float)
    if not lines:
        return Interval(math.nan, math.nan, math.nan, 0)
    draws = np.random.default_rng(0).multinomial(len(lines), np.full(len(lines), 1 / len(lines)), RESAMPLES)
    sums = draws @ gains
    if np.quantile(sums[:, 1], 0.025) <= 0:
        return Interval(math.nan, math.nan, math.nan, len(lines))
    low, high = np.quantile(sums[:, 0] / sums[:, 1], (0.025, 0.975))
    return Interval(float(gains[:, 0].sum() / gains[:, 1].sum()), float(low), float(high), len(lines))


def resolved(line: Measurement) -> bool:
    """Whether the interval of the base rule's gain is above 0, so that a ratio to it has a meaning."""
    low = line["rules"][BASE]["gain"][1]
    return low is not None and low > 0


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
        measured = [line for line in _measured(grid, measurements, cell) if line["step"] == 0]
        lines, seeds = [line["responses"] for line in measured], {line["seed"] for line in measured}
        starts = [start for seed, start in of_variant(results, START, cell.start).items() if seed in seeds]
        if lines:
            values = ([value for line in lines if (value := of(line)) is not None] for _, of, _ in columns)
            texts = (_mean(value, show) for value, (*_, show) in zip(values, columns, strict=True))
            rows.append([*cell.levels, _mean([successes(s, "warmstart") for s in starts], _percent), *texts])
    header = [*_factors(grid), "success", *(title for title, *_ in columns)]
    return table(header, rows) if rows else "Not measured yet."


def relation(grid: Grid, results: Sequence[Result], measurements: Sequence[Measurement]) -> list[Point]:
    """Returns the compared variants of each cell and seed that have both a gain and a measurement at step 0."""
    points = []
    for cell in grid.cells:
        for variant in compared(grid):
            ours = of_variant(results, variant.name, cell.name)
            theirs = of_variant(results, variant.against, cell.name)
            for seed in sorted(ours.keys() & theirs.keys()):
                lines = [line for line in _measured(grid, measurements, cell) if line["seed"] == seed]
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
                lines = [line for line in _measured(grid, measurements, cell) if line["seed"] in seeds]
                gains = {name: math.fsum(point.gains[name] for point in own) / len(own) for name in GAINS}
                pooled.append(Point(cell.name, ALL_SEEDS, variant, gains, _predictors(lines, variant.rule)))
    return pooled


def _predictors(lines: Sequence[Measurement], rule: str) -> dict[str, float]:
    at = {step: [line for line in lines if line["step"] == step] for step in sorted({line["step"] for line in lines})}
    ratios = {step: ratio(some, rule).mean for step, some in at.items()}
    along = [value for value in ratios.values() if math.isfinite(value)]
    gain = lambda name: float(np.mean(np.array([line["rules"][name]["gain"][0] for line in at[0]], float)))
    return {
        FIRST: ratios[0],
        ALONG: math.fsum(along) / len(along) if along else math.nan,
        DIFFERENCE: gain(rule) - gain(BASE),
    }


def correlation(points: Sequence[Point], predictor: str, gain: str) -> Interval:
    """Spearman's correlation, with a 95 % bootstrap over cells and over the seeds in a cell.

    A resample gives weights to the ranks of the sample, all points of a cell and seed together. Points without the
    predictor are omitted. NaN with fewer than three points.
    """
    kept = [
        point for point in points if math.isfinite(point.predictors[predictor]) and math.isfinite(point.gains[gain])
    ]
    if len(kept) < 3:
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
            texts = (f"{_three(value)}, {value.count} points" if value.count else "–" for value in found)
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
    """Sentences from the numbers: where a variant gains, what its control leaves, whether a step of it gains more, and
    whether ρ predicts the gain."""
    sentences = []
    for other, what in ((grid.variants[0].name, "gain over"), (control, "difference to the")):
        for name in GAINS:
            found = {
                cell.name: value
                for cell in grid.cells
                if (value := interval(differences(results, variant, other, MEASURES[name], cell.name))).count > 1
            }
            if found:
                above = [cell for cell, value in found.items() if value.low > 0]
                below = [cell for cell, value in found.items() if value.high < 0]
                sentences.append(
                    f"{MEASURES[name].title.capitalize()}: the {what} {grid.title(other)} has an interval above 0 in "
                    f"{len(above)} of {len(found)} cells{_listed(above)} and below 0 in {len(below)}{_listed(below)}."
                )
    rule, base = next(v.rule for v in grid.variants if v.name == variant), grid.title(grid.variants[0].name)
    for first, when in ((True, "Before training"), (False, "At the three later checkpoints")):
        shares = _shares([line for cell in grid.cells for line in _measured(grid, measurements, cell)], rule, first)
        sentences.append(
            f"{when}, a step of {grid.title(variant)} gains more than one of {base} in most resamples of "
            f"{sum(share > 0.5 for share in shares)} of {len(shares)} measurements."
        )
    for some, who in (
        (_of_aem(points), f"the gain of {grid.title(variant)} over cells and seeds"),
        (_of_aem(pooled), f"the gain of {grid.title(variant)} over cells"),
        (pooled, "the gains of the three variants over cells"),
    ):
        value = correlation(some, FIRST, GAINS[-1])
        if math.isfinite(value.low):
            verb = "predicts" if value.low > 0 else "contradicts" if value.high < 0 else "is not shown to predict"
            sentences.append(
                f"ρ at step 0 {verb} {who} ({MEASURES[GAINS[-1]].title}): Spearman's correlation {_three(value)}, "
                f"{value.count} points."
            )
    return sentences


def _of_aem(points: Sequence[Point]) -> list[Point]:
    return [point for point in points if point.variant.rule == "aem"]


def _measured(grid: Grid, measurements: Sequence[Measurement], cell: Cell) -> list[Measurement]:
    """The measurements of a cell, of the first measured variant."""
    return [line for line in measurements if key_of(line)[:2] == (cell.name, grid.measured.variants[0])]


def _factors(grid: Grid) -> list[str]:
    return [factor.name for factor in grid.factors]


def _points(value: Interval) -> str:
    """An interval of differences; the unit stands in the table's title."""
    return shown(value, percent=True, signed=True).replace(" points", "")


def _three(value: Interval) -> str:
    texts = [f"{x:.2f}".replace("-", "−") if math.isfinite(x) else "–" for x in value[:3]]
    return "–" if texts[0] == "–" else f"{texts[0]} ({texts[1]} to {texts[2]})"


def _mean(values: Sequence[float], show: Callable[[float], str]) -> str:
    value = interval(values).mean
    return show(value) if math.isfinite(value) else "–"


def _percent(value: float) -> str:
    return f"{number(value, percent=True)} %"


def _listed(cells: Sequence[str]) -> str:
    return f" ({', '.join(cells)})" if cells else ""


HELPERS = (
    missing_runs,
    gain_table,
    left_table,
    ratio_table,
    ahead_table,
    excess_table,
    responses_table,
    relation,
    of_cells,
    relation_table,
    answer,
)
"""Functions that a section's template calls."""
