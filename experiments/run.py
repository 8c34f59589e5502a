"""Runs a grid: python -m experiments.run experiments/alfworld_tiny.toml

Every run is a separate process, `python -m aem_jax.launch` with the grid's options, and writes its output to
logs/NAME.txt. Finished runs are skipped, and interrupted runs resume, so rerunning the command continues the grid. The
start runs come first. After each run, the numbers of all finished runs are written to experiments/results/GRID.jsonl,
from which `python -m experiments.table` makes docs/experiments.md. If the grid measures checkpoints, this follows each
run, and goes to GRID.efficiency.jsonl.

A part of a grid can run on another machine: --seeds and --cells choose it, and --missing leaves out what the results
files already have.
"""

import argparse
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from aem_jax.config import saved
from aem_jax.config.run import RunConfig
from aem_jax.errors import ConfigError
from experiments import efficiency
from experiments.grid import Grid, Run, read_grid
from experiments.results import RESULTS, final_splits, key_of, read_results, write_results

REPOSITORY = Path(__file__).resolve().parents[1]


@dataclass
class Workers:
    """Resources of the jobs (processor cores or GPUs), and the running processes.

    Attributes:
        places: cores and environment variables of each free job.
        running: processes to stop when the driver stops.
        stopping: set when no further run may begin.
    """

    places: SimpleQueue = field(default_factory=SimpleQueue)
    running: set[subprocess.Popen] = field(default_factory=set)
    stopping: threading.Event = field(default_factory=threading.Event)


def deal(jobs: int, pin: bool, gpus: int) -> Workers:
    """Assigns resources to each job: with `pin` separate cores, with `gpus` one of that many GPUs.

    Raises:
        ConfigError: there are more jobs to pin than cores.
    """
    workers, cores = Workers(), sorted(os.sched_getaffinity(0))
    if pin and jobs > len(cores):
        raise ConfigError(f"--jobs: expected at most {len(cores)} with --pin, one for each core, got {jobs}")
    for job in range(jobs):
        own = cores[job * len(cores) // jobs : (job + 1) * len(cores) // jobs] if pin else cores
        workers.places.put((own, {"CUDA_VISIBLE_DEVICES": str(job % gpus)} if gpus else {}))
    return workers


def is_done(config: RunConfig) -> bool:
    """Whether a run has its report and all final evaluations.

    Raises:
        ConfigError: the run's folder contains a run with other settings, as in `train`.
    """
    folder = Path(config.runs_dir) / config.name
    if not (folder / saved.FILE).exists():
        return False
    saved.check_resumable(saved.load(folder), config, folder)
    splits = final_splits(folder, config.train.num_steps)
    return (folder / "report.html").exists() and splits >= set(config.evaluation.splits)


def run_one(grid: Grid, run: Run, workers: Workers, logs: Path) -> bool:
    """Executes one run to its end; returns whether it is finished."""
    if workers.stopping.is_set():
        return False
    config = grid.config(run)
    if is_done(config):
        print(f"{run.name}: done before", flush=True)
        return True
    began = time.monotonic()
    status = launch(grid.words(run), workers, logs / f"{run.name}.txt")
    done = status == 0 and is_done(config)
    print(f"{run.name}: {outcome(done, status, began, logs / f'{run.name}.txt')}", flush=True)
    return done


def outcome(done: bool, status: int, began: float, log: Path) -> str:
    """Describes how a process ended."""
    what = "done" if done else "stopped" if status in (130, 143) else f"failed with status {status}, see {log}"
    return f"{what} after {time.monotonic() - began:.0f} s"


def launch(words: Sequence[str], workers: Workers, log_file: Path) -> int:
    """Executes `python -m aem_jax.launch WORDS` on the next free cores; returns its exit status."""
    cores, variables = workers.places.get()
    try:
        with log_file.open("a", encoding="utf-8") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "aem_jax.launch", *words],
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **variables},
                cwd=Path.cwd(),
                start_new_session=True,  # the driver handles Ctrl-C
            )
            workers.running.add(process)
            os.sched_setaffinity(process.pid, cores)
            if workers.stopping.is_set():
                process.send_signal(signal.SIGTERM)
            status = process.wait()
            workers.running.discard(process)
    finally:
        workers.places.put((cores, variables))
    return status


def measure_one(grid: Grid, folder: Path, run: Run, step: int, workers: Workers, logs: Path) -> dict[str, Any] | None:
    """Measures one checkpoint of a finished run; returns the line of the results, None if it failed."""
    if workers.stopping.is_set():
        return None
    began, log = time.monotonic(), logs / f"{run.name}-step{step}.txt"
    status = launch(efficiency.words(folder, run, step, grid.measured), workers, log)
    print(f"{run.name}, step {step}: {outcome(status == 0, status, began, log)}", flush=True)
    return None if status else efficiency.line_of(folder, run, step)


