"""Plots of a grid: training curves of pairs of variants, as means over seeds with their range, and ρ beside gain."""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from aem_jax.report.style import BLUE, GREY, ORANGE, figure_style, percent_axis
from experiments.cells import GAINS
from experiments.grid import Grid
from experiments.measures import MEASURES
from experiments.relation import Point, ratio_of
from experiments.results import Result, of_variant

PANELS = (
    ("rollout/success", "success while training"),
    ("entropy/response", "response entropy, nats"),
    ("aem/flat_groups", "flat groups"),
)


def draw_pairs(grid: Grid, results: Sequence[Result], path: Path) -> Path | None:
    """Draws a row of plots for each variant of the family `algorithms` and its comparison; None without runs."""
    pairs = [
        variant
        for variant in grid.variants
        if variant.family == "algorithms" and variant.against and of_variant(results, variant.name)
    ]
    if not pairs:
        return None
    with figure_style("#2a303c"):
        figure = Figure(figsize=(12.6, 2.6 * len(pairs) + 0.4), layout="constrained")
        rows = figure.subplots(len(pairs), len(PANELS), squeeze=False)
        for row, variant in zip(rows, pairs, strict=True):
            for axes, (metric, label) in zip(row, PANELS, strict=True):
                _draw(axes, results, variant.against, metric, BLUE, grid.title(variant.against))
                _draw(axes, results, variant.name, metric, ORANGE, grid.title(variant.name))
                axes.set_title(label)
                if metric != "entropy/response":
                    percent_axis(axes)
            row[0].legend(loc="upper left")
        for axes in rows[-1]:
            axes.set_xlabel("training step")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110, facecolor="white", metadata={"Software": None})
    return path


def _draw(axes: Axes, results: Sequence[Result], variant: str, metric: str, colour: str, label: str) -> None:
    """Draws mean and range over seeds of a curve's bins, at the middle of each bin."""
    runs = [run for run in of_variant(results, variant).values() if metric in run["curves"]]
    columns = list(zip(*(run["curves"][metric] for run in runs), strict=False))
    points = [
        ((index + 0.5) * runs[0]["steps"] / len(columns), [value for value in column if value is not None])
        for index, column in enumerate(columns)
    ]
    points = [(step, values) for step, values in points if values]
    steps = [step for step, _ in points]
    axes.fill_between(steps, [min(v) for _, v in points], [max(v) for _, v in points], color=colour, alpha=0.15, lw=0)
    axes.plot(steps, [statistics.fmean(v) for _, v in points], color=colour, label=f"{label}, {len(runs)} seeds")


def draw_relation(points: Sequence[Point], path: Path) -> Path | None:
    """Draws ρ at step 0 and the paired gain of each variant, runs as small dots and cells as large ones; None without
    points."""
    large = [(point, ratio_of(point).mean) for point in points]
    large = [(point, ratio) for point, ratio in large if math.isfinite(ratio)]
    if not large:
        return None
    variants = {point.variant.name: point.variant for point, _ in large}.values()
    with figure_style("#2a303c"):
        figure = Figure(figsize=(12.6, 4.2), layout="constrained")
        for axes, gain in zip(figure.subplots(1, len(GAINS)), GAINS, strict=True):
            for variant, colour in zip(variants, (ORANGE, BLUE, GREY), strict=False):
                own = [point for point in points if point.variant == variant]
                x = [x for point in own for x in (point.own[0] / point.base[0])[point.resolved]]
                y = [100 * y for point in own for y in point.gains[gain][point.resolved]]
                axes.plot(x, y, "o", ms=3, color=colour, alpha=0.4)
                cells = [(ratio, 100 * point.gains[gain].mean()) for point, ratio in large if point.variant == variant]
                axes.plot(*zip(*cells, strict=True), "o", ms=8, color=colour, label=variant.title or variant.name)
            axes.axhline(0, color=GREY, linewidth=0.8)
            axes.axvline(1, color=GREY, linewidth=0.8)
            axes.set_title(f"gain over GRPO: {MEASURES[gain].title}")
            axes.set_xlabel("ρ at step 0")
            axes.set_ylabel("points")
        figure.axes[0].legend()
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110, facecolor="white", metadata={"Software": None})
    return path
