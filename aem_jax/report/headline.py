"""The figure of a result: success, entropy and α over training, for one or several runs and seeds."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from aem_jax.report.curves import draw_evaluations
from aem_jax.report.run import AFTER, BEFORE, DURING, Run, baseline_lines, read_run
from aem_jax.report.style import BLUE, CYCLE, GREEN, GREY, RED, area, escape, figure_style, marker, percent_axis, smooth

Runs = Sequence[Path | str] | Mapping[str, Sequence[Path | str]]


def plot_headline(run_dirs: Runs, out_png: Path | str, *, split: str | None = None) -> Path:
    """Draws success over steps, entropy and α of one run, or of several runs and seeds.

    One run shows the 95 % intervals of its evaluations; several seeds of a setting show their mean and range.

    Args:
        run_dirs: folders of the seeds of one setting, or label → folders for several settings.
        out_png: path of the figure; its folder is created.
        split: evaluation split to show; by default the first that the runs evaluated.

    Returns:
        Path of the figure.

    Raises:
        ValueError: no folder was given, or one does not exist.
    """
    named = run_dirs if isinstance(run_dirs, Mapping) else {"": run_dirs}
    groups = {label: [read_run(folder) for folder in folders] for label, folders in named.items()}
    runs = [run for group in groups.values() for run in group]
    if not runs:
        raise ValueError(f"expected at least one run's folder, got {run_dirs!r}")
    if split is None:
        split = next((name for run in runs for name in run.splits()), "")
    with figure_style("#2a303c"):
        figure = Figure(figsize=(12.6, 3.8), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08))
        success, entropy, alpha = figure.subplots(1, 3, width_ratios=(1.35, 1, 1))
        for index, (label, group) in enumerate(groups.items()):
            colour = CYCLE[index % len(CYCLE)]
            _draw_success(success, group, split, colour, label, training=len(groups) == 1)
            _draw_metric(entropy, group, "entropy/response", colour, label)
        _draw_alpha(alpha, next((g for g in groups.values() if _has_alpha(g)), runs))
        success.set_title(f"Success, {escape(split)}" if split else "Success")
        percent_axis(success)
        _draw_baselines(success, runs, split)
        entropy.set_title("Response entropy, nats")
        alpha.set_title("Coefficient α by sign of advantage")
        for axes in (success, entropy, alpha):
            axes.set_xlabel("training step")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7, steps=[1, 2, 5, 10]))
            if axes.get_legend_handles_labels()[1]:
                place = {"loc": "lower right", "bbox_to_anchor": (1, 0.08)} if axes is success else {"loc": "best"}
                axes.legend(**place)
        out_png = Path(out_png)
        out_png.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out_png, dpi=150, facecolor="white")
    return out_png


def _has_alpha(group: Sequence[Run]) -> bool:
    """Whether α ever differs from 1; with strength 0 it does not."""
    return any(value != 1.0 for run in group for value in run.series("aem/alpha_positive")[1])


def _over_runs(
    curves: Sequence[tuple[Sequence[int], Sequence[float]]],
) -> tuple[list[int], list[float], list[float], list[float]]:
    """Steps common to all curves, with the mean, lowest and highest value at each."""
    values_at = [dict(zip(steps, values, strict=True)) for steps, values in curves if steps]
    steps = sorted(set.intersection(*(set(curve) for curve in values_at))) if values_at else []
    columns = [[curve[step] for curve in values_at] for step in steps]
    return steps, [statistics.fmean(c) for c in columns], [min(c) for c in columns], [max(c) for c in columns]


def _draw_success(axes: Axes, group: Sequence[Run], split: str, colour: str, label: str, training: bool) -> None:
    name = escape(label) or "evaluation"
    if len(group) > 1:
        name = f"{name}, mean and range of {len(group)} seeds"
    evaluated = [run.evaluated(split, BEFORE, DURING, AFTER) for run in group]
    if training:
        for run in group:
            steps, values = run.series("rollout/success")
            smoothed = smooth(values, max(1, len(values) // 20))
            style = {"color": GREY, "alpha": 0.6, "linewidth": 1, "marker": marker(values)}
            axes.plot(steps, smoothed, label="training" if run is group[0] else None, **style)
    if len(group) == 1:
        draw_evaluations(axes, evaluated[0], color=colour, marker="o", markersize=5, capsize=3, label=name)
        return
    points = [([e.step for e in evaluations], [e.rate.success for e in evaluations]) for evaluations in evaluated]
    steps, mean, low, high = _over_runs(points)
    axes.fill_between(*area(steps, low, high), color=colour, alpha=0.15, linewidth=0)
    axes.plot(steps, mean, color=colour, marker="o", markersize=5, label=name, zorder=4)


def _draw_metric(axes: Axes, group: Sequence[Run], metric: str, colour: str, label: str) -> None:
    series = [run.series(metric) for run in group]
    curves = [(steps, smooth(values, max(1, len(values) // 20))) for steps, values in series]
    steps, mean, low, high = _over_runs(curves)
    axes.fill_between(*area(steps, low, high), color=colour, alpha=0.15, linewidth=0)
    axes.plot(steps, mean, color=colour, label=escape(label) or None, marker=marker(steps))


def _draw_alpha(axes: Axes, group: Sequence[Run]) -> None:
    _draw_metric(axes, group, "aem/alpha_positive", GREEN, "advantage > 0")
    _draw_metric(axes, group, "aem/alpha_negative", RED, "advantage < 0")
    axes.axhline(1, color=BLUE, alpha=0.4, linewidth=0.8)


def _draw_baselines(axes: Axes, runs: Sequence[Run], split: str) -> None:
    latest = {evaluation.phase: evaluation for run in runs for evaluation in run.baselines(split)}
    for success, names in baseline_lines(list(latest.values())):
        axes.axhline(success, color=GREY, linewidth=0.9, linestyle=(0, (4, 3)))
        across = axes.get_yaxis_transform()
        axes.text(1, success, f"{escape(names)} ", transform=across, ha="right", va="bottom", fontsize=8)
