"""Benchmarks measure what they say and end in one JSON line. Their numbers are nobody's test."""

import json

import pytest

from aem_jax.launch import cli
from aem_jax.launch.bench.measure import measure

SMALL = ["--slots", "8", "--prompt-tokens", "8", "--new-tokens", "4", "--row-length", "32", "--trajectories", "8",
         "--turns", "2", "--sessions", "2", "--repeats", "2", "--runtime.compilation-cache", "off"]  # fmt: skip


@pytest.mark.parametrize(("name", "count"), [("sampler", 2), ("learner", 1), ("advantage", 2), ("envs", 2)])
def test_a_benchmark_ends_in_one_json_line(name: str, count: int, capsys):
    assert cli.main(["bench", name, *SMALL]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    found = json.loads(line)
    assert found["config"]["slots"] == 8 and found["versions"]["jax"]
    assert [each["name"] for each in found["results"]] == [name] * count
    for each in found["results"]:
        assert 0 < each["worst"] <= each["median"] <= each["best"] and each["repeats"] == 2


def test_a_rate_is_work_over_the_median_second(monkeypatch: pytest.MonkeyPatch):
    # warm-up, then calls of 1, 4 and 2 seconds: 10 units give 10/s at best, 5/s at the median, 2.5/s at worst
    clock = iter([0.0, 1.0, 10.0, 14.0, 20.0, 22.0])
    monkeypatch.setattr("aem_jax.launch.bench.measure.time.perf_counter", lambda: next(clock))
    calls = []
    found = measure("x", "y", "units/s", 10, lambda: calls.append(0), repeats=3)
    assert (found.best, found.median, found.worst) == (10.0, 5.0, 2.5)
    assert len(calls) == 4
