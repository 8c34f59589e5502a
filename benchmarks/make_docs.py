"""Generates docs/benchmarks.md from benchmarks/results/*.json, which contain every number of the page.

    python -m benchmarks.make_docs [--check]

A results file contains its `kind`, the date, the machine, the versions, the command and the seeds:

    peers  output of `python -m benchmarks.peers … --out FILE`
    bench  output of `python -m aem_jax.launch bench … > FILE`
    envs   the numbers of `python -m benchmarks.envs`, under `line`

The prose is in benchmarks.md.j2. Files are shown in the order of their names. A test checks that the committed page
matches the committed files.
"""

import json
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from aem_jax.bench.page import number
from scripts.generated_page import table, template, write_or_check

FOLDER = Path(__file__).resolve().parent
PAGE = FOLDER.parent / "docs" / "benchmarks.md"
OWN = "aem_jax"

COMMON = ("kind", "date", "versions", "commands", "seeds")
FIELDS: Mapping[str, tuple[str, ...]] = {
    "peers": (*COMMON, "machine", "comparison", "title", "unit", "values", "ratios"),
    "bench": (*COMMON, "results"),
    "envs": (*COMMON, "machine", "line"),
}
"""Required fields of each kind of file."""

Result = Mapping[str, Any]


def load(folder: Path) -> list[Result]:
    """Reads all results of a folder, in the order of their names.

    Raises:
        ValueError: a file is not a results file.
    """
    return [read(path) for path in sorted(folder.glob("*.json"))]


def read(path: Path) -> Result:
    """Reads one results file.

    Raises:
        ValueError: it is not a results file; the message names what is missing.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"expected JSON in {path.name}, got {error}") from None
    kind = str(result.get("kind")) if isinstance(result, dict) else "none"
    if kind not in FIELDS:
        raise ValueError(f"expected a kind of {', '.join(FIELDS)} in {path.name}, got {kind!r}")
    if missing := [name for name in FIELDS[kind] if name not in result]:
        raise ValueError(f"expected {', '.join(missing)} in {path.name}; write it with the program that measures")
    return result


def render(results: Sequence[Result]) -> str:
    """Renders the page.

    Raises:
        jinja2.UndefinedError: the template uses a name that no result has.
    """
    helpers = (where, commands, peers_table, bench_table, bench_facts, reached)
    of_kind = {kind: [result for result in results if result["kind"] == kind] for kind in FIELDS}
    comparisons: dict[str, list[Result]] = {}
    for result in of_kind["peers"]:
        comparisons.setdefault(result["comparison"], []).append(result)
    page = template(FOLDER / "benchmarks.md.j2", **{helper.__name__: helper for helper in helpers})
    return page.render(comparisons=comparisons, benches=of_kind["bench"], envs=of_kind["envs"])


def where(result: Result) -> str:
    """Describes date, machine, versions and seeds of a result."""
    parts = [result["date"]]
    if "machine" in result:
        parts.append(f"{result['machine']['cpu']}, {result['machine']['cores']} cores")
    for name, version in result["versions"].items():
        if isinstance(version, dict):  # the packages of a program
            packages = ", ".join(f"{package} {release}" for package, release in version.items())
            parts.append(f"{name}: {packages}")
        else:
            parts.append(f"{name} {version}")
    note = f" {result['note']}" if result.get("note") else ""
    return f"{'; '.join(parts)}; seeds: {result['seeds']}.{note}"


def reached(values: Sequence[float], least: float) -> str:
    """Describes in how many rounds the value is at least `least`."""
    return f"{sum(value >= least for value in values)} of {len(values)}"


def commands(results: Iterable[Result]) -> str:
    """Returns a code block of the commands, without repetitions."""
    lines = dict.fromkeys(command for result in results for command in result["commands"].values())
    return "\n".join(["```sh", *lines, "```"])


def peers_table(results: Sequence[Result]) -> str:
    """Returns a table with a row for each file: its rounds' values, and the ratios to each peer with their median."""
    peers = list(dict.fromkeys(name for result in results for name in result["ratios"]))
    unit = results[0]["unit"]
    header = ["shape", f"{OWN}, {unit}", *(f"{name}, {unit}" for name in peers), *(f"against {name}" for name in peers)]
    rows = [
        [
            result["title"],
            *(_values(result["values"].get(name, ())) for name in (OWN, *peers)),
            *(_ratios(result["ratios"].get(name, ())) for name in peers),
        ]
        for result in results
    ]
    return table(header, rows)


def bench_table(result: Result) -> str:
    """Returns a table with a row for each number of a `bench` run."""
    header = ["benchmark", "shape", "median", "quartiles", "slowest – fastest", "of the roofline"]
    rows = [
        [
            f"{rate['name']}: {rate['what']}",
            rate["shape"],
            f"{number(rate['median'])} {rate['unit']}",
            " – ".join(map(number, rate["quartiles"])),
            f"{number(rate['worst'])} – {number(rate['best'])}",
            _share(rate["roofline"]),
        ]
        for rate in result["results"]
    ]
    return table(header, rows)


def bench_facts(result: Result) -> str:
    """Returns a list of the ceilings of a `bench` run and its results other than rates."""
    ceilings = {json.dumps(rate["roofline"]["ceilings"]) for rate in result["results"] if rate["roofline"]}
    lines = [
        f"- ceilings: a copy moves {number(device['bandwidth'] / 1e9)} GB/s, a {device['dtype']} matrix product does "
        f"{number(device['peak'] / 1e9)} GFLOP/s"
        for device in map(json.loads, sorted(ceilings))
    ]
    for rate in result["results"]:
        if rate["facts"]:
            facts = ", ".join(f"{name.replace('_', ' ')} {number(value)}" for name, value in rate["facts"].items())
            lines.append(f"- {rate['name']}, {rate['what']}: {facts}")
    return "\n".join(lines)


def _values(values: Sequence[float]) -> str:
    return ", ".join(number(value).replace(",", "") for value in values) or "–"


def _ratios(ratios: Sequence[float]) -> str:
    if not ratios:
        return "–"
    rounds = f" ({', '.join(f'{ratio:.1f}' for ratio in ratios)})" if len(ratios) > 1 else ""
    return f"**{statistics.median(ratios):.1f}×**{rounds}"


def _share(roofline: Mapping[str, Any] | None) -> str:
    if roofline is None:
        return "–"
    mfu = "" if roofline["mfu"] is None else f", MFU {roofline['mfu']:.1%}"
    return f"{roofline['share']:.1%} of {roofline['bound']}{mfu}"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    results = FOLDER / "results"
    return write_or_check(argv, "benchmarks.make_docs", PAGE, lambda: render(load(results)), lambda: None)


if __name__ == "__main__":
    sys.exit(main())
