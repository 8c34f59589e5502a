"""Grids with cells: their runs, results of parts that add up, measurements, and the page of `when_aem`."""

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import spearmanr, ttest_ind

from aem_jax.errors import ConfigError
from aem_jax.metrics import json_line
from aem_jax.overrides import as_values
from experiments import cells, efficiency, relation
from experiments.grid import Grid, Run, read_grid
from experiments.measures import MEASURES, combined, interval
from experiments.plots import draw_relation
from experiments.results import read_results, write_lines, write_results
from experiments.run import Workers, deal, measure_one, run_grid, runs_of, without_saved
from experiments.table import FOLDER, Content, efficiency_table, render

FOLDER_OF_RUNS = Path("r")


@pytest.fixture(scope="module")
def grid() -> Grid:
    return read_grid(FOLDER / "when_aem.toml")


def result(run: Run, wins: int, success: float) -> dict:
    evaluation = lambda phase, step: {"phase": phase, "step": step, "split": "seen", "wins": wins, "games": 100}
    return {
        "cell": run.cell, "variant": run.variant, "seed": run.seed, "steps": 120, "seconds": 100,
        "evaluations": [evaluation("warmstart", 0), evaluation("final", 120)],
        "curves": {"rollout/success": [success], "learner/grad_norm": [0.5]},
    }  # fmt: skip


def measurement(run: Run, step: int, ratios: dict[str, float], gain: float = 1.0) -> dict:
    rules = {
        name: {
            "gain": [ratio * gain, gain / 2, 2 * gain],
            "difference": [(ratio - 1) * gain, -gain, gain],
            "ratio": [ratio, ratio - 0.5, ratio + 0.5],
            "above": ratio / 2,
        }
        for name, ratio in {"base": 1.0, **ratios}.items()
    }
    responses = {
        "count": 9, "tokens": [7.0, 8.0, 9.0], "entropy": 0.25, "entropy_within_states": 0.5, "repeated": 4,
        "alpha_positive": 1.25, "alpha_negative": 0.75, "decisive_at_low_entropy": None,
    }  # fmt: skip
    return {
        "cell": run.cell, "variant": run.variant, "seed": run.seed, "step": step, "groups": 24, "episodes": 192,
        "success": 0.3, "seconds": 60, "rules": rules, "responses": responses,
    }  # fmt: skip


def saved(grid: Grid) -> tuple[list[dict], list[dict]]:
    """Made-up numbers: in cell i AEM gains i points and has ρ = 1 + i/10; reversed α does the opposite."""
    index = {cell.name: number for number, cell in enumerate(grid.cells)}
    extra = {"grpo": 0, "grpo-aem": 1, "reversed": -1, "sign": 0, "larger": -0.5, "aem-larger": 0.5}
    results = [result(run, 20, 0.2) for run in grid.starts(FOLDER_OF_RUNS)]
    measurements = []
    for run in grid.runs(FOLDER_OF_RUNS):
        points = extra[run.variant] * index[run.cell]
        results.append(result(run, 30 + run.seed + points, 0.3 + points / 100))
        if run.variant == "grpo":
            rho = 1 + index[run.cell] / 10
            ratios = {"aem": rho, "reversed": 2 - rho, "sign": 1.0}
            measurements += [measurement(run, step, ratios) for step in grid.measured.steps]
    return results, measurements


def test_the_grid_has_160_runs_in_pairs(grid: Grid):
    starts, every = grid.starts(FOLDER_OF_RUNS), grid.runs(FOLDER_OF_RUNS)
    other_sizes = [variant for variant in grid.variants if variant.cells]
    runs = [run for run in every if run.variant not in {variant.name for variant in other_sizes}]
    for variant in other_sizes:
        own = [run for run in every if run.variant == variant.name]
        assert {run.cell for run in own} == set(variant.cells) and len(own) == len(variant.cells) * len(variant.seeds)
    assert len(every) - len(runs) == sum(len(variant.cells) * len(variant.seeds) for variant in other_sizes) == 24
    assert len(runs) == 8 * 4 * 5 and len(starts) == 4 * 5
    assert len({run.name for run in (*starts, *runs)}) == 180
    assert Counter(run.start for run in runs) == {run.name: 8 for run in starts}  # two rewards, four variants
    assert runs[0].name == "short-unsure-free-grpo-seed0" and runs[0].start == "short-unsure-start-seed0"
    configs = {run.name: grid.config(run) for run in (*starts, *runs)}
    for run in runs:
        long, wrong, penalised = run.cell.startswith("long"), "wrong" in run.cell, run.cell.endswith("penalised")
        config, start = configs[run.name], configs[run.start]
        assert as_values(config)["alfworld.reward_invalid"] == (-0.1 if penalised else 0.0)
        for one in (config, start):
            assert one.warmstart.expert_thinks == long and one.rollout.response_tokens == (64 if long else 16)
            assert (one.warmstart.expert_noise, one.warmstart.expert_habit) == ((0.0, 0.95) if wrong else (0.3, 0.0))
        assert as_values(start)["alfworld.reward_invalid"] == 0.0 and start.train.num_steps == 0
        # all checkpoints that are measured are kept
        kept = {step for step in range(30, 121, 30) if step > 120 - 30 * config.checkpoint.keep} | {0}
        assert run.variant != "grpo" or (set(grid.measured.steps) <= kept and config.train.save_every == 30)


