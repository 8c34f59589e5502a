"""The result of a check. Imports the standard library only: it must load on a machine without the packages."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

CHECKS: Mapping[str, str] = {
    "versions": "machine:versions",
    "devices": "machine:devices",
    "memory": "machine:memory",
    "disk": "machine:disk",
    "parity-float32": "parity:float32",
    "parity-bfloat16": "parity:bfloat16",
    "parity-int8-weights": "parity:int8_weights",
    "parity-int8-cache": "parity:int8_cache",
    "parity-lora": "parity:lora_apart",
    "parity-lora-merged": "parity:lora_merged",
    "greedy": "parity:greedy",
    "attention-xla": "attention:xla",
    "attention-splash": "attention:splash",
    "attention-cudnn": "attention:cudnn",
    "attention-decode": "attention:decode",
    "mesh": "training:mesh",
    "recompiles": "training:recompiles",
    "servers": "training:servers",
    "sandbox-bubblewrap": "machine:bubblewrap",
    "sandbox-docker": "machine:docker",
    "sandbox-podman": "machine:podman",
    "ceilings": "speed:peaks",
    "decode": "speed:decode",
    "learner": "speed:learn",
}
"""Name -> module and function, in order. A module is imported only before its check runs."""


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        ok: whether the check passed; None if there is nothing to check, or if the result is not a fault.
        text: the result, for people.
        advice: how to fix a fault; every fault has one.
        facts: the numbers and names used in the text, for `--json`.
        name: name of the check.
        seconds: duration of the check.
    """

    ok: bool | None
    text: str
    advice: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)
    name: str = ""
    seconds: float = 0.0


def judge(faults: list[str], text: str, advice: str, facts: Mapping[str, Any]) -> Finding:
    """A passed check if there are no faults. Otherwise the faults precede the text, and the advice is included."""
    if not faults:
        return Finding(True, text, facts=facts)
    return Finding(False, f"{'; '.join(faults)} ({text})", advice, facts)


def first_line(error: BaseException) -> str:
    """An error in one line: its first line, with its last line if the first only introduces it."""
    lines = str(error).strip().splitlines() or [""]
    text = (
        f"{lines[0].strip()} {lines[-1].strip()}" if lines[0].rstrip().endswith(":") and lines[1:] else lines[0].strip()
    )
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
