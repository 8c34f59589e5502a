"""What a check finds. Standard library alone: this must load on a machine where packages are missing."""

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
    "attention-triton": "attention:triton",
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
"""Name -> module and function, in order; imported when it is its turn."""


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
    """An error in one line: its first, and its last where the first announces it."""
    lines = str(error).strip().splitlines() or [""]
    text = (
        f"{lines[0].strip()} {lines[-1].strip()}" if lines[0].rstrip().endswith(":") and lines[1:] else lines[0].strip()
    )
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
