"""Efficiencies of credit rules (`analyze RUN --efficiency True`) as files: numbers, a figure, one page, and a table."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from aem_jax.files import write_text
from aem_jax.metrics import json_line
from aem_jax.report.analysis import estimate, png_and_svg
from aem_jax.report.page import duration, number, percent, template
from aem_jax.report.style import BLUE, GREY, ORANGE


def write_efficiency(results: Mapping[str, Any], folder: Path) -> Path:
    """Writes efficiency.json, efficiency.png and efficiency.html.

    Args:
        results: the numbers of `aem_jax.launch.efficiency`.
        folder: output folder; created if it does not exist.

    Returns:
        Path of the page.
    """
    folder.mkdir(parents=True, exist_ok=True)
    numbers = json.dumps(json.loads(json_line(results)), indent=1, ensure_ascii=False)
    write_text(folder / "efficiency.json", numbers + "\n")
    svg = png_and_svg(lambda figure: _figure(figure, results), (7.0, 3.8), folder / "efficiency.png")
    page = folder / "efficiency.html"
    text = template("efficiency.html.j2", estimate=estimate).render(
        results=results, svg=svg, answer=answer(results), took=duration(results["seconds"])
    )
    write_text(page, text)
    return page


def answer(results: Mapping[str, Any]) -> str:
    """One sentence: whether AEM's update gains more return here than that of the base algorithm."""
    if "aem" not in results["rules"]:
        return "AEM was not among the rules."
    ratio, above = results["rules"]["aem"]["ratio"], results["rules"]["aem"]["above"]
    if not results["rules"]["base"]["gain"]["low"] > 0:
        return "No answer: the gain of the base algorithm itself is not resolved. Play more --groups."
    text = f"ρ = {estimate(ratio)}"
    if ratio["low"] > 1:
        return f"{text}: AEM gains more return per step here than the base algorithm."
    if ratio["high"] < 1:
        return f"{text}: AEM gains less return per step here than the base algorithm."
    return f"{text}: no difference is resolved (AEM is ahead at a one-sided confidence of {percent(above)})."


def print_efficiency(results: Mapping[str, Any], stream: TextIO | None = None) -> None:
    """The numbers as a table, and the answer.

    Args:
        results: as in `write_efficiency`.
        stream: output; by default standard output.
    """
    title = (
        f"{results['run']}, step {results['step']}: {results['episodes']} episodes, {percent(results['success'])} won"
    )
    table = Table("rule", "e / e_base", "e, return per step unit", "entropy, nats", "cosine", "ahead", title=title)
    for name, rule in results["rules"].items():
        gain, entropy = estimate(rule["gain"], 4), estimate(rule["entropy"], 4)
        cosine = number(rule["cosine"]["value"], 3)
        ahead = "–" if name == "base" else percent(rule["above"])
        table.add_row(name, "1" if name == "base" else estimate(rule["ratio"]), gain, entropy, cosine, ahead)
    console = Console(file=stream, soft_wrap=True)
    console.print(table)
    responses = results["responses"]
    within, low = responses["entropy_within_states"], responses["decisive_at_low_entropy"]
    console.print(
        f"geometry: {results['geometry']}. Variance of H̄ within states: {percent(within)} (of the "
        f"{responses['repeated']} of {responses['count']} responses to states that were visited again). "
        f"Mean α where A > 0: {number(responses['alpha_positive'])}, where A < 0: "
        f"{number(responses['alpha_negative'])}. Decisive turns of low entropy: {percent(low)}."
    )
    console.print(answer(results))


def _figure(figure: Figure, results: Mapping[str, Any]) -> None:
    axes: Axes = figure.subplots()
    names = [name for name in results["rules"] if name != "base"]
    for row, name in enumerate(reversed(names)):
        ratio = results["rules"][name]["ratio"]
        if not math.isfinite(ratio["value"]):
            continue
        colour = ORANGE if name == "aem" else BLUE
        axes.plot([ratio["low"], ratio["high"]], [row, row], color=colour, linewidth=1.6)
        axes.plot([ratio["value"]], [row], "o", ms=5, color=colour)
    axes.set_yticks(range(len(names)), list(reversed(names)))
    axes.axvline(1, color=GREY, linewidth=0.8)
    axes.set_xlabel("ρ: gain of return per unit of step size, relative to the base rule")
