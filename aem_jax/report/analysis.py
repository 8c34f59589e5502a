"""Results of `analyze` as files: numbers, figures, one page, and a table for the terminal."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from aem_jax.files import write_text
from aem_jax.metrics import json_line
from aem_jax.report.page import duration, number, percent, template
from aem_jax.report.run import Run, read_run
from aem_jax.report.style import (
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    RED,
    escape,
    figure_style,
    inline_svg,
    percent_axis,
    plot_smoothed,
)

PAPER = {"pearson": 0.63, "opposed": 55 / 64}
"""arXiv 2605.00425: |r| of α − 1 and relative surprisal, and the share of states with opposed signs."""

DYNAMICS: Sequence[tuple[str, str, bool]] = (
    ("entropy/response", "Response entropy, nats", False),
    ("aem/alpha_positive", "α where the advantage is positive", False),
    ("aem/alpha_negative", "α where the advantage is negative", False),
    ("advantage/positive_share", "Share of positive advantages", True),
    ("rollout/success", "Success while training", True),
    ("aem/flat_groups", "Flat groups (α = 1)", True),
)
"""(metric, title, whether it is a share)."""


def write_analysis(run_dir: Path, results: Mapping[str, Any], against: Path | None, folder: Path) -> Path:
    """Writes analysis.json, PNGs and analysis.html.

    Args:
        run_dir: the run that was analysed.
        results: the numbers of `aem_jax.launch.analyze`.
        against: another run, to compare curves with.
        folder: output folder; created if it does not exist.

    Returns:
        Path of the page.
    """
    folder.mkdir(parents=True, exist_ok=True)
    numbers = json.dumps(json.loads(json_line(results)), indent=1, ensure_ascii=False)
    write_text(folder / "analysis.json", numbers + "\n")
    runs = [read_run(run_dir), *([read_run(against)] if against else [])]
    figures = {"proxy": _proxy_figure, "drift": _drift_figure}
    svgs = {}
    for name, draw in figures.items():
        svgs[name] = png_and_svg(lambda figure, draw=draw: draw(figure, results), (6.0, 3.6), folder / f"{name}.png")
    svgs["dynamics"] = png_and_svg(lambda figure: _dynamics_figure(figure, runs), (11.6, 5.6), folder / "dynamics.png")
    page = template("analysis.html.j2", estimate=estimate).render(
        results=results, svgs=svgs, paper=PAPER, runs=runs, took=duration(results["seconds"])
    )
    path = folder / "analysis.html"
    path.write_text(page, encoding="utf-8")
    return path


def print_analysis(results: Mapping[str, Any], stream: TextIO | None = None) -> None:
    """The numbers as a table.

    Args:
        results: as in `write_analysis`.
        stream: output; by default standard output.
    """
    proxy, played = results["proxy"], results["rollout"]
    table = Table("claim", "here (95 % interval)", "paper", title=f"{results['run']}, step {results['step']}")
    table.add_row("proxy: r of α − 1 and S − H_resp", estimate(proxy["pearson"]), f"|r| {PAPER['pearson']}")
    table.add_row("   … of α − 1 and the predictable part", estimate(proxy["pearson_predictable"]), "–")
    counts = f"{proxy['opposed_count']} of {proxy['decided_count']}"
    table.add_row("   signs opposed", f"{counts}, {estimate(proxy['opposed'])}", "55 of 64")
    table.add_row("entropy H̄: share of variance between states", estimate(results["entropy"]["between"]), "–")
    table.add_row("   r of H̄ and S − H_resp inside states", estimate(results["entropy"]["inside"]), "–")
    for name, claim in (("positive", "falls"), ("negative", "rises")):
        drift = results["drift"][name]
        table.add_row(f"drift, A·(α − 1) {name}: predicted, per step unit", estimate(drift["predicted"]), claim)
        table.add_row("   measured over its own states, nats", estimate(drift["measured_own"], 5), claim)
        table.add_row("   measured over all states, nats", estimate(drift["measured"], 5), claim)
        table.add_row("   r of predicted and measured", estimate(drift["pearson"]), "–")
    low, middle, high = played["entropy_span"]
    table.add_row("flat groups", percent(played["flat_groups"]), "–")
    table.add_row("span of a group's entropies, nats: quartiles", f"{low:.2f}, {middle:.2f}, {high:.2f}", "–")
    table.add_row("responses with an advantage", percent(played["nonzero_share"]), "–")
    tokens = ", ".join(f"{count:.0f}" for count in played["tokens"])
    table.add_row("tokens of a response: 5 %, median, 95 %", tokens, "–")
    table.add_row("turns of an episode", f"{played['turns']:.1f}", "–")
    Console(file=stream, soft_wrap=True).print(table)


def estimate(value: Mapping[str, Any] | None, digits: int = 2) -> str:
    """`−0.41 (−0.60 to −0.17)`; a dash without an estimate."""
    if not value or not math.isfinite(value["value"]):
        return "–"
    return f"{number(value['value'], digits)} ({number(value['low'], digits)} to {number(value['high'], digits)})"


def png_and_svg(draw: Any, size: tuple[float, float], path: Path) -> str:
    """A figure as a PNG file and, in the page's text colour, as SVG."""
    svg = ""
    for ink in ("#2a303c", INK):
        with figure_style(ink):
            figure = Figure(figsize=size, layout="constrained")
            draw(figure)
            if ink == INK:
                svg = inline_svg(figure, path.stem)
            else:
                figure.savefig(path, dpi=130, facecolor="white")
    return svg


