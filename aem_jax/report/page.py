"""The report of a run: one self-contained HTML file, without scripts, fonts or pictures from elsewhere."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from aem_jax.files import write_text
from aem_jax.metrics import Evaluation, Rate
from aem_jax.overrides import flatten
from aem_jax.report.curves import draw_curves
from aem_jax.report.run import Run, read_run

NUM_TRANSCRIPTS = 10

FAILURES = {"terminated": "failed", "env_error": "environment error"}
"""Ending of an episode without success → its label on the page; other endings are shown as they are."""


def write_report(run_dir: Path | str) -> Path:
    """Writes `report.html` into a run's folder from the files in it.

    Reads config.json, metrics.jsonl, evaluations.jsonl and transcripts.json; the page leaves out what is missing.

    Args:
        run_dir: folder of the run.

    Returns:
        Path of the page.

    Raises:
        ValueError: the folder does not exist.
        OSError: the page cannot be written.
    """
    run = read_run(run_dir)
    page = Path(run_dir) / "report.html"
    write_text(page, render(run))
    return page


def render(run: Run) -> str:
    """The page of a run, as text."""
    return template("report.html.j2").render(
        run=run,
        chips=config_chips(run.config),
        config=flatten(run.config),
        headlines=[headline(run, split) for split in run.splits()],
        facts=facts(run),
        curves=draw_curves(run),
        transcripts=[episode(transcript) for transcript in spread(run.transcripts, NUM_TRANSCRIPTS)],
    )


def template(name: str, **filters: Callable[..., str]) -> jinja2.Template:
    """A template of this package, with the filters `percent` and `number` and further ones."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("aem_jax.report"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"percent": percent, "number": number, **filters}
    return environment.get_template(name)


def percent(value: float | None) -> str:
    """0.714 → `71.4 %`; whole percentages without the point; a dash for None and NaN."""
    if value is None or not math.isfinite(value):
        return "–"
    text = f"{100 * value:.1f}".removesuffix(".0")
    return f"{text}\u202f%"


def number(value: Any, digits: int = 2) -> str:
    """A number for people, with a typographic minus; a dash for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return "–"
    return f"{value:.{digits}f}".replace("-", "−")


def config_chips(config: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The settings that a reader looks for first: the run's own and AEM's."""
    flat = flatten(config)
    chosen = [(name, value) for name, value in flat.items() if "." not in name or name.startswith("aem.")]
    chosen = [(name, value) for name, value in chosen if name not in ("name", "runs_dir")]
    return [(name, value) for name, value in chosen if value not in (None, "", [], {})][:14]


def headline(run: Run, split: str) -> dict[str, Any]:
    """Before and after on one split, with baselines and task types."""
    before, after, baselines = run.before(split), run.after(split), run.baselines(split)
    labelled = (("warm start", before), ("after", after))
    columns = [(label, evaluation) for label, evaluation in labelled if evaluation]
    columns += [(evaluation.phase, evaluation) for evaluation in baselines]
    task_types = dict.fromkeys(task_type for _, evaluation in columns for task_type in evaluation.by_task_type)
    last = after or before or baselines[0]
    return {
        "split": split,
        "set": last.set,
        "before": before,
        "after": after,
        "gain": after.rate.success - before.rate.success if before and after else None,
        "apart": bool(before and after and after.rate.low > before.rate.high),
        "baselines": baselines,
        "columns": columns,
        "task_types": [task_type_row(task_type, [evaluation for _, evaluation in columns]) for task_type in task_types],
        "bars": [bar(label, evaluation) for label, evaluation in columns],
    }


def task_type_row(task_type: str, evaluations: Sequence[Evaluation]) -> tuple[str, int, list[Rate | None]]:
    """A task type, the number of its tasks in the set, and its rate in each evaluation; None without such tasks."""
    rates = [evaluation.by_task_type.get(task_type) for evaluation in evaluations]
    return task_type.replace("_", " "), max(rate.count for rate in rates if rate), rates


