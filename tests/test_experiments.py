"""The grid driver runs the grid file, skips finished runs and resumes; the page matches the recorded lines."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from aem_jax.errors import ConfigError
from aem_jax.metrics import read_lines
from experiments.claims import main as claims_main
from experiments.claims import without_points
from experiments.grid import START, read_grid
from experiments.measures import MEASURES, differences, interval, part, shown
from experiments.plots import draw_pairs
from experiments.results import RESULTS, binned, read_results, successes
from experiments.run import deal, is_done, launch, runs_of
from experiments.run import main as run_main
from experiments.table import FOLDER, PAGE, Content, claims_table, comparison_table, load, outcome_table, render

ROOT = Path(__file__).resolve().parents[1]
SMALL = ROOT / "tests" / "launch" / "small.toml"

MINI = f"""
[grid]
preset = "{SMALL}"
seeds = [0]

[shared]
train.num_steps = 1
learner.kl_coefficient = 0.0
evaluation.every = 0
evaluation.baselines = false
evaluation.size = 4
metrics.tensorboard = false

[start]
warmstart.steps = 2

[[variants]]
name = "grpo"
family = "algorithms"
options.aem.strength = 0.0

[[variants]]
name = "grpo-aem"
title = "GRPO + AEM"
family = "algorithms"
against = "grpo"
"""


def result(variant: str, seed: int, wins: int, success: list[float | None] | None = None) -> dict:
    final = [{"phase": "final", "step": 4, "split": name, "wins": wins, "games": 10} for name in ("seen", "unseen")]
    before = {"phase": "warmstart", "step": 0, "split": "seen", "wins": 1, "games": 10}
    curves = {"rollout/success": success or [0.1, 0.2, 0.3, 0.4, 0.5]}
    return {
        "variant": variant, "seed": seed, "steps": 4, "seconds": 9, "evaluations": [before, *final], "curves": curves
    }  # fmt: skip


@pytest.fixture
def mini(tmp_path: Path) -> Path:
    (tmp_path / "mini.toml").write_text(MINI)
    return tmp_path / "mini.toml"


def test_the_committed_page_matches_the_committed_results():
    grids = load()
    files = {path.name.removesuffix(".jsonl") for path in RESULTS.glob("*.jsonl")}
    assert [grid.name for grid, *_ in grids] == sorted(name for name in files if "." not in name)
    assert PAGE.read_text(encoding="utf-8") == render(grids), "run python -m experiments.table"


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.toml")), ids=lambda path: path.name)
def test_every_run_of_a_committed_grid_has_a_valid_config(path: Path):
    grid = read_grid(path)
    starts, runs = grid.starts(Path("runs")), grid.runs(Path("runs"))
    configs = {run.name: grid.config(run) for run in (*starts, *runs)}
    assert len(configs) == len(starts) + len(runs)
    # the variants of a cell and seed start from one run, so everything they share is equal
    assert all(run.start == "" and configs[run.name].warmstart.init_from == "" for run in starts)
    for run in runs:
        start = configs[run.start]
        assert configs[run.name].warmstart.init_from == f"runs/{run.start}" and start.seed == run.seed
        assert (start.model, start.tokenizer) == (configs[run.name].model, configs[run.name].tokenizer)


def test_options_become_arguments_of_the_command_line(mini: Path):
    grid = read_grid(mini)
    (start,), (base, aem) = grid.starts(Path("r")), grid.runs(Path("r"))
    assert (start.name, base.name, aem.name) == ("start-seed0", "grpo-seed0", "grpo-aem-seed0")
    assert start.options["train.num_steps"] == 0 and start.options["warmstart.steps"] == 2
    words = " ".join(grid.words(base))
    assert words.startswith(f"--preset {SMALL} --runs-dir r --name grpo-seed0 --seed 0 --train.num-steps 1")
    assert words.endswith("--aem.strength 0.0 --warmstart.init-from r/start-seed0")
    assert grid.config(base).aem.strength == 0 and grid.config(aem).aem.strength == 1


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("aem.strength", "aem.strenth", "did you mean --aem.strength"),
        ('against = "grpo"', 'against = "dapo"', "to compare 'grpo-aem' with, got 'dapo'"),
        ('name = "grpo"', 'name = "start"', "none of them 'start'"),
        ("[shared]", "[common]", "got 'common' too"),
        ("options", "option", "expected name, options"),
    ],
)
def test_a_grid_with_a_mistake_is_refused(mini: Path, old: str, new: str, message: str):
    mini.write_text(MINI.replace(old, new, 1))
    with pytest.raises(ConfigError, match=message):
        grid = read_grid(mini)
        [grid.config(run) for run in grid.runs(Path("r"))]


def test_curves_are_means_over_bins():
    assert binned([1.0, 2.0, 3.0, 4.0, 5.0], 2) == [1.5, 4.0]  # steps 0-1, steps 2-4
    assert binned([1.0, None, math.nan, 1 / 3], 2) == [1.0, 0.3333]
    assert binned([None, 2.0], 30) == [None, 2.0]


def test_success_is_over_all_games_of_the_last_evaluations():
    assert successes(result("a", 0, 3)) == 6 / 20
    assert successes(result("a", 0, 3), "warmstart") == 1 / 10
    assert math.isnan(successes(result("a", 0, 3), "train"))


def test_part_is_the_mean_of_a_section_of_a_curve():
    # 5 bins: the first fifth is the first, the last fifth the last
    assert part("rollout/success", 0, 0.2)(result("a", 0, 1)) == pytest.approx(0.1)
    assert part("rollout/success", 0.8, 1)(result("a", 0, 1)) == pytest.approx(0.5)
    assert part("rollout/success", 0, 1)(result("a", 0, 1)) == pytest.approx(0.3)
    assert math.isnan(part("entropy/response", 0, 1)(result("a", 0, 1)))


def test_intervals_are_students():
    # t(1 degree of freedom) = 12.706, t(2) = 4.303; {0, 1} has s = 1/√2 and a standard error of 1/2
    assert interval([1.0, 0.0]) == pytest.approx((0.5, 0.5 - 6.353, 0.5 + 6.353, 2), abs=1e-3)
    assert interval([1.0, 2.0, 3.0]) == pytest.approx((2.0, 2 - 4.303 / 3**0.5, 2 + 4.303 / 3**0.5, 3), abs=1e-3)
    assert interval([0.25, 0.25, 0.25]) == (0.25, 0.25, 0.25, 3)
    assert interval([2.0, 1.0, 4.0]) == interval([4.0, 2.0, 1.0, math.nan])
    assert math.isnan(interval([0.3]).low) and interval([]).count == 0
    assert shown(interval([1.0, 0.0]), percent=True) == "50.0 % (0.0 to 100.0)"  # no fraction is outside
    assert shown(interval([-0.1, -0.1]), percent=True, signed=True) == "−10.0 points (−10.0 to −10.0)"


def test_intervals_contain_the_mean_of_normal_numbers_in_95_of_100_cases():
    samples = np.random.default_rng(0).normal(size=(2000, 3))
    inside = [low <= 0 <= high for _, low, high, _ in map(interval, samples)]
    assert np.mean(inside) == pytest.approx(0.95, abs=0.015)


def test_differences_are_paired_by_seed(mini: Path):
    # of 20 games: seed 0 wins 6 -> 10, seed 1 wins 8 -> 8; seed 2 has no partner
    runs = [result("grpo", 0, 3), result("grpo", 1, 4), result("grpo", 2, 9)]
    runs += [result("grpo-aem", 1, 4), result("grpo-aem", 0, 5)]
    assert differences(runs, "grpo-aem", "grpo", MEASURES["final"]) == pytest.approx({0: 0.2, 1: 0.0})
    table = comparison_table(read_grid(mini), runs, "algorithms", "final")
    assert table.splitlines()[2:] == [
        "| GRPO + AEM | 35.0 % (0.0 to 98.5) | 45.0 % (0.0 to 100.0) | +10.0 points (−117.1 to +137.1) | +20.0, 0.0 |"
    ]
    assert "+10.0 points" in render([Content(read_grid(mini), runs)])


def claim(seed: int, r: float, falls: float | None) -> dict:
    proxy = {"pearson": {"value": r}, "pearson_predictable": {"value": -0.5}, "opposed": {"value": 0.75}}
    change = {"measured": {"value": 0.01}}
    drift = {"positive": {"measured": {"value": falls}}, "negative": change}
    entropy = {"between": {"value": 0.875}, "inside": {"value": 0.25}}
    return {"variant": "grpo-aem", "seed": seed, "step": 4, "proxy": proxy, "entropy": entropy, "drift": drift}


def test_outcomes_of_a_seed_have_the_intervals_of_their_games(mini: Path):
    start, ours = result(START, 0, 0), result("grpo-aem", 0, 5)
    start["evaluations"].insert(0, {"phase": "zero-shot", "step": 0, "split": "seen", "wins": 0, "games": 10})
    lines = outcome_table(read_grid(mini), [start, ours, result("grpo-aem", 1, 9)], 0).splitlines()
    assert lines[0] == "| agent | seen | unseen |"
    assert lines[2] == "| zero-shot | 0.0 % (0.0 % to 27.8 %) of 10 | – |"
    assert lines[3].startswith("| after the warm start | 10.0 %")
    assert lines[4] == "| GRPO + AEM | 50.0 % (23.7 % to 76.3 %) of 10 | 50.0 % (23.7 % to 76.3 %) of 10 |"
    assert len(lines) == 5 and outcome_table(read_grid(mini), [], 0) == "No runs yet."


def test_claims_are_means_over_seeds(mini: Path):
    table = claims_table(read_grid(mini), [claim(0, -0.25, -0.03), claim(1, -0.75, None)])
    assert table.splitlines()[2:] == [
        "| GRPO + AEM | 4 | 2 | −0.500 (−3.677 to 2.677) | −0.500 (−0.500 to −0.500) | 0.750 (0.750 to 0.750) "
        "| 0.875 (0.875 to 0.875) | 0.250 (0.250 to 0.250) | −0.030 | 0.010 (0.010 to 0.010) |"
    ]
    assert without_points({"points": [1], "a": {"points": [], "b": 0.123456}}) == {"a": {"b": 0.1235}}


def test_unfinished_runs_are_not_analysed(mini: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    words = [str(mini), "--runs-dir", str(tmp_path), "--results", str(tmp_path), "--steps", "1", "--variants"]
    assert claims_main([*words, "grpo"]) == 1
    assert "grpo-seed0, step 1: not done" in capsys.readouterr().out and not list(tmp_path.glob("*.claims.json"))
    assert claims_main([*words, "gspo"]) == 2


def test_pairs_are_drawn_from_bins(mini: Path, tmp_path: Path):
    runs = [result(name, seed, 3, [0.1, None, 0.3]) for name in ("grpo", "grpo-aem") for seed in (0, 1)]
    path = draw_pairs(read_grid(mini), runs, tmp_path / "images" / "pairs.png")
    assert path is not None and path.stat().st_size > 5000
    assert draw_pairs(read_grid(mini), runs[:2], tmp_path / "none.png") is None  # nothing to compare with


@pytest.mark.slow
def test_a_grid_runs_and_resumes(mini: Path, tmp_path: Path, user_environment: dict[str, str]):
    def drive(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "experiments.run", str(mini), "--runs-dir", str(tmp_path / "runs")]
        command += ["--results", str(tmp_path), *words]
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=user_environment)

    mini.write_text(MINI[: MINI.rindex("[[variants]]")])  # one variant will do: every run is a process
    done = drive("--jobs", "2", "--pin")
    assert done.returncode == 0, done.stdout + done.stderr
    folder = tmp_path / "runs" / "mini"
    start, trained = read_results(tmp_path / "mini.jsonl")
    assert [(result["variant"], result["seed"], result["steps"]) for result in (start, trained)] == [
        (START, 0, 0),
        ("grpo", 0, 1),
    ]
    assert trained["curves"]["aem/alpha_min"] == [1.0] and trained["curves"]["parity/max"][0] < 1e-4
    # the run starts with the parameters and tokenizer of the start run: equal games have equal turns
    before, after = (read_lines(folder / name / "evaluations.jsonl")[0] for name in ("start-seed0", "grpo-seed0"))
    assert before == after and before["phase"] == "warmstart"
    assert not (folder / "grpo-seed0" / "warmstart.jsonl").exists()

    written = (folder / "grpo-seed0" / "metrics.jsonl").read_text()
    again = drive()
    assert again.returncode == 0 and again.stdout.count("done before") == 2, again.stdout + again.stderr
    assert (folder / "grpo-seed0" / "metrics.jsonl").read_text() == written
    grid = read_grid(mini)
    (folder / "grpo-seed0" / "report.html").unlink()  # as if the run had been stopped before its end
    assert [is_done(grid.config(run)) for run in (*grid.starts(folder), *grid.runs(folder))] == [True, False]

    mini.write_text(MINI.replace("strength = 0.0", "strength = 0.5"))
    refused = drive()
    assert refused.returncode == 2 and "--aem.strength 0.0, got 0.5" in refused.stderr


def test_each_pinned_job_needs_a_core(mini: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5})
    assert [deal(2, True, 0).places.get()[0], deal(4, False, 0).places.get()[0]] == [[3], [3, 5]]
    assert run_main([str(mini), "--jobs", "3", "--pin"]) == 2
    assert "--jobs: expected at most 2 with --pin, one for each core, got 3" in capsys.readouterr().err


def test_a_process_is_known_to_the_driver_from_its_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    workers = deal(1, False, 0)
    process = object()
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: process)

    with pytest.raises(AttributeError, match="pid"):
        launch([], workers, tmp_path / "log.txt")
    assert workers.running == {process} and not workers.places.empty()


def test_missing_fields_of_results_are_named(tmp_path: Path):
    (tmp_path / "x.jsonl").write_text(json.dumps({"variant": "a", "seed": 0}) + "\n")
    with pytest.raises(ValueError, match="expected steps, seconds, evaluations, curves in line 1 of x.jsonl"):
        read_results(tmp_path / "x.jsonl")


def test_seeds_can_be_chosen(mini: Path):
    mini.write_text(MINI.replace("seeds = [0]", "seeds = [0, 1, 2]"))
    grid = read_grid(mini)
    starts, runs = runs_of(grid, Path("r"), [2, 1])
    assert [run.name for run in starts] == ["start-seed1", "start-seed2"]
    assert [run.name for run in runs] == ["grpo-seed1", "grpo-aem-seed1", "grpo-seed2", "grpo-aem-seed2"]
    assert [len(part) for part in runs_of(grid, Path("r"), ())] == [3, 6]
    with pytest.raises(ConfigError, match=r"--seeds: expected seeds of mini \(0, 1, 2\), got 3"):
        runs_of(grid, Path("r"), [0, 3])
