"""The report shows the files of a run, tolerates missing ones, and is self-contained."""

import io
import json
import math
import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from fake_run import write_fake_run
from matplotlib.figure import Figure

from aem_jax.metrics import Evaluation, Rate
from aem_jax.overrides import flatten
from aem_jax.report import analysis, plot_headline, write_report
from aem_jax.report.curves import CURVES, draw_efficiency
from aem_jax.report.efficiency import print_efficiency, write_efficiency
from aem_jax.report.page import bar, duration, episode, headline, percent, spread
from aem_jax.report.run import baseline_lines, read_run
from aem_jax.report.style import inline_svg, smooth


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_fake_run(tmp_path_factory.mktemp("runs") / "tiny-seed0", steps=40)


@pytest.fixture(scope="module")
def page(run_dir: Path) -> str:
    return write_report(run_dir).read_text()


def test_the_page_is_written_into_the_run_folder(run_dir: Path, page: str):
    assert (run_dir / "report.html").read_text() == page
    assert not (run_dir / "report.html.new").exists()


def test_page_has_every_curve(page: str):
    assert [title for title, *_ in CURVES] == re.findall(r'<figure class="card">\s*<h3>(.*?)</h3>', page)
    for svg in re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL):
        assert len(list(ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}path"))) > 3


def test_page_shows_the_headline_of_each_split(run_dir: Path, page: str):
    run = read_run(run_dir)
    assert run.splits() == ["valid_seen", "valid_unseen"]
    for split in run.splits():
        before, after = run.before(split), run.after(split)
        assert before is not None and after is not None and after.phase == "final"
        assert percent(before.rate.success) in page and percent(after.rate.success) in page
        assert [baseline.phase for baseline in run.baselines(split)] == ["expert", "random"]
        assert page.count(f"<code>{after.set}</code>") == 1
    assert "pick clean then place in recep" in page


def test_page_shows_ten_transcripts_turn_by_turn(page: str):
    assert page.count("<details") == 11  # ten episodes and the settings
    assert page.count('<div class="turn">') == 70
    assert page.count("environment error</span>") == 1


def test_the_page_is_self_contained(page: str):
    assert "<script" not in page and "<link" not in page and "@import" not in page
    assert not re.findall(r'(?:src|href)="(?!#)([^"]*)"', page)
    assert all(not target.startswith("http") for target in re.findall(r"url\((.*?)\)", page))


def test_ids_of_the_figures_are_unique(page: str):
    # one figure's clip path must not cut another's lines
    figures = [set(re.findall(r'<clipPath id="(.*?)"', svg)) for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL)]
    assert all(figures) and len(set.union(*figures)) == sum(map(len, figures))


def test_text_of_environments_is_escaped(tmp_path: Path):
    turn = {"observation": "<script>alert(1)</script>", "response": "<action>look</action>"}
    transcripts = [{"task_id": "<b>", "turns": [turn]}]
    (tmp_path / "transcripts.json").write_text(json.dumps(transcripts))
    page = write_report(tmp_path).read_text()
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page and "<script" not in page
    assert "&lt;action&gt;look&lt;/action&gt;" in page and "&lt;b&gt;" in page


FILES = ["config.json", "metrics.jsonl", "evaluations.jsonl", "transcripts.json", "warmstart.jsonl"]


@pytest.mark.parametrize("missing", FILES)
def test_a_missing_file_leaves_its_part_out(tmp_path: Path, missing: str):
    run_dir = write_fake_run(tmp_path / "run", steps=5)
    (run_dir / missing).unlink()
    page = write_report(run_dir).read_text()
    part = {
        "config.json": "settings, by the names",
        "metrics.jsonl": "<h3>Entropy</h3>",
        "evaluations.jsonl": "<h2>Success</h2>",
        "transcripts.json": "<h2>Transcripts</h2>",
        "warmstart.jsonl": "<h3>Warm start</h3>",
    }
    assert {name for name, mark in part.items() if mark not in page} == {missing}