def test_parts_can_be_chosen(grid: Grid):
    starts, runs = runs_of(grid, FOLDER_OF_RUNS, [1], ["long-wrong-free", "short-wrong-free"])
    assert [run.name for run in starts] == ["short-wrong-start-seed1", "long-wrong-start-seed1"]
    assert {(run.cell, run.seed) for run in runs} == {("long-wrong-free", 1), ("short-wrong-free", 1)}
    assert len(runs) == 8
    with pytest.raises(ConfigError, match=r"--cells: expected cells of when_aem \(short-unsure-free, .* got tall"):
        runs_of(grid, FOLDER_OF_RUNS, [], ["tall"])


def test_a_grid_with_a_mistake_in_its_cells_is_refused(tmp_path: Path):
    text = (FOLDER / "when_aem.toml").read_text()
    for old, new, message in (
        ('variants = ["grpo"]', 'variants = ["ppo"]', "expected variants to measure, got ppo"),
        ("start = false", "begin = false", "expected name, start, levels, got begin"),
        ("groups = 192", "", "expected 'groups', got none"),
        ('"short-wrong-free"', '"tall"', "expected names of cells, got tall"),
    ):
        (tmp_path / "g.toml").write_text(text.replace(old, new, 1))
        with pytest.raises(ConfigError, match=message):
            read_grid(tmp_path / "g.toml")


def finished(folder: Path, grid: Grid, run: Run, wins: int) -> None:
    """Writes the files of a finished run that its results are read from."""
    from aem_jax.config import saved as saved_config

    place = folder / run.name
    place.mkdir(parents=True)
    config = grid.config(run)
    saved_config.save(config, place)
    lines = [{"step": step, "time/step": 1.0, "rollout/success": 0.5} for step in range(1, config.train.num_steps + 1)]
    (place / "metrics.jsonl").write_text("".join(json_line(line) + "\n" for line in lines))
    final = {"phase": "final", "step": config.train.num_steps, "success": wins / 100, "count": 100}
    lines = [{**final, "split": split} for split in config.evaluation.splits]
    (place / "evaluations.jsonl").write_text("".join(json_line(line) + "\n" for line in lines))
    (place / "report.html").write_text("")


def test_results_of_parts_add_up(grid: Grid, tmp_path: Path):
    here, there = tmp_path / "here", tmp_path / "there"
    first, second = grid.runs(here)[0], grid.runs(there)[-1]
    finished(here, grid, first, 30)
    path = write_results(grid, here, tmp_path)
    finished(there, grid, second, 40)
    write_results(grid, there, tmp_path)  # another machine: the folder of the first run is not there
    lines = read_results(path)
    assert [(line["cell"], line["variant"], line["seed"]) for line in lines] == [
        (run.cell, run.variant, run.seed) for run in (first, second)
    ]
    assert [line["evaluations"][0]["wins"] for line in lines] == [30, 40]
    assert len(lines[0]["curves"]["rollout/success"]) == grid.bins == 15
    # the folder's numbers replace a saved line, and lines of no run of the grid are dropped
    write_lines(path, [{**lines[0], "steps": 7}, {**lines[1], "cell": "no-such-cell"}])
    write_results(grid, here, tmp_path)
    assert [line["steps"] for line in read_results(path)] == [120]


