"""What a run came to, as a table: success with its 95 % interval, of the baselines, before and after training."""

from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from rich.console import Console
from rich.table import Table

LABELS = {"warmstart": "before training", "train": "while training", "final": "after training", "evaluate": "evaluated"}
"""Phases of the policy; any other phase is a baseline, named by itself."""


def print_summary(records: Sequence[Mapping[str, Any]], how: str, stream: TextIO | None = None) -> None:
    """Prints the latest record of each phase and set.

    Args:
        records: lines of `evaluations.jsonl`.
        how: how actions were chosen, e.g. "sampled at temperature 1".
        stream: where to; standard output where it is not given.
    """
    scored = [each.get("mean_score") for each in records]  # a column of its own where it says more than the success
    scored = any(score is not None and score != each["success"] for score, each in zip(scored, records, strict=True))
    columns = ("set", "agent", "success", "95 % interval", *(["score"] if scored else []), "tasks", "turns")
    table = Table(*columns, title=f"success ({how})")
    latest = {(each["set"], each["phase"]): each for each in records if each["phase"] != "train"}
    baselines_first = sorted(latest.items(), key=lambda item: (item[0][0], item[0][1] in LABELS))
    for (name, phase), each in baselines_first:
        success = _share(each["success"])  # none where every episode's environment broke
        interval = f"{each['low']:.1%} – {each['high']:.1%}"
        label = LABELS.get(phase, phase)
        score = [_share(each.get("mean_score"))] if scored else []
        table.add_row(name, label, success, interval, *score, str(each["count"]), f"{each['mean_turns']:.1f}")
    Console(file=stream, soft_wrap=True).print(table)


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def sampled(temperature: float) -> str:
    """How a policy's tokens are chosen, in words."""
    return f"sampled at temperature {temperature:g}" if temperature else "greedy"
