"""The table at the end of a run."""

import io

from aem_jax.launch.evaluation import print_summary, sampled


def record(phase: str, step: int, success: float) -> dict:
    rest = {"low": success - 0.05, "high": success + 0.05, "count": 128, "mean_turns": 7.25}
    return {"phase": phase, "step": step, "set": "valid_seen-128-abc123", "success": success, **rest}


def test_the_summary_has_baselines_then_before_and_after():
    out = io.StringIO()
    records = [
        record("warmstart", 0, 0.25),
        record("oracle", 0, 0.95),
        record("train", 5, 0.4),
        record("final", 10, 0.5),
    ]
    print_summary([*records, record("final", 20, 0.625)], "greedy", out)
    lines = [line for line in out.getvalue().splitlines() if "valid_seen" in line]
    assert [next(w for w in ("oracle", "before", "after") if w in line) for line in lines] == [
        "oracle",
        "before",
        "after",
    ]
    assert "62.5%" in lines[2] and "57.5% – 67.5%" in lines[2] and "128" in lines[2]
    assert "success (greedy)" in out.getvalue()


def test_the_score_has_a_column_if_it_differs_from_the_success():
    out = io.StringIO()
    print_summary([{**record("final", 10, 0.5), "mean_score": 0.5}], "greedy", out)
    assert "score" not in out.getvalue()
    scored = [{**record("final", 10, 0.5), "mean_score": 0.7125}, record("oracle", 0, 0.9)]
    print_summary(scored, "greedy", out)
    assert "score" in out.getvalue() and "71.2%" in out.getvalue()


def test_the_summary_names_the_way_of_sampling():
    assert (sampled(1.0), sampled(0.7), sampled(0)) == (
        "sampled at temperature 1",
        "sampled at temperature 0.7",
        "greedy",
    )


def test_a_set_without_counted_episodes_has_a_dash():
    out = io.StringIO()
    print_summary([{**record("final", 10, 0.5), "success": None, "low": 0.0, "high": 1.0, "count": 0}], "greedy", out)
    assert "–" in out.getvalue() and "0.0% – 100.0%" in out.getvalue()
