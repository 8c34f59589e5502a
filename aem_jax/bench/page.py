"""Results as tables, and their ratios to an earlier run of `bench`."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from aem_jax.bench.measure import Measurement
from aem_jax.errors import ConfigError


def print_rates(console: Console, results: Sequence[Measurement], versions: Mapping[str, str]) -> None:
    """Prints rates with their spread, and the median's share of the roofline."""
    table = Table("benchmark", "median", "quartiles", "slowest – fastest", "unit", "of roofline", show_lines=True)
    for result in results:
        share = ""
        if line := result.roofline:
            share = f"{line.share:.1%} of {line.bound}" + ("" if line.mfu is None else f"\nMFU {line.mfu:.1%}")
        table.add_row(
            f"{result.name}: {result.what}\n[dim]{result.shape}[/dim]",
            number(result.median),
            " – ".join(map(number, result.quartiles)),
            f"{number(result.worst)} – {number(result.best)}",
            result.unit,
            share,
        )
    console.print(", ".join(f"{name} {version}" for name, version in versions.items()))
    console.print(table)
    for ceilings in {result.roofline.ceilings for result in results if result.roofline is not None}:
        console.print(
            f"roofline: a copy moves {ceilings.bandwidth / 1e9:.3g} GB/s, "
            f"a {ceilings.dtype} matrix product does {ceilings.peak / 1e9:.4g} GFLOP/s"
        )


def print_facts(console: Console, results: Sequence[Measurement]) -> None:
    """Prints the other results, one line a benchmark."""
    for result in results:
        if result.facts:
            facts = ", ".join(f"{name.replace('_', ' ')} {number(value)}" for name, value in result.facts.items())
            console.print(f"{result.name}, {result.what}: {facts}")


def print_ratios(console: Console, now: Mapping[str, Any], earlier: Mapping[str, Any]) -> None:
    """Prints the rates that both runs have, and the differences between their machines."""
    table = Table("benchmark", "what", "now", "then", "now / then", "note", title="compared with the earlier run")
    for rate in ratios(now, earlier):
        rates = (f"{number(value)} {rate.unit}" for value in (rate.now, rate.then))
        table.add_row(rate.name, rate.what, *rates, f"{rate.ratio:.3f}", rate.note)
    console.print(table if table.row_count else "the two runs have no measurement in common")
    for note in differences(now, earlier):
        console.print(f"note: {note}")


def number(value: float) -> str:
    """Formats with three digits, or with all digits before the decimal point; large values in millions."""
    if abs(value) >= 1e7:
        return f"{value / 1e6:,.0f} M"
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"


@dataclass(frozen=True)
class Ratio:
    """One rate in two runs.

    Attributes:
        name: the benchmark.
        what: the measured operation.
        unit: of both rates.
        now: median of this run.
        then: median of the earlier run.
        note: the earlier shape, if it differs.
    """

    name: str
    what: str
    unit: str
    now: float
    then: float
    note: str

    @property
    def ratio(self) -> float:
        """Above 1: this run is faster."""
        return self.now / self.then


def read_earlier(path: str) -> Mapping[str, Any]:
    """Reads the last line of a file that `bench` wrote, or a complete results file.

    Raises:
        ConfigError: the file is missing, or has no results.
    """
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--compare: expected a file that can be read, got {path}: {error}") from None
    run = _json(text) or _json(text.strip().rpartition("\n")[2])
    results = run.get("results") if isinstance(run, dict) else None
    if not isinstance(results, list) or not all(map(_is_result, results)):
        raise ConfigError(
            f"--compare: expected the JSON line that bench prints as the last line of {path}, got something else; "
            "keep one with `bench … > FILE`"
        )
    return run


def ratios(now: Mapping[str, Any], earlier: Mapping[str, Any]) -> list[Ratio]:
    """The rates that both runs have, in the order of this run."""
    key = lambda result: (result["name"], result["what"], result["unit"])
    then = {key(result): result for result in earlier["results"]}
    pairs = [(result, then[key(result)]) for result in now["results"] if key(result) in then]
    shape_note = lambda new, old: "" if new["shape"] == old["shape"] else f"then at: {old['shape']}"
    return [Ratio(*key(new), new["median"], old["median"], shape_note(new, old)) for new, old in pairs]


def differences(now: Mapping[str, Any], earlier: Mapping[str, Any]) -> list[str]:
    """Differing devices and versions, each as a clause: such ratios compare more than the code."""
    here, there = now.get("versions", {}), earlier.get("versions", {})
    return [
        f"{name}: now {here.get(name, 'unknown')}, then {there.get(name, 'unknown')}"
        for name in dict.fromkeys([*here, *there])
        if here.get(name) != there.get(name)
    ]


def _is_result(value: Any) -> bool:
    if not isinstance(value, dict) or not {"name", "what", "shape", "unit", "median"} <= value.keys():
        return False
    return isinstance(value["median"], (int, float)) and value["median"] > 0


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return None
