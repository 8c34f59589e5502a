"""Generates docs/experiments.md from experiments/results/*.jsonl, which contain every number of the page.

    python -m experiments.table [--check]

The prose is in experiments.md.j2, and that of a grid in sections/GRID.md.j2 (plain.md.j2 without one). A TOML file
defines each grid. A test checks that the committed page matches the committed numbers. The plots are drawn again each
time and are not compared.
"""

import math
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from aem_jax.evaluate import rate
from experiments import cells, relation
from experiments.claims import Claim, read_claims
from experiments.efficiency import BASE, Measurement, path_of, ratio, read_measurements
from experiments.grid import START, Grid, read_grid
from experiments.measures import MEASURES, Interval, differences, interval, number, part, shown
from experiments.plots import draw_pairs, draw_relation
from experiments.results import RESULTS, Result, of_variant, read_results, successes
from scripts.generated_page import table, template, write_or_check

FOLDER = Path(__file__).resolve().parent
PAGE = FOLDER.parent / "docs" / "experiments.md"
IMAGES = PAGE.parent / "images"


class Content(NamedTuple):
    """A grid and its saved numbers."""

    grid: Grid
    results: Sequence[Result]
    claims: Sequence[Claim] = ()
    measurements: Sequence[Measurement] = ()


def comparison_table(grid: Grid, results: Sequence[Result], family: str, name: str) -> str:
    """A row for each variant of a family with runs: its mean, the mean of its comparison, and the difference."""
    measure = MEASURES[name]
    rows = []
    for variant in grid.variants:
        if variant.family != family or not variant.against:
            continue
        ours, theirs = of_variant(results, variant.name), of_variant(results, variant.against)
        if not ours or not theirs:
            continue
        seeds = sorted(ours.keys() & theirs.keys())
        change = differences(results, variant.name, variant.against, measure)
        rows.append(
            [
                grid.title(variant.name),
                shown(interval([measure.of(theirs[seed]) for seed in seeds]), measure.percent),
                shown(interval([measure.of(ours[seed]) for seed in seeds]), measure.percent),
                shown(interval(list(change.values())), measure.percent, signed=True),
                ", ".join(number(value, measure.percent, signed=True) for value in change.values()),
            ]
        )
    header = ["", "compared with", "this", "difference, paired by seed", "each seed"]
    return table(header, rows) if rows else "No runs yet."


def start_table(results: Sequence[Result]) -> str:
    """A row for each seed: the success of its warm start."""
    starts = of_variant(results, START)
    rows = [
        [str(seed), f"{successes(result, 'warmstart'):.1%}".replace("%", " %")]
        for seed, result in sorted(starts.items())
    ]
    return table(["seed", "success before training"], rows) if rows else "No runs yet."


def outcome_table(grid: Grid, results: Sequence[Result], seed: int) -> str:
    """A row for each agent of one seed, on each split: baselines, the policy before training, and after each variant.

    Intervals are of the games (Wilson), not of seeds.
    """
    start, splits, rows = of_variant(results, START).get(seed), [], []
    agents = [] if start is None else [(name, start, name) for name in _phases(start) if name not in _POLICY]
    agents += [] if start is None else [("after the warm start", start, "warmstart")]
    for variant in grid.variants:
        if (result := of_variant(results, variant.name).get(seed)) is not None:
            agents.append((grid.title(variant.name), result, "final"))
    for _, result, phase in agents:
        splits += [e["split"] for e in result["evaluations"] if e["phase"] == phase and e["split"] not in splits]
    for title, result, phase in agents:
        last = {e["split"]: e for e in result["evaluations"] if e["phase"] == phase}
        rows.append([title, *(_won(last[split]) if split in last else "–" for split in splits)])
    return table(["agent", *splits], rows) if rows else "No runs yet."


_POLICY = ("warmstart", "train", "final")


def _phases(result: Result) -> list[str]:
    return list(dict.fromkeys(evaluation["phase"] for evaluation in result["evaluations"]))


def _won(evaluation: Mapping[str, Any]) -> str:
    wins, games = evaluation["wins"], evaluation["games"]
    success = rate([True] * wins + [False] * (games - wins))
    return f"{success.success:.1%} ({success.low:.1%} to {success.high:.1%})".replace("%", " %") + f" of {games}"


def efficiency_table(measurements: Sequence[Measurement], seed: int) -> str:
    """A row for each credit rule that was measured on runs of one seed: e and ρ, with intervals of the groups."""
    rows = [
        [
            f"`{name}`",
            str(line["step"]),
            _of_groups(rule["gain"]),
            _of_groups(rule["difference"], signed=True) if name != BASE else "",
            cells.with_bounds(ratio([line], name)) if name != BASE else "",
        ]
        for line in measurements
        if line["seed"] == seed
        for name, rule in line["rules"].items()
    ]
    header = ["credit rule", "step", "e, return per unit of step size", "e − e of `base`", "ρ"]
    return table(header, rows) if rows else "Not measured yet."


