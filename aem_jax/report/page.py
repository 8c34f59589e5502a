"""A run as one HTML file that needs nothing beside it: no script, no font, no picture from elsewhere."""

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from aem_jax.report.curves import draw_curves
from aem_jax.report.run import Evaluation, Run, Score, flat_config, read_run

NUM_TRANSCRIPTS = 10

FAILURES = {"terminated": "failed", "env_error": "environment error"}
"""Ending of an episode without success → its label on the page; other endings are shown as they are."""


def write_report(run_dir: Path | str) -> Path:
    """Writes `report.html` into a run's folder from what the run left there.

    Reads config.json, metrics.jsonl, evaluations.jsonl and transcripts.json; whatever is missing is left out of the
    page.

    Args:
        run_dir: folder of the run.

    Returns:
        path of the page.

    Raises:
        ValueError: the folder does not exist.
    """
    run = read_run(run_dir)
    page = Path(run_dir) / "report.html"
    temporary = page.with_name("report.html.new")
    temporary.write_text(render(run), encoding="utf-8")
    temporary.replace(page)
    return page


def render(run: Run) -> str:
    """The page of a run, as text."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("aem_jax.report"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"percent": percent, "number": number}
    return environment.get_template("report.html.j2").render(
        run=run,
        chips=config_chips(run.config),
        config=flat_config(run.config),
        headlines=[headline(run, split) for split in run.splits()],
        facts=facts(run),
        curves=draw_curves(run),
        transcripts=[episode(transcript) for transcript in spread(run.transcripts, NUM_TRANSCRIPTS)],
    )


def percent(value: float) -> str:
    """0.714 → `71.4 %`; whole per cents without the point."""
    text = f"{100 * value:.1f}".removesuffix(".0")
    return f"{text}\u202f%"


def number(value: Any, digits: int = 2) -> str:
    """A number for people; what is none, a dash. Minus is a minus."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return "–"
    return f"{value:.{digits}f}".replace("-", "−")


def config_chips(config: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The few settings that a reader looks for first: the run's own, and those of the method."""
    flat = flat_config(config)
    own = [(name, value) for name, value in flat.items() if "." not in name or name.startswith("aem.")]
    own = [(name, value) for name, value in own if name not in ("name", "runs_dir")]
    return [(name, value) for name, value in own if value not in (None, "", [], {})][:14]


def headline(run: Run, split: str) -> dict[str, Any]:
    """Before and after on one split, with baselines and task types."""
    before, after, baselines = run.before(split), run.after(split), run.baselines(split)
    columns = [(label, found) for label, found in (("warm start", before), ("after", after)) if found]
    columns += [(evaluation.phase, evaluation) for evaluation in baselines]
    task_types = dict.fromkeys(task_type for _, evaluation in columns for task_type in evaluation.by_task_type)
    last = after or before or baselines[0]
    return {
        "split": split,
        "set": last.set_name,
        "before": before,
        "after": after,
        "gain": after.score.success - before.score.success if before and after else None,
        "apart": bool(before and after and after.score.low > before.score.high),
        "baselines": baselines,
        "columns": columns,
        "task_types": [task_type_row(task_type, [evaluation for _, evaluation in columns]) for task_type in task_types],
        "bars": [bar(label, evaluation) for label, evaluation in columns],
    }


def task_type_row(task_type: str, evaluations: Sequence[Evaluation]) -> tuple[str, int, list[Score | None]]:
    """A task type, the number of its tasks in the set, and its score in each evaluation that has one."""
    scores = [evaluation.by_task_type.get(task_type) for evaluation in evaluations]
    return task_type.replace("_", " "), max(score.count for score in scores if score), scores


def bar(label: str, evaluation: Evaluation) -> dict[str, Any]:
    """One horizontal bar with its interval, in per cent of the full width."""
    score: Score = evaluation.score
    return {
        "label": label,
        "score": score,
        "width": 100 * score.success,
        "low": 100 * score.low,
        "span": 100 * (score.high - score.low),
        "turns": evaluation.mean_turns,
        # the task's own score, where it says more than the success
        "mean_score": None if evaluation.mean_score == score.success else evaluation.mean_score,
        "tone": {"after": "after", "warm start": "before"}.get(label, "baseline"),
    }


def facts(run: Run) -> list[tuple[str, str]]:
    """The run in a few numbers: how long, how fast, how exact."""
    found: list[tuple[str, str]] = []
    if run.metrics:
        found.append(("steps", str(len(run.metrics))))
    _, seconds = run.series("time/step")
    if seconds:
        found += [("training time", duration(math.fsum(seconds))), ("a step", f"{statistics.median(seconds):.2f} s")]
    _, speed = run.series("throughput/tokens_per_s")
    if speed:
        found.append(("tokens/s, median", f"{statistics.median(speed):,.0f}".replace(",", "\u202f")))
    _, gaps = run.series("parity/max")
    if gaps:
        found.append(("largest parity gap", f"{max(gaps):.1e}".replace("e-0", "e-").replace("-", "−")))
    _, recompiles = run.series("compile/recompiles")
    if recompiles:
        found.append(("recompiles", f"{max(recompiles):.0f}"))
    return found


def duration(seconds: float) -> str:
    """Seconds → `3 min 20 s`, in the two largest units."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def spread(items: Sequence[Any], count: int) -> list[Any]:
    """At most `count` of the items, evenly over all of them."""
    if len(items) <= count:
        return list(items)
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def episode(transcript: Mapping[str, Any]) -> dict[str, Any]:
    """A transcript with the colours of its numbers."""
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
    """Where a value lies between two others, in [0, 1]."""
    return (value - low) / (high - low) if isinstance(value, int | float) and high > low else 0.0


def signed_tint(value: Any, centre: float, scale: float, up: str, down: str) -> str:
    """One colour above the centre and another below, full at `scale` away from it."""
    if not isinstance(value, int | float) or not math.isfinite(value) or round(value - centre, 2) == 0:
        return tint("grey", 0.0)
    return tint(up if value > centre else down, min(1.0, abs(value - centre) / scale))


def tint(colour: str, strength: float) -> str:
    """CSS of a cell: the named colour of the page, as strong as said."""
    return f"background: color-mix(in srgb, var(--{colour}) {round(8 + 52 * strength)}%, transparent)"
