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
    table = Table("set", "agent", "success", "95 % interval", "tasks", "turns", title=f"success ({how})")
    latest = {(each["set"], each["phase"]): each for each in records if each["phase"] != "train"}
    baselines_first = sorted(latest.items(), key=lambda item: (item[0][0], item[0][1] in LABELS))
    for (name, phase), each in baselines_first:
        success = "–" if each["success"] is None else f"{each['success']:.1%}"  # every episode's environment broke
        interval = f"{each['low']:.1%} – {each['high']:.1%}"
        label = LABELS.get(phase, phase)
        table.add_row(name, label, success, interval, str(each["count"]), f"{each['mean_turns']:.1f}")
    Console(file=stream, soft_wrap=True).print(table)


def sampled(temperature: float) -> str:
    """How a policy's tokens are chosen, in words."""
    return f"sampled at temperature {temperature:g}" if temperature else "greedy"
