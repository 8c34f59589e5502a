"""Results as tables."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from aem_jax.bench.compare import differences, ratios
from aem_jax.bench.measure import Measurement
from aem_jax.bench.roofline import Roofline


def print_rates(console: Console, found: Sequence[Measurement], versions: Mapping[str, str]) -> None:
    """Rates with their spread, and the share of the roofline that the median is."""
    table = Table("benchmark", "median", "quartiles", "slowest – fastest", "unit", "of roofline", show_lines=True)
    for each in found:
        table.add_row(
            f"{each.name}: {each.what}\n[dim]{each.shape}[/dim]",
            number(each.median),
            " – ".join(map(number, each.quartiles)),
            f"{number(each.worst)} – {number(each.best)}",
            each.unit,
            "" if each.roofline is None else _share(each.roofline),
        )
    console.print(", ".join(f"{name} {version}" for name, version in versions.items()))
    console.print(table)
    for ceilings in {each.roofline.ceilings for each in found if each.roofline is not None}:
        console.print(
            f"roofline: a copy moves {ceilings.bandwidth / 1e9:.3g} GB/s, "
            f"a {ceilings.dtype} matrix product does {ceilings.peak / 1e9:.4g} GFLOP/s"
        )


def print_facts(console: Console, found: Sequence[Measurement]) -> None:
    """What else was found, one line a benchmark."""
    for each in (each for each in found if each.facts):
        facts = ", ".join(f"{name.replace('_', ' ')} {number(value)}" for name, value in each.facts.items())
        console.print(f"{each.name}, {each.what}: {facts}")


def print_ratios(console: Console, now: Mapping[str, Any], earlier: Mapping[str, Any]) -> None:
    """What both runs have, and what else was different between them."""
    table = Table("benchmark", "what", "now", "then", "now / then", "note", title="compared with the earlier run")
    for each in ratios(now, earlier):
        rates = (f"{number(rate)} {each.unit}" for rate in (each.now, each.then))
        table.add_row(each.name, each.what, *rates, f"{each.ratio:.3f}", each.note)
    console.print(table if table.row_count else "nothing that both runs measured")
    for note in differences(now, earlier):
        console.print(f"note: {note}")


def number(value: float) -> str:
    """Three digits, or all before the point; millions as such."""
    if abs(value) >= 1e7:
        return f"{value / 1e6:,.0f} M"
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"


def _share(roofline: Roofline) -> str:
    mfu = "" if roofline.mfu is None else f"\nMFU {roofline.mfu:.1%}"
    return f"{roofline.share:.1%} of {roofline.bound}{mfu}"
