"""`analyze --efficiency` and the live measurement, on a run with rewards at random."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from aem_jax.launch import cli, efficiency
from aem_jax.launch.efficiency import RULES
from aem_jax.metrics import comparable, read_lines
from aem_jax.models import Mixture

from .test_broken_environment import SMALL
from .test_carry import ENV


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    (folder / "env.py").write_text(ENV)
    (folder / "small.toml").write_text(SMALL)
    words = ["--preset", "openenv-tiny", str(folder / "small.toml"), "--openenv.serve", f"{folder}/env.py:Env"]
    words += ["--runs-dir", str(folder), "--name", "run", "--train.num-steps", "4", "--rollout.max-turns", "4"]
    words += ["--rollout.context-tokens", "128", "--openenv.seeds", "6", "--metrics.efficiency-every", "2"]
    words += ["--learner.covariance", "kl", "--learner.num-minibatches", "2"]  # which a measurement leaves out
    assert cli.main(words) == 0
    return folder / "run"


def measured(run: Path, capfd, *words: str) -> dict:
    assert cli.main(["analyze", str(run), "--efficiency", "True", "--min-range", "0", *words]) == 0
    assert "geometry: " in capfd.readouterr().out
    return json.loads((run / "analysis" / "efficiency.json").read_text())


def test_the_rules_are_compared(run: Path, capfd):
    results = measured(run, capfd, "--groups", "8")
    assert results["groups"] >= 8 and results["episodes"] > results["groups"] and results["step"] == 4
    assert results["geometry"] == "Adam, with the run's second moments"
    rules = results["rules"]
    assert tuple(rules) == RULES
    assert rules["base"]["ratio"] == {"value": 1, "low": 1, "high": 1}
    assert rules["reversed"]["gain"]["value"] != rules["base"]["gain"]["value"]
    assert all(rule["entropy"]["value"] != 0 for rule in rules.values())
    for name in ("efficiency.html", "efficiency.png"):
        assert (run / "analysis" / name).stat().st_size > 1000, name
    # a function of run, step and seed, up to rounding: other rules are computed together
    again = measured(run, capfd, "--groups", "8", "--rules", "sign", "aem")["rules"]
    assert list(again) == ["base", "aem", "sign"]
    for name, rule in again.items():
        assert rule["gain"] == pytest.approx(rules[name]["gain"], rel=1e-3), name


def test_a_projection_and_the_plain_geometry(run: Path, capfd):
    words = "--groups", "8", "--rules", "aem"
    exact = measured(run, capfd, *words, "--geometry", "plain")
    rough = measured(run, capfd, *words, "--geometry", "plain", "--sketch", "32768")
    assert exact["geometry"] == "plain" and rough["sketch"] == 32768
    gain, rough_gain = (results["rules"]["aem"]["gain"]["value"] for results in (exact, rough))
    assert rough_gain == pytest.approx(gain, rel=0.1)
    before = measured(run, capfd, *words, "--step", "0")
    assert before["geometry"] == "Adam, with second moments of this rollout's gradients"


def test_training_measures_every_second_step(run: Path):
    steps = read_lines(run / "metrics.jsonl")
    names = {"aem/efficiency", "aem/gain", "aem/gain_base"}
    assert [names <= record.keys() for record in steps] == [True, False, True, False]
    assert all(record["compile/recompiles"] == 0 for record in steps)
    assert all("time/measure" in record for record in steps[::2]) and "time/measure" not in comparable(steps[0])


def test_the_papers_claims_are_measured_without_terms_that_do_not_depend_on_credit(run: Path, capfd):
    assert cli.main(["analyze", str(run), "--states", "2", "--draws", "2", "--min-range", "0"]) == 0
    assert (run / "analysis" / "analysis.json").exists()


def test_wrong_options_are_refused(run: Path, capfd):
    assert cli.main(["analyze", str(run), "--efficiency", "True", "--against", str(run)]) == 2
    assert "expected efficiency without against" in capfd.readouterr().err
    assert cli.main(["analyze", str(run), "--efficiency", "True", "--rules", "aem-3"]) == 2
    assert "expected rules of base, aem, aem-0.5" in capfd.readouterr().err


def test_a_policy_that_is_too_large_needs_a_projection(run: Path, capfd, monkeypatch):
    monkeypatch.setattr("aem_jax.launch.efficiency.MAX_BYTES", 10**6)
    assert cli.main(["analyze", str(run), "--efficiency", "True", "--groups", "8"]) == 2
    assert "--sketch: expected a projection, got exact gradients of" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("platform", "mixture", "size", "together"),
    [("cpu", None, 1000, 5), ("cpu", None, 2**27, 2), ("cpu", Mixture(6, 2), 1000, 1), ("gpu", None, 1000, 1)],
    ids=["small", "large", "experts", "gpu"],
)
def test_gradients_share_the_forward_pass_where_all_operations_can_be_batched(platform, mixture, size, together):
    device = SimpleNamespace(platform=platform)
    config = SimpleNamespace(mixture=mixture)
    context: Any = SimpleNamespace(
        mesh=SimpleNamespace(devices=np.array([device])), policy=SimpleNamespace(config=config)
    )
    state: Any = SimpleNamespace(trainable={"base": SimpleNamespace(size=size), "value": SimpleNamespace(size=9)})
    assert efficiency._together(context, state, 5) == together
