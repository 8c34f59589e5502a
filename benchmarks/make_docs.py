"""Generates docs/benchmarks.md from benchmarks/results/*.json, which contain every number of the page.

    python -m benchmarks.make_docs [--check]

A results file contains its `kind`, the date, the machine, the versions, the command and the seeds:

    peers  output of `python -m benchmarks.peers … --out FILE`
    bench  output of `python -m aem_jax.launch bench … > FILE`
    envs   the numbers of `python -m benchmarks.envs`, under `line`

The prose is in benchmarks.md.j2. Files are shown in the order of their names. A test checks that the committed page
matches the committed files.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

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
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.globals |= {
        "where": where,
        "commands": commands,
        "peers_table": peers_table,
        "bench_table": bench_table,
        "bench_facts": bench_facts,
        "reached": reached,
    }
    of_kind = {kind: [each for each in results if each["kind"] == kind] for kind in FIELDS}
    comparisons: dict[str, list[Result]] = {}
    for each in of_kind["peers"]:
        comparisons.setdefault(each["comparison"], []).append(each)
    template = environment.get_template("benchmarks.md.j2")
    return template.render(comparisons=comparisons, benches=of_kind["bench"], envs=of_kind["envs"])


def where(result: Result) -> str:
    """Describes date, machine, versions and seeds of a result."""
    said = [result["date"]]
    if "machine" in result:
        said.append(f"{result['machine']['cpu']}, {result['machine']['cores']} cores")
    for name, found in result["versions"].items():
        said.append(f"{name}: {_list(found)}" if isinstance(found, dict) else f"{name} {found}")
    note = f" {result['note']}" if result.get("note") else ""
    return f"{'; '.join(said)}; seeds: {result['seeds']}.{note}"


def reached(values: Sequence[float], least: float) -> str:
    """Describes in how many rounds the value is at least `least`."""
    return f"{sum(value >= least for value in values)} of {len(values)}"


def commands(results: Iterable[Result]) -> str:
    """Returns a code block of the commands, without repetitions."""
    lines = dict.fromkeys(command for each in results for command in each["commands"].values())
    return "\n".join(["```sh", *lines, "```"])


def peers_table(results: Sequence[Result]) -> str:
    """Returns a table with a row for each file: its rounds' values, and the ratios to each peer with their median."""
    peers = list(dict.fromkeys(name for each in results for name in each["ratios"]))
    unit = results[0]["unit"]
    header = ["shape", f"{OWN}, {unit}", *(f"{name}, {unit}" for name in peers), *(f"against {name}" for name in peers)]
    rows = [
        [
            each["title"],
            *(_values(each["values"].get(name, ())) for name in (OWN, *peers)),
            *(_ratios(each["ratios"].get(name, ())) for name in peers),
        ]
        for each in results
    ]
    return _table(header, rows)


def bench_table(result: Result) -> str:
    """Returns a table with a row for each number of a `bench` run."""
    header = ["benchmark", "shape", "median", "quartiles", "slowest – fastest", "of the roofline"]
    rows = [
        [
            f"{each['name']}: {each['what']}",
            each["shape"],
            f"{number(each['median'])} {each['unit']}",
            " – ".join(map(number, each["quartiles"])),
            f"{number(each['worst'])} – {number(each['best'])}",
            _share(each["roofline"]),
        ]
        for each in result["results"]
    ]
    return _table(header, rows)


def bench_facts(result: Result) -> str:
    """Returns a list of the ceilings of a `bench` run and its results other than rates."""
    found = {json.dumps(each["roofline"]["ceilings"]) for each in result["results"] if each["roofline"]}
    lines = [
        f"- ceilings: a copy moves {number(each['bandwidth'] / 1e9)} GB/s, a {each['dtype']} matrix product does "
        f"{number(each['peak'] / 1e9)} GFLOP/s"
        for each in map(json.loads, sorted(found))
    ]
    for each in (each for each in result["results"] if each["facts"]):
        facts = ", ".join(f"{name.replace('_', ' ')} {number(value)}" for name, value in each["facts"].items())
        lines.append(f"- {each['name']}, {each['what']}: {facts}")
    return "\n".join(lines)


def number(value: float) -> str:
    """Formats with three digits, or with all digits before the decimal point."""
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"


def _list(found: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in found.items())


def _values(values: Sequence[float]) -> str:
    return ", ".join(number(each).replace(",", "") for each in values) or "–"


def _ratios(ratios: Sequence[float]) -> str:
    if not ratios:
        return "–"
    rounds = f" ({', '.join(f'{each:.1f}' for each in ratios)})" if len(ratios) > 1 else ""
    return f"**{statistics.median(ratios):.1f}×**{rounds}"


def _share(roofline: Mapping[str, Any] | None) -> str:
    if roofline is None:
        return "–"
    mfu = "" if roofline["mfu"] is None else f", MFU {roofline['mfu']:.1%}"
    return f"{roofline['share']:.1%} of {roofline['bound']}{mfu}"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    row = lambda cells: f"| {' | '.join(cells)} |"
    return "\n".join([row(header), "|---" * len(header) + "|", *map(row, rows)])


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.make_docs", description="Writes docs/benchmarks.md.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the page is another one")
    options = parser.parse_args(argv)
    try:
        page = render(load(FOLDER / "results"))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.check:
        same = PAGE.exists() and PAGE.read_text(encoding="utf-8") == page
        print("the page is up to date" if same else "the page is another one; run python -m benchmarks.make_docs")
        return 0 if same else 1
    PAGE.write_text(page, encoding="utf-8")
    print(f"wrote {PAGE.relative_to(FOLDER.parent)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