def _of_groups(bounds: Sequence[float | None], signed: bool = False) -> str:
    value = Interval(*(math.nan if bound is None else bound for bound in bounds), count=2)
    return shown(value, percent=False, signed=signed)


def facts(grid: Grid, results: Sequence[Result]) -> str:
    """Describes the number of finished runs, the planned number, and the time that they took."""
    planned = len(grid.runs(Path()))
    runs = [result for result in results if result["variant"] != START]
    if not runs:
        return f"0 of {planned} runs."
    seconds = [run["seconds"] for run in runs]
    return (
        f"{len(runs)} of {planned} runs, {statistics.median(seconds):.0f} s of training each in the median "
        f"({min(seconds)} to {max(seconds)}; starts and evaluations come on top)."
    )


def claims_table(grid: Grid, claims: Sequence[Claim]) -> str:
    """A row for each analysed variant and step: means over seeds of the results of `analyze`."""
    wanted: tuple[tuple[str, Callable[[Claim], float | None]], ...] = (
        ("r of α − 1 and S − H_resp", lambda claim: claim["proxy"]["pearson"]["value"]),
        ("r of α − 1 and Σ H_t − H_resp", lambda claim: claim["proxy"]["pearson_predictable"]["value"]),
        ("signs opposed", lambda claim: claim["proxy"]["opposed"]["value"]),
        ("variance of H̄ between states", lambda claim: claim["entropy"]["between"]["value"]),
        ("r of H̄ and S − H_resp inside states", lambda claim: claim["entropy"]["inside"]["value"]),
        ("ΔH, A·(α − 1) > 0", lambda claim: claim["drift"]["positive"]["measured"]["value"]),
        ("ΔH, A·(α − 1) < 0", lambda claim: claim["drift"]["negative"]["measured"]["value"]),
    )
    rows = []
    for variant in grid.variants:
        own = [claim for claim in claims if claim["variant"] == variant.name]
        for step in sorted({claim["step"] for claim in own}):
            here = [claim for claim in own if claim["step"] == step]
            columns = [[value for claim in here if (value := of(claim)) is not None] for _, of in wanted]
            cells = [shown(interval(column), percent=False) for column in columns]
            rows.append([grid.title(variant.name), str(step), str(len(here)), *cells])
    return table(["", "step", "seeds", *(name for name, _ in wanted)], rows) if rows else "Not analysed yet."


def alive(grid: Grid, results: Sequence[Result], variant: str) -> str:
    """Shows whether AEM had an effect: α's range, flat groups, and mixed groups, over all steps and seeds."""
    runs = list(of_variant(results, variant).values())
    names = ("aem/alpha_min", "aem/alpha_max", "aem/flat_groups", "rollout/mixed_groups")
    if not runs:
        return "No runs yet."
    low, high, flat, mixed = (interval([part(name, 0, 1)(run) for run in runs]).mean for name in names)
    sentence = (
        f"With {grid.title(variant)} α goes from {low:.2f} to {high:.2f} in a step (means); {flat:.0%} of groups are "
        "flat (their entropies span less than the 0.1 nats from which AEM acts), and "
        f"{mixed:.0%} hold both successes and failures."
    )
    return sentence.replace("%", " %")


def render(grids: Sequence[Content]) -> str:
    """Renders the page.

    Raises:
        jinja2.UndefinedError: the template uses an undefined name.
    """
    own = (comparison_table, start_table, outcome_table, efficiency_table, claims_table, facts, alive)
    helpers = {helper.__name__: helper for helper in (*own, *cells.HELPERS, *relation.HELPERS)}
    return template(
        FOLDER / "experiments.md.j2", measures=MEASURES, least_cells=relation.LEAST_CELLS, **helpers
    ).render(grids=grids)


def load(folder: Path = FOLDER, results: Path = RESULTS) -> list[Content]:
    """Loads the grids that have results, in the order of their names.

    Raises:
        ValueError: a file is not a results file.
    """
    grids = []
    for path in sorted(folder.glob("*.toml")):
        lines, claims = results / f"{path.stem}.jsonl", results / f"{path.stem}.claims.json"
        if lines.exists():
            grid = read_grid(path)
            measurements = read_measurements(path_of(grid, results))
            grids.append(Content(grid, read_results(lines), read_claims(claims), measurements))
    return grids


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""

    def plot() -> None:
        for grid, results, _, measurements in load():
            image = IMAGES / f"experiments-{grid.name}.png"
            if grid.factors:
                draw_relation(relation.points_of(grid, results, measurements), image)
            else:
                draw_pairs(grid, results, image)

    return write_or_check(argv, "experiments.table", PAGE, lambda: render(load()), plot)


if __name__ == "__main__":
    sys.exit(main())
