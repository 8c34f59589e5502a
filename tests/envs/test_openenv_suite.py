"""The task suite of a foreign environment: its tasks are reset keywords, and it has no expert."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
from envs.servers import REPOSITORY, served

from aem_jax.config import validate
from aem_jax.config.environments import task_suite
from aem_jax.config.presets import read_preset
from aem_jax.config.run import may_change
from aem_jax.envs.suite import tokenizer_corpus
from aem_jax.launch import cli
from aem_jax.overrides import apply, split


def suite(*words: str):
    """The task suite of a command line that names the preset `openenv-tiny`."""
    _, options = split(words)
    config = apply(read_preset("openenv-tiny"), options)
    validate.check(config)
    return task_suite(config)


def payloads(tasks):
    return [dict(task.payload) for task in tasks]


def test_seeds_are_tasks_and_no_split_shares_any():
    found = suite("--env.urls", "a:1", "--openenv.seeds", "3", "--openenv.reset", '{"size": 2}')
    assert payloads(found.training) == [{"size": 2, "seed": seed} for seed in range(3)]
    assert [task.id for task in found.training[1:]] == ["seed-1", "seed-2"]
    valid, name = found.evaluation("valid", 2)
    test, _ = found.evaluation("test", 2)
    assert payloads(valid) == [{"size": 2, "seed": 10**9}, {"size": 2, "seed": 10**9 + 1}]
    assert payloads(test)[0]["seed"] == 2 * 10**9
    # the name depends on the content of the set
    assert name.startswith("valid-2-") and name == found.evaluation("valid", 2)[1]
    assert name != suite("--env.urls", "a:1").evaluation("valid", 2)[1]
    with pytest.raises(ValueError, match="expected valid or test with openenv, got 'valid_seen'"):
        found.evaluation("valid_seen", 2)


def test_tasks_come_from_files(tmp_path: Path):
    train, test = tmp_path / "train.jsonl", tmp_path / "test.jsonl"
    train.write_text('{"level": 1}\n\n{"level": 2, "size": 9}\n')
    test.write_text('{"level": 3}\n{"level": 4}\n')
    words = ["--env.urls", "a:1", "--openenv.tasks", str(train), "--openenv.reset", '{"size": 5}']
    found = suite(*words, "--openenv.evaluation-tasks", str(test))
    assert payloads(found.training) == [{"size": 5, "level": 1}, {"size": 9, "level": 2}]
    assert [task.id for task in found.training] == ["train-0", "train-1"]
    assert payloads(found.evaluation("valid", 1)[0]) == [{"size": 5, "level": 3}]
    assert len(suite(*words, "--evaluation.splits").training) == 2
    with pytest.raises(ValueError, match=r"expected --openenv.evaluation-tasks with --openenv.tasks, got none"):
        suite(*words)


def test_task_files_are_cut_at_line_breaks_alone_and_their_text_can_be_encoded(tmp_path: Path):
    file = tmp_path / "tasks.jsonl"
    file.write_text('{"text": "a\u2028b\u0085c"}\r\n\n{"text": "half \\ud83d"}', encoding="utf-8")
    found = suite("--env.urls", "a:1", "--openenv.tasks", str(file), "--evaluation.splits")
    assert payloads(found.training) == [{"text": "a\u2028b\u0085c"}, {"text": "half \ufffd"}]


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ('{"level": NaN}', "got NaN"),
        ('{"level": [-Infinity]}', "got -Infinity"),
        ("[1]", "expected a JSON mapping of reset keywords, got [1]"),
        ('{"level": ', "expected JSON"),
    ],
)
def test_a_line_that_is_no_task_is_named(tmp_path: Path, line: str, why: str):
    file = tmp_path / "tasks.jsonl"
    file.write_text(f'{{"level": 1}}\n\n{line}\n')
    with pytest.raises(ValueError) as error:
        suite("--env.urls", "a:1", "--openenv.tasks", str(file), "--evaluation.splits")
    assert str(error.value).startswith(f"{file} line 3: ") and why in str(error.value)


def test_what_is_trained_on_is_not_evaluated(tmp_path: Path):
    train, test = tmp_path / "train.jsonl", tmp_path / "test.jsonl"
    train.write_text('{"level": 1, "size": 5}\n{"level": 2}\n')
    test.write_text('{"level": 3}\n{"level": 1}\n')  # with the common size, the second is the first training task
    words = ["--env.urls", "a:1", "--openenv.reset", '{"size": 5}', "--openenv.evaluation-tasks", str(test)]
    with pytest.raises(ValueError, match=r'got 1 in .*test.jsonl, {"level": 1, "size": 5} for one; take them out'):
        suite(*words, "--openenv.tasks", str(train))
    test.write_text('{"seed": 3}\n{"seed": 2, "size": 6}\n{"seed": "1"}\n{"seed": true}\n')
    billion = ["--openenv.seeds", str(10**9)]
    assert len(suite(*words, "--openenv.seeds", "3").evaluation("valid", 9)[0]) == 4  # seeds 0 to 2, of size 5
    with pytest.raises(ValueError, match=r'got 1 in .*test.jsonl, {"seed": 3, "size": 5} for one'):
        suite(*words, *billion)
    with pytest.raises(ValueError, match=r"one set, got valid test; say --evaluation.splits test"):
        suite(*words, "--openenv.seeds", "3", "--evaluation.splits", "valid", "test")


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ([], "expected one of --env.urls, --env.command, --openenv.serve with openenv, got none"),
        (["--env.urls", "a:1", "--openenv.serve", "b.py:C"], "got --env.urls and --openenv.serve"),
        (["--env.urls", "a:1", "--openenv.reset", "["], "--openenv.reset: expected JSON, got "),
        (["--env.urls", "a:1", "--openenv.reset", "[1]"], "expected --openenv.reset as a JSON mapping, got '[1]'"),
        (["--env.urls", "a:1", "--openenv.reset", '{"level": NaN}'], "--openenv.reset: expected JSON, got NaN"),
        (["--env.urls", "a:1", "--openenv.settings", '{"a": 1}'], "expected --openenv.settings with --openenv.serve"),
        (["--env.urls", "a:1", "--openenv.tasks", "none.jsonl"], "expected a file of tasks, got 'none.jsonl'"),
        (["--env.urls", "a:1", "--warmstart.episodes", "5"], "--warmstart.episodes: expected 0 with openenv, got 5"),
    ],
)
def test_what_is_missing_is_said(words, why):
    with pytest.raises(ValueError) as error:
        suite(*words)
    assert why in str(error.value)


def test_a_run_with_no_environment_is_one_line(tmp_path: Path, capsys):
    assert cli.main(["--preset", "openenv-tiny", "--runs-dir", str(tmp_path)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: expected one of --env.urls, --env.command, --openenv.serve")


def test_what_is_said_and_heard_is_part_of_a_run():
    assert may_change("env.urls") and may_change("env.num_servers")
    assert not may_change("env.field_mapping.text_field") and not may_change("env.command")
    assert not may_change("openenv.seeds")


ECHO = ["--openenv.reset", '{"word": "hi"}', "--openenv.actions", "ho", "hu", "--env.first-pause-s", "0.05"]


def said(found) -> list[str]:
    return [text for episode in tokenizer_corpus(found, 3, 4) for text in episode]


def test_chance_talks_to_a_server_so_that_there_is_a_tokenizer(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    with served("echo", "--sessions", "1") as (address, _):
        at_url = suite("--env.urls", address, *ECHO)
        heard = said(at_url)
        assert said(at_url) == heard  # the random agent depends on the seed, and the single session was released
    # three episodes of four turns without the word: observations and actions in turn
    assert len(heard) == 24 and heard[::8] == ["say hi"] * 3 and set(heard[1::2]) == {"ho", "hu"}
    assert heard[2] == f"1: {heard[1]}"
    command = f"{sys.executable} -m aem_jax.envs.serving.server echo --port {{port}}"
    assert said(suite("--env.command", command, *ECHO)) == heard


MINE = """
import os
from aem_jax.envs.testing.echo import EchoConfig, EchoEnv