def test_an_empty_run_says_so(tmp_path: Path):
    assert "has not written anything yet" in write_report(tmp_path).read_text()


def test_a_broken_run_is_still_reported(tmp_path: Path):
    (tmp_path / "config.json").write_text("{")
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "learner/loss": null, "time/rollout": 1.5}\n{"step": 1, "entr')
    lines = [
        {"step": 3, "success": None},
        {"success": 0.5},
        {"split": "s", "success": 0.25, "by_task_type": {"a": None}},
    ]
    (tmp_path / "evaluations.jsonl").write_text("\n".join(map(json.dumps, lines)))
    turns = [{}, {"observation": "x", "entropy": None, "alpha": "?", "reward": None}, "not a turn"]
    (tmp_path / "transcripts.json").write_text(json.dumps([{"turns": turns}, "not an episode", {"turns": None}]))
    page = write_report(tmp_path).read_text()
    assert percent(0.5) in page and percent(0.25) in page and "Time of a step" in page and page.count("<details") == 2


def test_a_missing_folder_is_named(tmp_path: Path):
    with pytest.raises(ValueError, match=r"expected a run's folder, got .*/nowhere"):
        write_report(tmp_path / "nowhere")


def test_after_is_the_latest_evaluation_of_an_unfinished_run(tmp_path: Path):
    lines = [
        {"step": 0, "phase": "warmstart", "split": "valid_seen", "success": 0.3, "low": 0.2, "high": 0.4, "count": 100},
        {"step": 5, "phase": "train", "split": "valid_seen", "success": 0.5, "low": 0.39, "high": 0.6, "count": 100},
        {"step": 9, "phase": "final", "split": "valid_seen", "success": 0.6, "low": 0.5, "high": 0.7, "count": 100},
        # The finished run was resumed with more steps.
        {"step": 12, "phase": "train", "split": "valid_seen", "success": 0.7, "low": 0.6, "high": 0.8, "count": 100},
    ]
    for count, gain, apart in ((1, None, False), (2, 0.2, False), (3, 0.3, True), (4, 0.4, True)):
        (tmp_path / "evaluations.jsonl").write_text("\n".join(map(json.dumps, lines[:count])))
        result = headline(read_run(tmp_path), "valid_seen")
        assert result["gain"] == (None if gain is None else pytest.approx(gain)) and result["apart"] is apart


def test_bars_have_the_widths_of_their_numbers():
    rate = Rate(success=0.5, low=0.4, high=0.65, count=8)
    drawn = bar("after", Evaluation("", "valid_seen", rate, {}, None, None, None))
    assert (drawn["width"], drawn["low"], drawn["span"], drawn["tone"]) == (50, 40, pytest.approx(25), "after")


def test_tints_follow_the_numbers():
    turns = [{"entropy": e, "alpha": a, "advantage": v} for e, a, v in ((0.1, 0.5, -3.0), (0.4, 1.0, 0.0), (0.7, 2, 1))]
    low, middle, high = episode({"turns": turns, "success": True})["turns"]
    strength = [int(re.findall(r"(\d+)%", turn["entropy_tint"])[0]) for turn in (low, middle, high)]
    assert strength == [8, 34, 60]  # 8 + 52 × (0, ½, 1)
    assert "--orange) 34%" in low["alpha_tint"] and "--blue) 60%" in high["alpha_tint"]
    assert "--red) 60%" in low["advantage_tint"] and "--green) 34%" in high["advantage_tint"]


def test_neutral_values_have_no_colour():
    (turn,) = episode({"turns": [{"alpha": 1.001, "advantage": -0.0, "entropy": None}]})["turns"]
    assert "--grey) 8%" in turn["alpha_tint"] and "--grey) 8%" in turn["advantage_tint"]


def test_baselines_of_equal_success_share_a_line(tmp_path: Path):
    baselines = {"oracle": 1.0, "random": 0.02, "searcher": 0.97, "greedy": 0.9}
    lines = [{"step": 0, "phase": phase, "split": "s", "success": success} for phase, success in baselines.items()]
    (tmp_path / "evaluations.jsonl").write_text("\n".join(map(json.dumps, lines)))
    drawn = baseline_lines(read_run(tmp_path).baselines("s"))
    assert drawn == [(1.0, "oracle, searcher"), (0.9, "greedy"), (0.02, "random")]


def test_small_helpers():
    assert [percent(value) for value in (0, 0.714, 1 / 3, 1)] == [
        "0\u202f%",
        "71.4\u202f%",
        "33.3\u202f%",
        "100\u202f%",
    ]
    assert [duration(value) for value in (41.6, 200, 3661)] == ["42 s", "3 min 20 s", "1 h 1 min"]
    assert smooth([1, 2, 3, 4], 2) == [1, 1.5, 2.5, 3.5]
    assert spread(range(100), 10) == [0, 11, 22, 33, 44, 55, 66, 77, 88, 99] and spread([1, 2], 10) == [1, 2]
    assert flatten({"a": {"b": 1, "c": {}}, "d": []}) == {"a.b": 1, "d": []}


def test_names_with_dollars_are_no_mathematics(tmp_path: Path):
    """Names come from environments; text between two dollars that is no formula would raise."""
    name = r"$\frac$"
    folder = tmp_path / name
    folder.mkdir()
    metrics = [{"step": step, f"rollout/success/{name}": 0.5, f"time/{name}": 1.0} for step in range(3)]
    metrics[0] |= {"rollout/success/other": 0.5, "time/other": 1.0, "rollout/success": 0.5, "entropy/response": 0.5}
    write_lines(folder / "metrics.jsonl", metrics)
    phases = ("warmstart", f"agent {name}")
    write_lines(folder / "evaluations.jsonl", [{"phase": phase, "split": name, "success": 0.5} for phase in phases])
    page = write_report(folder).read_text()
    success, _, task_types, time = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert (success.count(name), task_types.count(name), time.count(name)) == (2, 1, 1)
    plot_headline({name: [folder], "other": [folder]}, tmp_path / "headline.png")
    figure = Figure()
    analysis._dynamics_figure(figure, [read_run(folder)] * 2)
    assert inline_svg(figure, "dynamics").count(name) == 2


def test_a_run_of_one_step_has_visible_curves(tmp_path: Path):
    run = read_run(write_fake_run(tmp_path / "run", steps=1))
    for title, _, draw in CURVES:
        axes = Figure().subplots()
        assert draw(run, axes), title
        points = [line.get_marker() for line in axes.lines if np.size(line.get_xdata()) == 1]
        areas = [path.vertices for drawn in axes.collections for path in drawn.get_paths()]
        assert set(points) <= {"o"} and (points or areas or axes.texts), title
        if title in ("Time of a step", "α by sign of advantage"):
            assert areas and all(np.ptp(area, axis=0).min() > 0 for area in areas), title


def test_shares_without_a_value_are_dashes(tmp_path: Path):
    assert percent(None) == percent(math.nan) == "–"
    zero = {"value": 0.0, "low": 0.0, "high": 0.0}
    rule = {"ratio": zero, "gain": zero, "difference": zero, "entropy": zero, "cosine": zero, "above": math.nan}
    responses = {"count": 9, "tokens": [1, 2, 3], "entropy": 0.5, "repeated": 8, "entropy_within_states": math.nan}
    responses |= {"alpha_positive": None, "alpha_negative": None, "decisive_at_low_entropy": math.nan}
    results = {"run": "run", "step": 0, "seconds": 1.0, "episodes": 8, "groups": 2, "success": 0.5, "sketch": 0}
    results |= {"options": {"geometry": "adam", "sketch": 0, "seed": 0}, "geometry": "Adam", "responses": responses}
    results |= {"rules": {"base": rule, "aem": rule}}
    page = write_efficiency(results, tmp_path).read_text()
    table = io.StringIO()
    print_efficiency(results, table)
    assert "nan" not in page and "nan" not in table.getvalue()
    assert page.count("<td>–</td>") == 3  # the two of the responses, and e − e_base of the base algorithm


def write_lines(path: Path, records: list[dict]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def efficiency_of(folder: Path, gains: np.ndarray, base: np.ndarray):
    folder.mkdir()
    lines = [
        {"step": 5 * i, "aem/gain": a, "aem/gain_base": b} for i, (a, b) in enumerate(zip(gains, base, strict=True))
    ]
    write_lines(folder / "metrics.jsonl", lines)
    axes = Figure().subplots()
    assert draw_efficiency(read_run(folder), axes)
    return axes


def test_live_efficiency_has_an_interval_or_says_that_nothing_is_known(tmp_path: Path):
    """The interval is that of a bootstrap over the measurements, within a tenth."""
    rng = np.random.default_rng(0)
    base = rng.normal(1, 1, 80)
    gains = 1.3 * base + rng.normal(0, 0.3, 80)
    axes = efficiency_of(tmp_path / "resolved", gains, base)
    at, ratios = map(np.asarray, axes.lines[1].get_data())
    assert at[-1] == 395 and ratios[-1] == pytest.approx(gains[40:].sum() / base[40:].sum())
    drawn = rng.integers(40, 80, (20_000, 40))
    low, high = np.percentile(gains[drawn].sum(1) / base[drawn].sum(1), [2.5, 97.5])
    band = np.asarray(axes.collections[0].get_paths()[0].vertices)
    ends = np.sort(band[band[:, 0] == 395][:, 1])
    assert ends[-1] - ends[0] == pytest.approx(high - low, rel=0.1)
    assert not axes.texts

    axes = efficiency_of(tmp_path / "noise", rng.normal(0, 1, 20), np.tile([1.0, -1.0], 10))
    assert not axes.lines
    assert axes.texts[0].get_text().startswith("20 measurements do not resolve")


def test_headline_picture_of_several_settings(tmp_path: Path):
    matplotlib_image = pytest.importorskip("matplotlib.image")
    runs = [write_fake_run(tmp_path / f"seed{seed}", steps=25, seed=seed) for seed in range(3)]
    one = plot_headline(runs[:1], tmp_path / "pictures" / "one.png")
    many = plot_headline({"with": runs[:2], "without": runs[2:]}, tmp_path / "many.png", split="valid_unseen")
    first, second = matplotlib_image.imread(one), matplotlib_image.imread(many)
    assert first.shape == second.shape and first.shape[1] > 1500
    assert (first != second).any() and first.std() > 0.02


def test_headline_picture_of_runs_without_numbers(tmp_path: Path):
    assert plot_headline([tmp_path], tmp_path / "empty.png").stat().st_size > 5_000
    with pytest.raises(ValueError, match="expected at least one run"):
        plot_headline([], tmp_path / "none.png")


def test_unencodable_text_and_damaged_files_do_not_prevent_a_report(tmp_path: Path, caplog):
    folder = write_fake_run(tmp_path / "run", steps=2)
    shown = json.loads((folder / "transcripts.json").read_text())
    shown[0]["turns"][0]["observation"] = "half \ud83d of it"
    (folder / "transcripts.json").write_text(json.dumps(shown))
    assert "half \ufffd of it" in write_report(folder).read_text(encoding="utf-8")
    assert not caplog.records
    (folder / "transcripts.json").write_text(json.dumps(shown)[:-40])
    assert "half \ufffd of it" not in write_report(folder).read_text(encoding="utf-8")
    assert caplog.messages[0].startswith(f"left out of the report: {folder / 'transcripts.json'}: expected JSON")