def _proxy_figure(figure: Figure, results: Mapping[str, Any]) -> None:
    axes: Axes = figure.subplots()
    points = results["proxy"]["points"]
    x, y = [point["alpha"] - 1 for point in points], [point["relative"] for point in points]
    axes.errorbar(x, y, yerr=[point["error"] for point in points], fmt="none", ecolor=GREY, alpha=0.5, elinewidth=0.8)
    opposed = [a * b < 0 for a, b in zip(x, y, strict=True)]
    axes.scatter(x, y, s=16, c=[BLUE if sign else ORANGE for sign in opposed], zorder=3, linewidths=0)
    _cross(axes)
    axes.set_xlabel("α − 1")
    axes.set_ylabel("S(a|s) − H_resp(s), nats")


def _drift_figure(figure: Figure, results: Mapping[str, Any]) -> None:
    panels = figure.subplots(1, 2, sharey=True)
    for axes, (name, colour) in zip(panels, (("positive", RED), ("negative", GREEN)), strict=True):
        points = results["drift"][name]["points"]
        x, y = [point["predicted"] for point in points], [point["measured"] for point in points]
        errors = [point["error"] for point in points]
        axes.errorbar(x, y, yerr=errors, fmt="o", ms=3.5, color=colour, ecolor=GREY, elinewidth=0.8)
        _cross(axes)
        axes.set_title(f"A·(α − 1) {name}")
        axes.set_xlabel("predicted A·(S − H_resp)")
    panels[0].set_ylabel("measured change, nats")


def _cross(axes: Axes) -> None:
    axes.axhline(0, color=GREY, linewidth=0.8)
    axes.axvline(0, color=GREY, linewidth=0.8)


def _dynamics_figure(figure: Figure, runs: Sequence[Run]) -> None:
    for axes, (metric, title, share) in zip(figure.subplots(2, 3).flat, DYNAMICS, strict=True):
        for run, colour in zip(runs, (ORANGE, BLUE), strict=False):
            steps, values = run.series(metric)
            if steps:
                plot_smoothed(axes, steps, values, colour, escape(run.name))
        axes.set_title(title)
        if share:
            percent_axis(axes)
    if len(runs) > 1:
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2)