def test_only_missing_runs_are_left(grid: Grid, tmp_path: Path):
    starts, runs = runs_of(grid, FOLDER_OF_RUNS, [0], ["short-wrong-free"])
    assert without_saved(grid, (starts, runs), tmp_path) == (starts, runs)
    path = tmp_path / "when_aem.jsonl"
    write_lines(path, [result(run, 1, 0.1) for run in runs if run.variant != "sign"])
    left = without_saved(grid, (starts, runs), tmp_path)
    assert [run.variant for run in left[1]] == ["grpo", "sign"] and left[0] == starts  # grpo is not measured yet
    for step in grid.measured.steps:
        efficiency.add(grid, FOLDER_OF_RUNS, measurement(runs[0], step, {}), efficiency.path_of(grid, tmp_path))
    assert [run.variant for run in without_saved(grid, (starts, runs), tmp_path)[1]] == ["sign"]
    write_lines(path, [result(run, 1, 0.1) for run in runs])
    assert without_saved(grid, (starts, runs), tmp_path) == ([], [])


def analysed(place: Path, step: int) -> None:
    """Writes efficiency.json as `analyze --efficiency` does."""
    three = lambda value: {"value": value, "low": value - 0.123456, "high": math.nan}
    rule = {name: three(1.0) for name in ("gain", "entropy", "ratio", "difference", "cosine")} | {"above": 0.5}
    results = {
        "run": place.name, "step": step, "geometry": "Adam", "groups": 24, "episodes": 192, "success": 1 / 3,
        "rules": {"base": rule, "aem": rule}, "responses": {"count": 3, "tokens": [1.0, 2.0, 3.0]}, "seconds": 5,
    }  # fmt: skip
    (place / "analysis").mkdir(parents=True, exist_ok=True)
    (place / "analysis" / "efficiency.json").write_text(json_line(results))


def test_measurements_are_short_and_in_order(grid: Grid, tmp_path: Path):
    first, last = grid.runs(tmp_path)[0], grid.runs(tmp_path)[-4]
    path = efficiency.path_of(grid, tmp_path)
    for run, step in ((last, 0), (first, 60), (first, 0), (first, 60)):
        analysed(tmp_path / run.name, step)
        efficiency.add(grid, tmp_path, efficiency.line_of(tmp_path, run, step), path)
    lines = efficiency.read_measurements(path)
    order = [(line["cell"], line["variant"], line["seed"], line["step"]) for line in lines]
    assert order == [(first.cell, "grpo", 0, 0), (first.cell, "grpo", 0, 60), (last.cell, "grpo", 4, 0)]
    three = [1.0, 0.8765, None]
    assert lines[0]["rules"]["aem"] == {"gain": three, "difference": three, "ratio": three, "above": 0.5}
    assert efficiency.missing(grid, first, lines) == [30, 120]
    assert efficiency.missing(grid, grid.runs(tmp_path)[1], lines) == []  # AEM is not measured
    with pytest.raises(ValueError, match="expected the measurement of step 30 of short-unsure-free-grpo-seed0, got"):
        efficiency.line_of(tmp_path, first, 30)


def test_the_rules_of_one_seed_have_the_intervals_of_its_groups(grid: Grid):
    run = grid.runs(FOLDER_OF_RUNS)[0]
    lines = [measurement(run, 0, {"aem": 1.25}, gain=0.1), measurement(run, 30, {}) | {"seed": 1}]
    assert efficiency_table(lines, 0).splitlines()[2:] == [
        "| `base` | 0 | 0.100 (0.050 to 0.200) |  |  |",
        "| `aem` | 0 | 0.125 (0.050 to 0.200) | +0.025 (−0.100 to +0.100) | 1.25 (0.75 to 1.75) |",
    ]
    lines[0]["rules"]["base"]["gain"][1] = -0.01  # not resolved
    assert efficiency_table(lines, 0).endswith("| `aem` | 0 | 0.125 (0.050 to 0.200) | +0.025 (−0.100 to +0.100) | – |")
    assert efficiency_table(lines, 2) == "Not measured yet."


def test_a_large_policy_is_measured_with_a_sketch(grid: Grid):
    large = read_grid(FOLDER / "alfworld_smollm2.toml")
    run = large.runs(FOLDER_OF_RUNS)[0]
    line = efficiency.words(FOLDER_OF_RUNS, run, 0, large.measured)
    assert line[line.index("--sketch") + 1] == "65536" and line[-3:] == ["--rules", "aem", "sign"]
    assert "--sketch" not in efficiency.words(FOLDER_OF_RUNS, grid.runs(FOLDER_OF_RUNS)[0], 0, grid.measured)


