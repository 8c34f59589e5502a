"""Follows docs/environments.md: writes its environment, checks it, serves it and prepares it for training."""

import ast
import dataclasses
import json
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from aem_jax.config import validate
from aem_jax.config.environments import task_suite
from aem_jax.config.presets import read_preset
from aem_jax.envs import registry
from aem_jax.envs.alfworld.env import AlfworldConfig, AlfworldEnv
from aem_jax.envs.alfworld.tasks import load_game
from aem_jax.envs.serving.pool import EnvPool
from aem_jax.envs.suite import SuiteOptions, tokenizer_corpus
from aem_jax.envs.testing import conformance_wire
from aem_jax.envs.testing.conformance import Subject, check_environment
from aem_jax.overrides import apply, split

REPOSITORY = Path(__file__).resolve().parents[1]
PAGE = (REPOSITORY / "docs" / "environments.md").read_text(encoding="utf-8")
LAUNCH = ["python", "-m", "aem_jax.launch"]


def section(title: str) -> str:
    return PAGE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def blocks(title: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", section(title), flags=re.DOTALL | re.MULTILINE)


def commands(block: str) -> list[list[str]]:
    """The words of each command of a block; comments left out."""
    lines = re.sub(r"\\\n", " ", re.sub(r"^#.*\n", "", block, flags=re.MULTILINE)).splitlines()
    return [shlex.split(line) for line in lines if line.strip()]


def run_config(words: list[str]):
    assert words[:3] == LAUNCH
    _, options = split(words[3:])
    (preset,) = options.pop("preset")
    config = apply(read_preset(preset), options)
    validate.check(config)
    return config


@pytest.fixture
def guess(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the guide's file; the test's working directory."""
    source, *_ = blocks("Bring your own environment", "python")
    (tmp_path / "guess.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    monkeypatch.delitem(sys.modules, "guess", raising=False)
    return tmp_path


def test_the_environment_conforms(guess: Path):
    _, check, _ = blocks("Bring your own environment", "python")
    scope: dict = {}
    exec(compile(check, "check.py", "exec"), scope)
    assert scope["problems"] == []
    # a played episode: "higher" and "lower" lead to the number in as many guesses as bisection of ten needs
    env, low, high = scope["Guess"](), 1, 10
    result = env.reset({"seed": 1})
    while not result.done:
        guessed = (low + high) // 2
        result = env.step(f"I say {guessed}")
        low, high = (guessed + 1, high) if result.observation == "Higher." else (low, guessed - 1)
    assert result.info["won"] and result.reward == 1.0


def test_it_is_served_and_the_suite_passes(guess: Path, capsys: pytest.CaptureFixture):
    serve, check = commands(blocks("Bring your own environment", "sh")[0])
    assert serve[:4] == [*LAUNCH, "serve"] and check[:3] == ["python", "-m", "aem_jax.envs.testing.conformance_wire"]
    line = [sys.executable, *serve[1:], "--port", "0"]
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stdout
            (port,) = re.findall(r":(\d+)$", process.stdout.readline().strip())
            assert check[3] == "localhost:8765"
            assert conformance_wire.main([f"localhost:{port}", *check[4:]]) == 0
            assert capsys.readouterr().out == "0 problems\n"
        finally:
            process.send_signal(signal.SIGINT)


def test_it_can_be_trained_on(guess: Path):
    (words,) = commands(blocks("Bring your own environment", "sh")[1])
    config = run_config(words)
    suite = task_suite(config)
    texts = [text for episode in tokenizer_corpus(suite, 3, config.rollout.max_turns) for text in episode]
    assert "Guess a number from 1 to 20." in texts and set(texts) & {"Higher.", "Lower.", "Yes!"}
    assert set(texts[1::2]) <= {"1", "5", "10", "15", "20"}
    pool = dataclasses.replace(config.env, sessions_per_server=2)
    with EnvPool(pool, (suite.name, suite.settings)) as pool:
        first = [pool.reset(session, suite.training[0].payload).result(30) for session in range(2)]
        assert [result.observation for result in first] == ["Guess a number from 1 to 20."] * 2
        assert pool.step(0, "what?").result(30).info["valid_action"] is False


def test_a_model_is_trained_with_the_paper_s_learning_rate(guess: Path):
    title = "Train a model on it"
    (preset,), (block,) = blocks(title, "toml"), blocks(title, "sh")
    (guess / "model.toml").write_text(preset)
    (words,) = commands(block)
    _, options = split(words[3:])
    config = apply(read_preset(*options.pop("preset")), options)
    validate.check(config)
    paper = read_preset("alfworld-paper", "qwen2.5-1.5b")
    for field in ("learning_rate", "adam_eps", "beta2"):
        assert getattr(config.learner, field) == getattr(paper.learner, field)
    tiny = read_preset("openenv-tiny")
    assert f"responses of {tiny.rollout.response_tokens} tokens, contexts of {tiny.rollout.context_tokens:,}" in PAGE
    assert tiny.learner.learning_rate == read_preset("harness-tiny").learner.learning_rate == 1e-3


def test_the_suite_of_an_environment_with_a_name(guess: Path, monkeypatch: pytest.MonkeyPatch):
    (guess / "guess_suite.py").write_text(blocks("Bring your own environment", "python")[2])
    monkeypatch.delitem(sys.modules, "guess_suite", raising=False)
    monkeypatch.setattr(registry, "ENVIRONMENTS", {"guess": registry.Entry("guess_suite:GUESS")})
    spec, config = registry.registered("guess"), registry.default_config("guess")
    assert spec.suite is not None
    for seed in (1, 500, 1000, 2000):  # no seed of a run trains on an evaluation task, and no two sets share one
        suite = spec.suite(config, SuiteOptions(seed=seed))
        sets = [suite.training, *(suite.evaluation(split, 300)[0] for split in ("valid", "test"))]
        assert len({task.payload["seed"] for tasks in sets for task in tasks}) == 1600
    suite = spec.suite(config, SuiteOptions(seed=1))
    tasks, name = suite.evaluation("valid", 3)
    assert name == "valid-3" and not {task.id for task in tasks} & {task.id for task in suite.training}
    (texts,) = tokenizer_corpus(suite, 1, 5)
    assert texts[0] == "Guess a number from 1 to 10."
    tasks = [task.payload for task in tasks]
    assert check_environment(Subject(spec.factory({}), tasks=tasks, actions=["3", "what?"])) == []


def test_the_mappings_are_those_of_the_recordings():
    (block,) = blocks("OpenEnv's servers", "sh")
    names = re.findall(r"^# (\w+):", block, flags=re.MULTILINE)
    folder = REPOSITORY / "tests" / "envs" / "openenv_recorded"
    files = {path.stem.rpartition("-")[0]: path for path in folder.glob("*.jsonl")}
    assert set(names) == set(files) and len(names) == len(commands(block))
    for name, words in zip(names, commands(block)):
        config = run_config(words)
        task_suite(config)
        mapping = json.loads(files[name].read_text(encoding="utf-8").splitlines()[0])["field_mapping"]
        for field, value in mapping.items():
            if field != "invalid_codes":  # the preset's; most were recorded without
                assert getattr(config.env.field_mapping, field) == value, (name, field)


def test_every_field_of_a_mapping_is_explained():
    from aem_jax.envs.serving.field_mapping import FieldMapping

    rows = re.findall(r"^\| (`.*?) \|", section("OpenEnv's servers"), flags=re.MULTILINE)
    explained = {name.replace("-", "_") for row in rows for name in re.findall(r"`([\w-]+)`", row)}
    # these three fields have the same meaning in every server, and the preset locates them
    unexplained = {"valid_field", "admissible_field", "info_field"}
    assert explained == {field.name for field in dataclasses.fields(FieldMapping)} - unexplained


def test_their_clients_task_is_one_of_ours():
    (block,) = blocks("Our servers for OpenEnv's clients", "python")
    task = {"generate": ast.literal_eval(re.findall(r"generate=(\{.*?\})", block)[0])}
    (text,) = re.findall(r'"text": "(.*?)"', block)
    env = AlfworldEnv(AlfworldConfig(), load_game=load_game)
    assert "Your task is to:" in env.reset(task).observation
    assert env.step(text).info["valid_action"]