def runs_of(
    grid: Grid, folder: Path, seeds: Collection[int] = (), cells: Collection[str] = ()
) -> tuple[list[Run], list[Run]]:
    """The runs of some seeds and cells, with their start runs; of all, if none is named.

    Raises:
        ConfigError: the grid does not have one of the seeds or cells.
    """
    starts, runs = grid.starts(folder), grid.runs(folder)

    def choose(option: str, named: Collection, known: Iterable) -> Collection:
        known = list(dict.fromkeys(known))
        if unknown := [item for item in named if item not in known]:
            listed = lambda items: ", ".join(map(str, items)) or "none"
            raise ConfigError(f"--{option}: expected {option} of {grid.name} ({listed(known)}), got {listed(unknown)}")
        return named or known

    seeds = choose("seeds", seeds, (run.seed for run in starts))
    cells = choose("cells", cells, (cell.name for cell in grid.cells))
    runs = [run for run in runs if run.seed in seeds and run.cell in cells]
    begun = {run.start for run in runs}
    return [run for run in starts if run.name in begun], runs


def without_saved(grid: Grid, chosen: tuple[list[Run], list[Run]], results: Path) -> tuple[list[Run], list[Run]]:
    """Leaves out the runs whose numbers and measurements are saved, and the start runs that no other run needs."""
    starts, runs = chosen
    path = results / f"{grid.name}.jsonl"
    there = {key_of(line) for line in (read_results(path) if path.exists() else ())}
    measured = efficiency.read_measurements(efficiency.path_of(grid, results))
    left = [
        run for run in runs if (run.cell, run.variant, run.seed) not in there or efficiency.missing(grid, run, measured)
    ]
    begun = {run.start for run in left}
    return [run for run in starts if run.name in begun], left


def run_grid(
    grid: Grid, folder: Path, workers: Workers, jobs: int, results: Path, chosen: tuple[list[Run], list[Run]]
) -> bool:
    """Executes the chosen start runs and runs of a grid, and their measurements; returns whether all are finished.

    Raises:
        ConfigError: a run cannot begin; raised before any run begins.
    """
    starts, runs = chosen
    for run in (*starts, *runs):
        is_done(grid.config(run))
    logs = folder / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    lock = threading.Lock()

    def go(run: Run) -> bool:
        done = run_one(grid, run, workers, logs)
        with lock:
            write_results(grid, folder, results)
        return done and measure(run)

    def measure(run: Run) -> bool:
        path, complete = efficiency.path_of(grid, results), True
        for step in efficiency.missing(grid, run, efficiency.read_measurements(path)):
            if line := measure_one(grid, folder, run, step, workers, logs):
                with lock:
                    efficiency.add(grid, folder, line, path)
            complete = complete and line is not None
        return complete

    with ThreadPoolExecutor(jobs) as pool:
        begun = dict(zip([run.name for run in starts], pool.map(go, starts), strict=True))
        started = [run for run in runs if begun[run.start]]
        done = list(pool.map(go, started))
    left = [run.name for run, is_finished in zip(started, done, strict=True) if not is_finished]
    left += [run.name for run in runs if not begun[run.start]]
    if left:
        print(f"not done: {', '.join(left)}; the same command goes on", flush=True)
    return not left


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status: 0 if all runs are finished, 1 if not, 2 on bad input."""
    parser = argparse.ArgumentParser(prog="python -m experiments.run", description="Runs a grid, or goes on with it.")
    parser.add_argument("grid", type=Path, help="TOML file; see experiments/grid.py")
    parser.add_argument("--runs-dir", type=Path, default=Path("runs"), help="the grid's runs lie in a folder of it")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder that numbers are written to")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--pin", action="store_true", help="give each job its own share of the processor's cores")
    parser.add_argument("--gpus", type=int, default=0, help="give each job one of so many GPUs")
    parser.add_argument("--seeds", type=int, nargs="+", default=(), help="only the runs of these seeds")
    parser.add_argument("--cells", nargs="+", default=(), help="only the runs of these cells")
    parser.add_argument("--missing", action="store_true", help="only runs that the results files do not have")
    parser.add_argument("--list", action="store_true", help="print the commands, and which are done; run nothing")
    options = parser.parse_args(argv)
    try:
        grid = read_grid(options.grid)
        folder = options.runs_dir / grid.name
        chosen = runs_of(grid, folder, options.seeds, options.cells)
        if options.missing:
            chosen = without_saved(grid, chosen, options.results)
        if options.list:
            for run in (*chosen[0], *chosen[1]):
                done = "done" if is_done(grid.config(run)) else "to do"
                print(f"{done:6} python -m aem_jax.launch {' '.join(grid.words(run))}")
            return 0
        workers = deal(options.jobs, options.pin, options.gpus)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: _stop(workers))
        return 0 if run_grid(grid, folder, workers, options.jobs, options.results, chosen) else 1
    except ConfigError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _stop(workers: Workers) -> None:
    """Lets running processes finish their step and save; no further run begins."""
    workers.stopping.set()
    for process in list(workers.running):
        process.send_signal(signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main())
