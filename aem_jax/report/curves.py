"""The curves of a report. A drawing function takes a run and axes, and returns whether the run had data for it."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from aem_jax.metrics import Evaluation
from aem_jax.report.run import AFTER, BEFORE, DURING, Run, baseline_lines, series
from aem_jax.report.style import (
    BLUE,
    CYCLE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    PURPLE,
    RED,
    area,
    escape,
    figure_style,
    inline_svg,
    marker,
    percent_axis,
    plot_smoothed,
    smooth,
)


@dataclass(frozen=True)
class Curve:
    """One figure of the page."""

    title: str
    note: str
    svg: str


def draw_success(run: Run, axes: Axes) -> bool:
    """Success in training, evaluations with their 95 % intervals, and baselines as lines."""
    steps, values = run.series("rollout/success")
    if steps:
        plot_smoothed(axes, steps, values, GREY, "training episodes")
    drawn = bool(steps)
    for split, colour, shape in zip(run.splits(), CYCLE, "osD^v<>p", strict=False):
        evaluations = run.evaluated(split, BEFORE, DURING, AFTER)
        style = {"markersize": 4.5, "linewidth": 1.2, "elinewidth": 1, "capsize": 2.5}
        drawn |= draw_evaluations(axes, evaluations, color=colour, marker=shape, label=escape(split), **style)
    for success, names in baseline_lines(run.baselines(run.splits()[0]) if run.splits() else []):
        axes.axhline(success, color=INK, alpha=0.45, linewidth=0.9, linestyle=(0, (4, 3)))
        across = axes.get_yaxis_transform()
        axes.text(1, success, f"{escape(names)} ", transform=across, ha="right", va="bottom", fontsize=8, alpha=0.7)
    percent_axis(axes)
    return drawn


def draw_evaluations(axes: Axes, evaluations: Sequence[Evaluation], **style: Any) -> bool:
    """Success of evaluations over steps, with 95 % intervals."""
    rates = [evaluation.rate for evaluation in evaluations]
    steps, success = [evaluation.step for evaluation in evaluations], [rate.success for rate in rates]
    errors = [[rate.success - rate.low for rate in rates], [rate.high - rate.success for rate in rates]]
    if rates:
        axes.errorbar(steps, success, yerr=errors, zorder=4, **style)
    return bool(rates)


def draw_task_types(run: Run, axes: Axes) -> bool:
    """Success in training by task type, smoothed twice as much, since each type has few episodes a step."""
    names = run.names("rollout/success/")
    for name, colour in zip(names, CYCLE * (1 + len(names) // len(CYCLE)), strict=False):
        steps, values = run.series(name)
        label = escape(name.removeprefix("rollout/success/").replace("_", " "))
        smoothed = smooth(values, max(1, len(values) // 8))
        axes.plot(steps, smoothed, color=colour, label=label, linewidth=1.4, marker=marker(values))
    percent_axis(axes)
    return bool(names)


def draw_alpha(run: Run, axes: Axes) -> bool:
    """Mean α of responses with positive and with negative advantage, and the range of α."""
    steps, low = run.series("aem/alpha_min")
    _, high = run.series("aem/alpha_max")
    if steps and len(low) == len(high):
        axes.fill_between(*area(steps, low, high), color=GREY, alpha=0.14, linewidth=0, label="min to max")
    drawn = bool(steps)
    for name, colour, label in (
        ("aem/alpha_positive", GREEN, "advantage > 0"),
        ("aem/alpha_negative", RED, "advantage < 0"),
    ):
        steps, values = run.series(name)
        if steps:
            drawn = True
            plot_smoothed(axes, steps, values, colour, label)
    axes.axhline(1, color=INK, alpha=0.45, linewidth=0.8)
    return drawn


def draw_lines(*lines: tuple[str, str, str], log: bool = False, percent: bool = False) -> Callable[[Run, Axes], bool]:
    """Draws each (metric, colour, label) that the run has."""

    def draw(run: Run, axes: Axes) -> bool:
        drawn = False
        for name, colour, label in lines:
            steps, values = run.series(name)
            if log:
                points = [(step, value) for step, value in zip(steps, values, strict=True) if value > 0]
                steps, values = [step for step, _ in points], [value for _, value in points]
            if steps:
                drawn = True
                plot_smoothed(axes, steps, values, colour, label)
        if log and drawn:
            axes.set_yscale("log")
        if percent:
            percent_axis(axes)
        elif drawn and not log:
            axes.margins(y=0.15)
        return drawn

    return draw


def draw_efficiency(run: Run, axes: Axes) -> bool:
    """ρ of the latest n measurements, AEM's gains a over those of the base algorithm b, with its 95 % interval.

        ρ = Σ a / Σ b        σ(ρ) = √(n / (n − 1) · Σ (a − ρ b)²) / Σ b        n: half of all, at least 8

    Points are omitted where the 95 % interval of Σ b contains 0: there ρ has no meaning.
    """
    (steps, gains), (_, base) = run.series("aem/gain"), run.series("aem/gain_base")
    if not steps:
        return False
    window, points = max(8, len(steps) // 2), []
    for end in range(window, len(steps) + 1):
        own, other = gains[end - window : end], base[end - window : end]
        mean, total = math.fsum(other) / window, math.fsum(other)
        spread = lambda values: math.sqrt(window / (window - 1) * math.fsum(value**2 for value in values))
        if total > 1.96 * spread(value - mean for value in other):
            ratio = math.fsum(own) / total
            error = 1.96 * spread(a - ratio * b for a, b in zip(own, other, strict=True)) / total
            points.append((steps[end - 1], ratio, ratio - error, ratio + error))
    if points:
        axes.axhline(1, color=INK, alpha=0.45, linewidth=0.8)
        at, ratios, low, high = zip(*points, strict=True)
        axes.plot(at, ratios, color=ORANGE, marker=".", markersize=4)
        axes.fill_between(at, low, high, color=ORANGE, alpha=0.2, linewidth=0)
    else:
        axes.set(xlim=(steps[0], max(steps[-1], steps[0] + 1)), yticks=[])
        text = f"{len(steps)} measurements do not resolve the gain of the base algorithm,\nso ρ is unknown"
        axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", fontsize=8)
    return True


def draw_time(run: Run, axes: Axes) -> bool:
    """Seconds of each step by phase, stacked, and the rest of the step. `time/a_b` is a part of `time/a`."""
    totals = {record["step"]: record["time/step"] for record in run.metrics if record.get("time/step") is not None}
    named = [name for name in run.names("time/") if name != "time/step"]
    phases = [name for name in named if not any(name.startswith(f"{other}_") for other in named)]
    steps = sorted(totals) or sorted({step for name in phases for step in run.series(name)[0]})
    if not steps or not phases:
        return False
    seconds_of = {name: dict(zip(*run.series(name), strict=True)) for name in phases}
    layers = [[seconds_of[name].get(step, 0.0) for step in steps] for name in phases]
    labels = [escape(name.removeprefix("time/")) for name in phases]
    if totals:
        rest = [totals[step] - math.fsum(seconds) for step, seconds in zip(steps, zip(*layers), strict=True)]
        layers.append([max(0.0, seconds) for seconds in rest])
        labels.append("rest")
    colours = [*CYCLE[: len(phases)], *[GREY] * (len(layers) - len(phases))]
    axes.stackplot(*area(steps, *layers), labels=labels, colors=colours, alpha=0.75, linewidth=0)
    axes.set_ylim(bottom=0)
    return True


def draw_warmstart(run: Run, axes: Axes) -> bool:
    """Loss of the warm start, over its own steps."""
    steps, values = series(run.warmstart, "learner/loss")
    if steps:
        plot_smoothed(axes, steps, values, PURPLE, "loss")
        axes.set_ylim(bottom=0)
    return bool(steps)


CURVES: tuple[tuple[str, str, Callable[[Run, Axes], bool]], ...] = (
    ("Success", "Share of episodes solved. Bars are 95 % intervals over a fixed set of tasks.", draw_success),
    (
        "Entropy",
        "Nats. Of a response: the mean over its tokens, then over responses.",
        draw_lines(("entropy/response", PURPLE, "response"), ("entropy/token", ORANGE, "token")),
    ),
    ("α by sign of advantage", "α > 1 makes a response weigh more, α < 1 less; the mean of a group is 1.", draw_alpha),
    (
        "Efficiency ρ",
        "Gain of return per unit of step size with AEM, relative to the base algorithm; above 1, the next small "
        "step gains more with AEM. Of the latest measurements (half of all), with the 95 % interval.",
        draw_efficiency,
    ),
    ("Success by task type", "Training episodes, trailing mean.", draw_task_types),
    ("Return", "Mean of an episode's rewards.", draw_lines(("rollout/return", BLUE, "return"))),
    (
        "Valid actions",
        "Share of responses that the environment understood and allowed.",
        draw_lines(("rollout/valid_action", GREEN, "valid"), percent=True),
    ),
    ("Turns", "Mean number of turns of an episode.", draw_lines(("rollout/turns", ORANGE, "turns"))),
    (
        "Groups",
        "Mixed: returns differ, so there is a learning signal. Flat: entropies within aem.min_range, so α is 1.",
        draw_lines(("rollout/mixed_groups", BLUE, "mixed"), ("aem/flat_groups", GREY, "flat"), percent=True),
    ),
    (
        "Parity",
        "Learner's against sampler's log-probability of the same token, nats.",
        draw_lines(("parity/max", RED, "largest gap"), ("parity/mean", BLUE, "mean gap"), log=True),
    ),
    (
        "Update",
        "Share of tokens clipped, and divergence (nats) from the sampler and, where it is held, the reference.",
        draw_lines(
            ("learner/clip_fraction", ORANGE, "clip fraction"),
            ("learner/kl_sampler", BLUE, "KL, sampler to policy"),
            ("learner/kl_reference", PURPLE, "KL to reference"),
        ),
    ),
    ("Gradient norm", "Before clipping.", draw_lines(("learner/grad_norm", BLUE, "gradient norm"))),
    ("Time of a step", "Seconds, by phase.", draw_time),
    (
        "Throughput",
        "Tokens sampled and prefilled, per second of a step.",
        draw_lines(("throughput/tokens_per_s", GREEN, "tokens/s")),
    ),
    ("Warm start", "Cross-entropy on the expert's responses, nats a token.", draw_warmstart),
)


def draw_curves(run: Run) -> list[Curve]:
    """All curves that the run has data for, in the page's order."""
    curves = []
    for index, (title, note, draw) in enumerate(CURVES):
        with figure_style(INK):
            figure = Figure(figsize=(6.0, 2.9), layout="constrained")
            axes = figure.subplots()
            if not draw(run, axes):
                continue
            axes.set_xlabel("step")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, steps=[1, 2, 5, 10]))
            handles, labels = axes.get_legend_handles_labels()
            if len(labels) > 1:
                figure.legend(handles, labels, loc="outside upper left", ncols=3)
            curves.append(Curve(title, note, inline_svg(figure, f"curve-{index}")))
    return curves
