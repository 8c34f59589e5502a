"""Two runs of `bench`, number by number."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aem_jax.errors import ConfigError


@dataclass(frozen=True)
class Ratio:
    """One rate in two runs.

    Attributes:
        name: the benchmark.
        what: what was measured.
        unit: of both rates.
        now: the median of this run.
        then: that of the earlier one.
        note: how the two shapes differ; empty if they do not.
    """

    name: str
    what: str
    unit: str
    now: float
    then: float
    note: str

    @property
    def ratio(self) -> float:
        """Above 1: faster now."""
        return self.now / self.then


_FIELDS = ("name", "what", "shape", "unit", "median")


def read_earlier(path: str) -> Mapping[str, Any]:
    """The last line of a file that `bench` wrote, or a whole file of results.

    Raises:
        ConfigError: no such file, or one without results.
    """
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--compare: expected a file that can be read, got {path}: {error}") from None
    found = _json(text) or _json(text.strip().rpartition("\n")[2])
    results = found.get("results") if isinstance(found, dict) else None
    if not isinstance(results, list) or not all(_is_result(each) for each in results):
        raise ConfigError(
            f"--compare: expected the JSON line that bench prints as the last line of {path}, got something else; "
            "keep one with `bench … > FILE`"
        )
    return found


def ratios(now: Mapping[str, Any], earlier: Mapping[str, Any]) -> list[Ratio]:
    """What both runs measured, in this run's order."""
    key = lambda result: (result["name"], result["what"], result["unit"])
    then = {key(result): result for result in earlier["results"]}
    return [
        Ratio(
            *key(result),
            now=result["median"],
            then=then[key(result)]["median"],
            note=_changed(result["shape"], then[key(result)]["shape"]),
        )
        for result in now["results"]
        if key(result) in then
    ]


def differences(now: Mapping[str, Any], earlier: Mapping[str, Any]) -> list[str]:
    """Devices and versions that were others, each as a sentence: such ratios compare more than the code."""
    here, there = now.get("versions", {}), earlier.get("versions", {})
    return [
        f"{name}: now {here.get(name, 'unknown')}, then {there.get(name, 'unknown')}"
        for name in dict.fromkeys([*here, *there])
        if here.get(name) != there.get(name)
    ]


def _changed(now: str, then: str) -> str:
    return "" if now == then else f"then at: {then}"


def _is_result(each: Any) -> bool:
    return isinstance(each, dict) and all(name in each for name in _FIELDS) and _is_rate(each["median"])


def _is_rate(value: Any) -> bool:
    return isinstance(value, (int, float)) and value > 0


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return None
