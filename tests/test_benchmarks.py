"""The benchmarks page matches its files. The peer driver divides the right numbers and names the failed peers."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from aem_jax.bench.config import BenchConfig
from aem_jax.overrides import apply, split
from benchmarks import accelerator
from benchmarks.make_docs import FOLDER, PAGE, bench_table, load, peers_table, read, render, where
from benchmarks.peers import COMPARISONS, Comparison, PeerError, Program, compare, main, parse_peer, versions_of


def test_the_committed_page_matches_the_committed_results():
    page = render(load(FOLDER / "results"))
    assert PAGE.read_text(encoding="utf-8") == page, "run python -m benchmarks.make_docs"


@pytest.mark.parametrize("path", sorted((FOLDER / "results").glob("*.json")), ids=lambda path: path.name)
def test_results_name_no_folder_of_the_machine(path: Path):
    result = read(path)
    for command in result["commands"].values():
        assert not any(word.startswith(("/", "~")) for word in command.split()), command
    if result["kind"] == "peers":  # the ratios are those of the numbers, round by round
        own = result["values"]["aem_jax"]
        for name, ratios in result["ratios"].items():
            theirs, seconds = result["values"][name], COMPARISONS[result["comparison"]].seconds
            assert ratios == pytest.approx(
                [b / a if seconds else a / b for a, b in zip(own, theirs, strict=True)], 1e-3
            )


PEERS = {
    "kind": "peers", "comparison": "decode", "title": "B = 8", "unit": "tokens/s", "date": "2026-01-31", "seeds": "0",
    "machine": {"cpu": "abacus", "cores": 2}, "versions": {"aem_jax": {"jax": "0.10.2"}, "other": {"torch": "2"}},
    "commands": {"aem_jax": "python -m x", "other": "python y.py"}, "note": "All quiet.",
    "values": {"aem_jax": [300.0, 100.0, 250.0], "other": [100.0, 100.0, 100.0]}, "ratios": {"other": [3.0, 1.0, 2.5]},
}  # fmt: skip


def test_a_table_of_peers_has_a_row_for_each_file():
    alone = {**PEERS, "title": "B = 64", "values": {"aem_jax": [1.25]}, "ratios": {}}
    assert peers_table([PEERS, alone]).splitlines() == [
        "| shape | aem_jax, tokens/s | other, tokens/s | against other |",
        "|---|---|---|---|",
        "| B = 8 | 300, 100, 250 | 100, 100, 100 | **2.5×** (3.0, 1.0, 2.5) |",
        "| B = 64 | 1.25 | – | – |",
    ]
    assert where(PEERS) == "2026-01-31; abacus, 2 cores; aem_jax: jax 0.10.2; other: torch 2; seeds: 0. All quiet."


def test_a_table_of_bench_shows_the_roofline():
    line = {"share": 0.5, "bound": "memory", "mfu": 0.25}
    rate = {"name": "learner", "what": "update", "shape": "8 rows", "unit": "tokens/s", "median": 2.5}
    rate |= {"best": 3.0, "worst": 2.0, "quartiles": [2.25, 2.75], "roofline": line, "facts": {}}
    table = bench_table({"results": [rate, {**rate, "roofline": None}]}).splitlines()
    assert table[2] == "| learner: update | 8 rows | 2.5 tokens/s | 2.25 – 2.75 | 2 – 3 | 50.0% of memory, MFU 25.0% |"
    assert table[3].endswith("| – |")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [("rubbish", "expected JSON"), ("[]", "expected a kind"), ('{"kind": "peers", "date": "x"}', "expected versions")],
)
def test_a_file_without_a_result_is_refused(text: str, complaint: str, tmp_path):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match=complaint):
        load(tmp_path)


def script(folder: Path, name: str, code: str) -> Program:
    path = folder / f"{name}.py"
    path.write_text(code)
    return Program(name, sys.executable, (str(path),))


# Prints its share of a number that grows with every run, and something else around it.
COUNTING = """
import json, pathlib, sys
count = pathlib.Path(__file__).with_suffix(".count")
runs = int(count.read_text()) + 1 if count.exists() else 1
count.write_text(str(runs))
print("{not json")
print(json.dumps({"rate": {"median": FACTOR * runs * int(sys.argv[1])}}))
print("done")
"""


def test_ratios_are_those_of_one_round(tmp_path):
    own, peer = (script(tmp_path, name, COUNTING.replace("FACTOR", f)) for name, f in (("aem_jax", "6"), ("peer", "2")))
    measured = compare([own, peer], ["5"], Comparison("", "rate.median", "1/s"), 3, 60)
    assert measured["values"] == {"aem_jax": [30, 60, 90], "peer": [10, 20, 30]}  # whoever began the round
    assert measured["ratios"] == {"peer": [3, 3, 3]} and measured["median_ratios"] == {"peer": 3}
    assert measured["medians"] == {"aem_jax": 60, "peer": 20} and len(measured["rounds"]) == 3
    seconds = compare([own, peer], ["5"], Comparison("", "rate.median", "s", seconds=True), 1, 60)
    assert seconds["ratios"] == {"peer": [round(1 / 3, 4)]}


@pytest.mark.parametrize(
    ("code", "complaint"),
    [
        ("raise SystemExit('out of luck')", "peer ended with status 1:\nout of luck"),
        ("print('nothing')", "expected a JSON line from peer"),
        ("print('{}')", "expected a positive rate.median from peer, got None"),
        ("import time; time.sleep(60)", "expected peer to end within 2 s"),
    ],
)
def test_a_peer_that_fails_is_named(code: str, complaint: str, tmp_path):
    own, peer = script(tmp_path, "aem_jax", COUNTING.replace("FACTOR", "1")), script(tmp_path, "peer", code)
    with pytest.raises(PeerError) as caught:
        compare([own, peer], ["1"], Comparison("", "rate.median", "1/s"), 1, 2)
    assert complaint in str(caught.value)


def test_peers_are_read_from_the_command_line(tmp_path, capsys):
    peer = script(tmp_path, "peer", "")
    program = parse_peer(f"Peer={sys.executable}:{peer.words[0]}")
    assert program.name == "Peer" and program.command(["8", "64"]) == "python peer.py 8 64"
    assert "jax" in versions_of(sys.executable) and "python" in versions_of(sys.executable)
    for text, complaint in [
        ("Peer", "NAME=PYTHON:SCRIPT"),
        ("Peer=a:b", "to exist, got a"),
        ("aem_jax=a:b", "another name"),
    ]:
        with pytest.raises(ValueError, match=complaint):
            parse_peer(text)
    with pytest.raises(SystemExit):
        main(["decode", "8", "--peer", "Peer"])
    assert "NAME=PYTHON:SCRIPT" in capsys.readouterr().err


def test_check_reports_whether_the_page_is_up_to_date():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.make_docs", "--check"], capture_output=True, cwd=FOLDER.parent, text=True
    )
    assert (done.returncode, done.stdout) == (0, "the page is up to date\n")


def test_a_run_of_bench_fits_the_page(tmp_path, monkeypatch, capsys):
    from aem_jax.bench.measure import Sizes, ceilings
    from aem_jax.launch import cli

    monkeypatch.setattr("aem_jax.bench.measure.SIZES", {"cpu": Sizes(2**20, 64)})
    ceilings.cache_clear()
    small = ["--trajectories", "8", "--turns", "2", "--repeats", "2", "--runtime.compilation-cache", "off"]
    assert cli.main(["bench", "advantage", *small]) == 0
    ceilings.cache_clear()
    (tmp_path / "bench.json").write_text(capsys.readouterr().out)
    (result,) = load(tmp_path)
    command = "python -m aem_jax.launch bench advantage --trajectories 8 --turns 2 --repeats 2"
    assert result["commands"] == {"aem_jax": command}
    page = render([*load(FOLDER / "results"), result])
    assert "## Against the roofline" in page and command in page and "advantage: GRPO + AEM" in page


def test_a_failed_run_is_a_line_and_the_next_run_starts(monkeypatch: pytest.MonkeyPatch, capsys):
    seen: list[str] = []

    def launch(words):
        seen.append(words[-1])
        if words[-1] == "raises":
            raise RuntimeError("RESOURCE_EXHAUSTED: 9 GiB\nallocations")
        return 2 if words[-1] == "refused" else 0

    monkeypatch.setattr(accelerator, "launch", launch)
    runs = [accelerator.Run(words) for words in (("bench", "raises"), ("bench", "refused"), ("ok",))]
    assert accelerator.run_all(runs) == 2
    assert seen == ["raises", "refused", "ok"]
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["error"] for line in lines] == ["RuntimeError: RESOURCE_EXHAUSTED: 9 GiB", "exit status 2", ""]
    assert accelerator.main(["nothing"]) == 2


@pytest.mark.parametrize("part", ["decode", "learner", "trace"])
def test_every_accelerator_run_is_a_valid_command(part: str, monkeypatch: pytest.MonkeyPatch):
    """Every option is an option of `bench`, and the most valuable runs come first."""
    runs = accelerator.PARTS[part]()
    assert len(set(runs)) == len(runs)
    for run in runs:
        names, options = split(run.words[1:])
        assert set(names) <= {"sampler", "learner"} and apply(BenchConfig(), options).model.startswith("qwen2.5-")
