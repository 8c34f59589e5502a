"""Analyses of a grid's runs.

    python -m experiments.claims experiments/alfworld_tiny.toml --variants grpo-aem --steps 0 120

Calls `python -m aem_jax.launch analyze` on finished runs, at some of their checkpoints. The results, without the points
of the plots, are written to experiments/results/GRID.claims.json. Results that are already in that file are kept.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from aem_jax.errors import ConfigError
from aem_jax.files import write_text
from experiments.grid import Grid, Run, read_grid
from experiments.results import RESULTS
from experiments.run import is_done

Claim = Mapping[str, Any]


def read_claims(path: Path) -> list[Claim]:
    """Returns the saved analyses; empty if there is no file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []


def without_points(value: Any) -> Any:
    """Returns the output of `analyze` without the lists of points, with numbers of 4 digits."""
    if isinstance(value, Mapping):
        return {name: without_points(item) for name, item in value.items() if name != "points"}
    return float(f"{value:.4g}") if isinstance(value, float) else value


def analyze(folder: Path, run: Run, step: int) -> Claim:
    """Analyses one checkpoint of one run.

    Raises:
        RuntimeError: the analysis failed; the message gives the reason.
    """
    place = folder / run.name
    command = [sys.executable, "-m", "aem_jax.launch", "analyze", str(place), "--step", str(step)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError((done.stderr or done.stdout).strip().splitlines()[-1])
    results = json.loads((place / "analysis" / "analysis.json").read_text(encoding="utf-8"))
    return {"variant": run.variant, "seed": run.seed, "step": step, **without_points(results)}


def collect(grid: Grid, folder: Path, variants: Sequence[str], steps: Sequence[int], path: Path) -> bool:
    """Runs the missing analyses; returns whether all succeeded."""
    claims = list(read_claims(path))
    known = {(claim["variant"], claim["seed"], claim["step"]) for claim in claims}
    chosen = [run for run in grid.runs(folder) if run.variant in variants]
    complete = True
    for run, step in product(chosen, steps):
        if (run.variant, run.seed, step) in known:
            continue
        try:
            if not is_done(grid.config(run)):
                raise RuntimeError("not done; run it first")
            claims.append(analyze(folder, run, step))
        except RuntimeError as error:
            print(f"{run.name}, step {step}: {error}", flush=True)
            complete = False
            continue
        print(f"{run.name}, step {step}: done", flush=True)
        claims.sort(key=lambda claim: (claim["variant"], claim["step"], claim["seed"]))
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(claims, indent=1) + "\n")
    return complete


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status: 0 if all analyses are done, 1 if not, 2 on bad input."""
    parser = argparse.ArgumentParser(prog="python -m experiments.claims", description="Analyses runs of a grid.")
    parser.add_argument("grid", type=Path, help="TOML file; see experiments/grid.py")
    parser.add_argument("--runs-dir", type=Path, default=Path("runs"), help="the grid's runs lie in a folder of it")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder that numbers are written to")
    parser.add_argument("--variants", nargs="+", required=True, help="variants to analyse, all of their seeds")
    parser.add_argument("--steps", nargs="+", type=int, required=True, help="checkpoints to analyse")
    options = parser.parse_args(argv)
    try:
        grid = read_grid(options.grid)
        if unknown := set(options.variants) - {variant.name for variant in grid.variants}:
            raise ConfigError(f"--variants: expected variants of {options.grid}, got {', '.join(sorted(unknown))}")
        path = options.results / f"{grid.name}.claims.json"
        done = collect(grid, options.runs_dir / grid.name, options.variants, options.steps, path)
        return 0 if done else 1
    except ConfigError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