def test_a_finished_run_is_measured_once(grid: Grid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "when_aem"
    starts, runs = runs_of(grid, folder, [0], ["short-wrong-free"])
    for run in (*starts, *runs):
        finished(folder, grid, run, 30)
    commands = []

    def launch(words, workers: Workers, log: Path) -> int:
        commands.append(words)
        analysed(Path(words[1]), int(words[words.index("--step") + 1]))
        return 1 if "120" in words and len(commands) == 4 else 0  # the fourth measurement fails the first time

    monkeypatch.setattr("experiments.run.launch", launch)
    drive = lambda: run_grid(grid, folder, deal(1, False, 0), 1, tmp_path, (starts, runs))
    assert not drive()
    assert [command[command.index("--step") + 1] for command in commands] == ["0", "30", "60", "120"]
    assert commands[0][:4] == ["analyze", str(folder / runs[0].name), "--efficiency", "True"]
    assert drive() and len(commands) == 5  # only the measurement that failed
    assert drive() and len(commands) == 5
    assert len(read_results(tmp_path / "when_aem.jsonl")) == 5
    stopped = Workers()
    stopped.stopping.set()
    assert measure_one(grid, folder, runs[0], 0, stopped, tmp_path) is None


def lines_of(gains: list[tuple[float, float]]) -> list[dict]:
    """Measurements of seeds whose gains of GRPO and of AEM are given."""
    run = Run("grpo", 0, {}, "c")
    return [measurement(run, 0, {"aem": own / base}, gain=base) for base, own in gains]


def test_the_ratio_of_means_has_fiellers_interval():
    gains = [(1.0, 1.2), (1.3, 1.3), (0.9, 1.1)]
    both = efficiency.ratio(lines_of(gains), "aem")
    assert both.mean == pytest.approx(3.6 / 3.2) and both.count == 3
    # its ends are the ratios at which the t-interval of e − ρ e_base ends at 0
    for end in (both.low, both.high):
        left = interval([own - end * base for base, own in gains])
        assert min(abs(left.low), abs(left.high)) == pytest.approx(0, abs=1e-9)
    assert both.low < 1 < both.high


def test_fiellers_interval_contains_the_ratio_in_95_of_100_cases():
    rng, inside = np.random.default_rng(0), []
    for _ in range(1000):
        base = rng.normal(1.0, 0.2, size=5)
        value = efficiency.ratio(lines_of(list(zip(base, 1.5 * base + rng.normal(0, 0.3, size=5), strict=True))), "aem")
        inside.append(value.low <= 1.5 <= value.high)
    assert np.mean(inside) == pytest.approx(0.95, abs=0.02)


def test_a_ratio_needs_a_resolved_gain_of_the_base():
    run = Run("grpo", 0, {}, "c")
    assert efficiency.ratio(lines_of([(1.0, 2.0)]), "aem") == (2.0, 1.5, 2.5, 1)
    assert efficiency.ratio([], "aem").count == 0
    unresolved = efficiency.ratio(lines_of([(1.0, 2.0), (3.0, 3.0)]), "aem")  # 2 ± 12.7
    assert math.isnan(unresolved.mean) and unresolved.count == 2
    noisy = measurement(run, 0, {"aem": 2.0})
    noisy["rules"]["base"]["gain"][1] = -0.1
    assert not efficiency.resolved(noisy) and math.isnan(efficiency.ratio([noisy], "aem").mean)
    noisy["rules"]["base"]["gain"][1] = None  # was not finite
    assert not efficiency.resolved(noisy)


def test_effects_are_means_over_cells_paired_by_seed(grid: Grid):
    results, _ = saved(grid)
    found = cells.effects(grid, results, MEASURES["final"], "grpo-aem", "grpo")
    # cell i gains i points; the first factor is i // 4, the last i % 2
    assert found[cells.ALL] == pytest.approx((0.035, 0.035, 0.035, 5))
    assert found["responses", "short"].mean == pytest.approx(0.015)
    assert found["responses", "long − short"].mean == pytest.approx(0.04)
    assert found["prior", "wrong − unsure"].mean == pytest.approx(0.02)
    assert found["invalid actions", "penalised − free"].mean == pytest.approx(0.01)
    assert len(found) == 1 + 3 * 3
    part = [line for line in results if (line["cell"], line["seed"]) != ("long-wrong-free", 2)]
    assert cells.effects(grid, part, MEASURES["final"], "grpo-aem", "grpo")[cells.ALL].count == 4
    without = [line for line in results if line["cell"] != "long-wrong-free"]
    assert not cells.effects(grid, without, MEASURES["final"], "grpo-aem", "grpo")


def test_correlations_are_spearmans(grid: Grid):
    points = relation.points_of(grid, *saved(grid))
    assert len(points) == 8 * 3 and all(len(point.seeds) == 5 for point in points)
    aem = [point for point in points if point.variant.rule == "aem"]
    for predictor in (relation.FIRST, relation.DIFFERENCE, relation.ALONG):
        one = relation.correlation(aem, predictor, "mean")
        assert (one.mean, one.low, one.count) == (pytest.approx(1), pytest.approx(1), 8)
    assert relation.correlation(aem, relation.FIRST, "mean", by_run=True).count == 40
    # The sign control has no gain and ρ 1 everywhere: ties.
    assert relation.correlation(points, relation.FIRST, "final").mean == pytest.approx(1)
    assert relation.correlation(points, relation.FIRST, "final").count == 24
    of_cells = lambda count: [p for p in aem if p.cell in {cell.name for cell in grid.cells[:count]}]
    assert math.isnan(relation.correlation(of_cells(5), relation.FIRST, "mean").mean)
    assert relation.correlation(of_cells(6), relation.FIRST, "mean").mean > 0.9


def noisy(points: list[relation.Point], size: float) -> list[relation.Point]:
    """With noise of every run in gains and e, and with gains that do not depend on ρ."""
    rng = np.random.default_rng(0)
    with_noise = lambda values: values + size * rng.standard_normal(values.shape)
    return [
        replace(
            point,
            gains={name: with_noise(0 * values) for name, values in point.gains.items()},
            own=tuple(map(with_noise, point.own)),
        )
        for point in points
    ]


def test_a_run_s_correlation_is_scipys_and_intervals_contain_0_without_a_relation(grid: Grid):
    points = noisy(relation.points_of(grid, *saved(grid)), 0.3)
    aem = [point for point in points if point.variant.rule == "aem"]
    own, base = (np.concatenate([getattr(p, name)[0] for p in aem]) for name in ("own", "base"))
    gains = np.concatenate([p.gains["final"] for p in aem])
    for predictor, values in ((relation.FIRST, own / base), (relation.DIFFERENCE, own - base)):
        found = relation.correlation(aem, predictor, "final", by_run=True)
        assert found.mean == pytest.approx(spearmanr(values, gains)[0]) and found.low < 0 < found.high
        of_cells = relation.correlation(points, predictor, "final")
        assert of_cells.low < 0 < of_cells.high


def test_differences_between_variants_are_no_correlation(grid: Grid):
    """Reversed α has the lowest ρ and loses in all cells alike: that does not make ρ a predictor of cells."""
    shift = {"aem": 1.0, "sign": 0.0, "reversed": -1.0}
    points = [
        replace(
            point,
            gains={name: values + shift[point.variant.rule] for name, values in point.gains.items()},
            own=tuple(values + shift[point.variant.rule] for values in point.own),
        )
        for point in noisy(relation.points_of(grid, *saved(grid)), 0.1)
    ]
    found = relation.correlation(points, relation.DIFFERENCE, "final")
    assert abs(found.mean) < 0.5 and found.low < 0 < found.high


def test_points_have_the_seeds_that_all_cells_of_a_warm_start_have(grid: Grid):
    results, measurements = saved(grid)
    part = [line for line in results if (line["cell"], line["variant"], line["seed"]) != ("long-wrong-free", "sign", 2)]
    points = relation.points_of(grid, part, measurements)
    seeds = {point.cell: point.seeds.tolist() for point in points}
    assert seeds["long-wrong-free"] == seeds["long-wrong-penalised"] == [0, 1, 3, 4]
    assert seeds["long-unsure-free"] == [0, 1, 2, 3, 4]
    last = next(point for point in reversed(points) if point.variant.rule == "aem")
    assert last.cell == "long-wrong-penalised" and last.gains["final"].mean() == pytest.approx(0.07)
    assert (last.own[0] / last.base[0]).tolist() == pytest.approx([1.7] * 4)
    assert last.base[1].tolist() == pytest.approx([4.0] * 4)


def test_combined_intervals_are_welchs():
    first, second = [1.0, 2.0, 4.0], [0.0, 0.5, 0.1, 0.2]
    found = combined([first, second], [1.0, -1.0])
    test = ttest_ind(first, second, equal_var=False)
    assert (found.low, found.high) == pytest.approx(tuple(test.confidence_interval(0.95)))
    assert combined([first], [1.0]) == pytest.approx(interval(first))
    assert combined([[1.0], [2.0]], [0.5, 0.5])[::3] == (1.5, 1) and math.isnan(combined([[1.0]], [1.0]).low)


def test_the_page_follows_from_the_numbers(grid: Grid, tmp_path: Path):
    results, measurements = saved(grid)
    page = render([Content(grid, results, (), measurements)])
    assert "184 of 184 runs" in page and "Incomplete" not in page
    assert (
        "| long | wrong | penalised | 5 | 32.0 % (30.0 to 34.0) | +7.0 (+7.0 to +7.0) | −7.0 (−7.0 to −7.0) | 0.0"
        in page
    )
    assert "| long | wrong | penalised | 1.70 (1.70 to 1.70) | 1.70 (1.70 to 1.70) |" in page
    assert "| 5 | 1.000 (1.000 to 1.000) | +0.700 (+0.700 to +0.700) | −0.700 (−0.700 to −0.700) | 0.000 " in page
    assert "| step 0 | 5 | +35.0 % (+35.0 to +35.0) | −35.0 % (−35.0 to −35.0) | 0.0 % (0.0 to 0.0) | +35.0 %" in page
    assert (
        "A step of AEM gains +35.0 % (+35.0 to +35.0) more return than one of GRPO of the same size before training, "
        in page
    )
    assert "| short | unsure | free | 20.0 % | 8.0 | 0.250 | 50.0 % | 44.4 % | 1.250 | 0.750 | – |" in page
    assert "In single cells, 7 of 8 intervals exclude 0: short-unsure-penalised +1.0 points (+1.0 to +1.0); " in page
    gains = "AEM differs from GRPO by +3.5 points (+3.5 to +3.5), and from the sign control by +3.5 points (+3.5 to +3"
    assert f"Success after training, fixed games: over all cells, {gains}" in page
    assert (
        "Between levels, 3 of 3 intervals exclude 0: long − short +4.0 points (+4.0 to +4.0); wrong − unsure +2.0"
        in page
    )
    assert "while training, all steps): ρ at step 0 predicts it (1.00 (1.00 to 1.00), 8 cells), e − e of GRPO" in page
    assert "| all cells |  |  | 1.00 (1.00 to 1.00) | 1.00 (1.00 to 1.00) |" in page
    assert "after training is 0 points wide in the median" in page
    # cells 0 to 3: larger steps lose half a point times the cell's number, reversed α one point
    larger = "| 3 | −0.8 (−0.8 to −0.8) | −1.5 (−1.5 to −1.5) | −0.8 (−0.8 to −0.8) |"
    assert f"| success after training, fixed games {larger}" in page
    against = [
        {**line, "rules": {**line["rules"], "aem": line["rules"]["reversed"]}} for line in measurements
    ]  # as if ρ of AEM were that of reversed α
    assert "ρ at step 0 contradicts it (−1.00" in render([Content(grid, results, (), against)])
    path = draw_relation(relation.points_of(grid, results, measurements), tmp_path / "images" / "relation.png")
    assert path is not None and path.stat().st_size > 5000


def test_a_partial_page_says_what_is_missing(grid: Grid, tmp_path: Path):
    results, measurements = saved(grid)
    part = [line for line in results if line["seed"] == 0 and line["cell"].startswith("short")]
    own = [line for line in measurements if line["seed"] == 0 and line["cell"].startswith("short")][:-1]
    page = render([Content(grid, part, (), own)])
    assert "**Incomplete**: 168 of 184 runs and 145 of 160 measurements are missing" in page
    assert "| short | unsure | free | 1 |" in page and "| long | unsure |" not in page
    empty = render([Content(grid, part[:1])])
    assert "184 of 184 runs and 160 of 160 measurements are missing" in empty and "0 of 184 runs." in empty
    assert draw_relation([], tmp_path / "none.png") is None