print("pygame says hello")


class Mine(EchoEnv):
    def reset(self, task):
        if task["seed"] == 1:
            os._exit(3)
        return super().reset(task)


def make(length):
    return Mine(EchoConfig(length=length))
"""


def test_an_environment_of_ones_own_is_played_in_a_process_of_its_own(tmp_path: Path, capfd, caplog):
    """The environment prints at import, and one task ends its process. That task is left out."""
    file = tmp_path / "mine.py"
    file.write_text(MINE)
    found = suite("--openenv.serve", f"{file}:make", "--openenv.settings", '{"length": 2}', *ECHO)
    assert (found.name, found.settings) == (f"{file}:make", {"length": 2})
    heard = said(found)
    assert heard[::4] == ["say hi"] * 2
    # the environment's own list of actions has priority over the given one
    assert set(heard[1::2]) <= {"say", "hi"}
    (line,) = [each.getMessage() for each in caplog.records if "left out" in each.getMessage()]
    assert line.startswith("task seed-1 is left out: ") and "exit status 3" in line
    assert "pygame" not in capfd.readouterr().out


def test_without_actions_nobody_plays():
    found = suite("--env.urls", "a:1")
    assert not found.baselines and found.demonstrator is None
    with pytest.raises(ValueError, match=r"expected --model.path.* with openenv.*--openenv.actions"):
        said(found)


def test_one_session_servers_are_as_many_as_slots():
    words = ["--env.command", "serve {port}", "--env.sessions-per-server", "1", "--rollout.num-slots", "4"]
    assert suite(*words, "--env.num-servers", "4")
    with pytest.raises(ValueError, match=r"--rollout.num-slots: expected at most 3"):
        suite(*words, "--env.num-servers", "3")


def test_the_mapping_is_reached_from_the_command_line():
    _, options = split(["--env.field-mapping.action-field", "answer", "--env.field-mapping.invalid-codes", "A", "B"])
    mapping = apply(read_preset("openenv-tiny"), options).env.field_mapping
    assert (mapping.action_field, mapping.won_field, mapping.invalid_codes) == ("answer", "won|", ("A", "B"))
    assert json.loads(json.dumps(dataclasses.asdict(mapping)))["invalid_codes"] == ["A", "B"]