def bar(label: str, evaluation: Evaluation) -> dict[str, Any]:
    """One horizontal bar with its interval, in percent of the full width."""
    rate = evaluation.rate
    return {
        "label": label,
        "rate": rate,
        "width": 100 * rate.success,
        "low": 100 * rate.low,
        "span": 100 * (rate.high - rate.low),
        "turns": evaluation.mean_turns,
        # the task's own score, where it differs from the success
        "mean_score": None if evaluation.mean_score == rate.success else evaluation.mean_score,
        "tone": {"after": "after", "warm start": "before"}.get(label, "baseline"),
    }


def facts(run: Run) -> list[tuple[str, str]]:
    """Duration, speed and parity of the run, as (name, value)."""
    rows: list[tuple[str, str]] = []
    if run.metrics:
        rows.append(("steps", str(len(run.metrics))))
    _, seconds = run.series("time/step")
    if seconds:
        rows += [("training time", duration(math.fsum(seconds))), ("a step", f"{statistics.median(seconds):.2f} s")]
    _, speed = run.series("throughput/tokens_per_s")
    if speed:
        rows.append(("tokens/s, median", f"{statistics.median(speed):,.0f}".replace(",", "\u202f")))
    _, shown = run.series("throughput/prompt_tokens")
    _, computed = run.series("throughput/prefill_tokens")
    if total := math.fsum(shown):
        rows.append(("prompt tokens computed", f"{math.fsum(computed) / total:.0%}"))
    _, gaps = run.series("parity/max")
    if gaps:
        rows.append(("largest parity gap", f"{max(gaps):.1e}".replace("e-0", "e-").replace("-", "−")))
    _, recompiles = run.series("compile/recompiles")
    if recompiles:
        rows.append(("recompiles", f"{max(recompiles):.0f}"))
    return rows


def duration(seconds: float) -> str:
    """Seconds → `3 min 20 s`, in the two largest units."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def spread(items: Sequence[Any], count: int) -> list[Any]:
    """At most `count` of the items, evenly spaced."""
    if len(items) <= count:
        return list(items)
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def episode(transcript: Mapping[str, Any]) -> dict[str, Any]:
    """A transcript with the colours of its cells."""
    turns = [turn for turn in transcript.get("turns") or [] if isinstance(turn, dict)]
    entropies = [turn["entropy"] for turn in turns if isinstance(turn.get("entropy"), int | float)]
    low, high = min(entropies, default=0.0), max(entropies, default=0.0)
    ending = str(transcript.get("ending", "")).lower()
    success = bool(transcript.get("success"))
    return {
        "task_id": transcript.get("task_id", "?"),
        "task_type": str(transcript.get("task_type", "")).replace("_", " "),
        "success": success,
        "ending": "solved" if success else FAILURES.get(ending, ending),
        "tone": "good" if success else "grey" if ending == "env_error" else "bad",
        "step": transcript.get("step"),
        "total": math.fsum(turn["reward"] for turn in turns if isinstance(turn.get("reward"), int | float)),
        "turns": [
            {
                **turn,
                "entropy_tint": tint("purple", share(turn.get("entropy"), low, high)),
                "alpha_tint": signed_tint(turn.get("alpha"), centre=1.0, scale=1.0, up="blue", down="orange"),
                "advantage_tint": signed_tint(turn.get("advantage"), centre=0.0, scale=2.0, up="green", down="red"),
            }
            for turn in turns
        ],
    }


def share(value: Any, low: float, high: float) -> float:
    """Position of a value between low and high, in [0, 1]; 0 where there is none."""
    return (value - low) / (high - low) if isinstance(value, int | float) and high > low else 0.0


def signed_tint(value: Any, centre: float, scale: float, up: str, down: str) -> str:
    """One colour above the centre and another below it, full at a distance of `scale`."""
    if not isinstance(value, int | float) or not math.isfinite(value) or round(value - centre, 2) == 0:
        return tint("grey", 0.0)
    return tint(up if value > centre else down, min(1.0, abs(value - centre) / scale))


def tint(colour: str, strength: float) -> str:
    """CSS of a cell: a named colour of the page at a strength in [0, 1]."""
    return f"background: color-mix(in srgb, var(--{colour}) {round(8 + 52 * strength)}%, transparent)"
