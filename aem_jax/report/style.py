"""Style of the figures: one palette, and SVG in the page's text colour, for light and dark pages."""

import io
import math
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, PURPLE, RED, GREY = "#3a78c9", "#e08a2c", "#2c9c6a", "#8a63c7", "#d1495b", "#8a8f98"
CYCLE = (BLUE, ORANGE, GREEN, PURPLE, RED, "#4aa8b8", "#b5893c", "#c76aa5")

INK = "#010203"
"""Placeholder of the page's text colour inside an SVG; no other colour equals it."""

SETTINGS = {
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",  # ships with matplotlib; in a page, CSS replaces it by the page's font
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "grid.linewidth": 0.5,
    "grid.alpha": 0.16,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "legend.handlelength": 1.4,
    "lines.linewidth": 1.7,
    "lines.solid_capstyle": "round",
}


def figure_style(ink: str) -> AbstractContextManager[None]:
    """matplotlib settings of all figures here, with `ink` for text, axes and grid."""
    inked = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color")
    settings: dict[Any, Any] = SETTINGS | dict.fromkeys(inked, ink)
    return matplotlib.rc_context(settings)


def inline_svg(figure: Figure, name: str) -> str:
    """A figure as an `<svg>` element that scales with its column and has the page's text colour.

    `name` makes the ids inside it unique on the page.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    return re.sub(
        r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1), count=1
    )


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Trailing mean over at most `window` values."""
    return [math.fsum(values[max(0, i + 1 - window) : i + 1]) / min(window, i + 1) for i in range(len(values))]


def marker(values: Sequence[Any]) -> str:
    """The marker of a line: one point alone has no line, so it needs one."""
    return "o" if len(values) == 1 else ""


def area(steps: Sequence[float], *values: Sequence[float]) -> tuple[Any, ...]:
    """Steps and values of filled areas; those of one step alone get a width, since nothing would be visible."""
    if len(steps) != 1:
        return steps, *values
    return (steps[0] - 0.4, steps[0] + 0.4), *((value[0], value[0]) for value in values)


def escape(name: str) -> str:
    """A name as a label: matplotlib reads text between two dollars as mathematics, and raises if it is none."""
    return name.replace("$", r"\$")


def plot_smoothed(axes: Axes, steps: Sequence[int], values: Sequence[float], colour: str, label: str) -> None:
    """A series as a trailing mean over a twentieth of its length, with the raw values faint behind it."""
    window = max(1, len(values) // 20)
    if window > 1:
        axes.plot(steps, values, color=colour, alpha=0.22, linewidth=0.8)
    axes.plot(steps, smooth(values, window), color=colour, label=label, marker=marker(values))


def percent_axis(axes: Axes) -> None:
    """A y axis of shares in [0, 1], labelled in percent."""
    axes.set_ylim(-0.02, 1.02)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1.0], ["0 %", "25 %", "50 %", "75 %", "100 %"])
