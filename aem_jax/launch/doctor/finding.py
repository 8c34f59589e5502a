"""What a check finds. Standard library alone: this must load on a machine where packages are missing."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Attributes:
        ok: whether all is well; None where there is nothing to check, or where it is no fault.
        text: what was found.
        advice: what to do; a fault always has one.
        facts: numbers and names behind the text, for `--json`.
        name: of the check.
        seconds: that it took.
    """

    ok: bool | None
    text: str
    advice: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)
    name: str = ""
    seconds: float = 0.0


def judge(faults: list[str], text: str, advice: str, facts: Mapping[str, Any]) -> Finding:
    """All is well if there are no faults; else they come first, and the advice with them."""
    if not faults:
        return Finding(True, text, facts=facts)
    return Finding(False, f"{'; '.join(faults)} ({text})", advice, facts)


def first_line(error: BaseException) -> str:
    """An error in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].strip()}" if lines else type(error).__name__
