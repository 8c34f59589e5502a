"""Task sources: generated games and official data behind one interface, and the command that writes games."""

import json
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from aem_jax.envs.alfworld.engine import Game, Player
from aem_jax.envs.alfworld.env import AlfworldConfig, AlfworldEnv
from aem_jax.envs.alfworld.generator.catalog import TASK_TYPES
from aem_jax.envs.alfworld.generator.config import TINY, GeneratorConfig
from aem_jax.envs.alfworld.generator.games import draw_game
from aem_jax.envs.alfworld.tasks import eval_set, generated_game, load_game, official_tasks, training_tasks
from scripts.alfworld_games import GenerateConfig, write_games

OFFICIAL = GeneratorConfig()


def test_eval_set_is_fixed_distinct_and_named_by_content():
    tasks, name = eval_set(TINY, "valid_seen", 48)
    again, same_name = eval_set(TINY, "valid_seen", 48)
    assert name == same_name and list(tasks) == list(again)
    assert len({generated_game(task.payload).signature for task in tasks}) == len(tasks) == 48
    assert eval_set(TINY, "valid_seen", 48, seed=1)[1] != name
    assert eval_set(replace(TINY, things=(3, 7)), "valid_seen", 48)[1] != name
    assert len({task.id for task in tasks}) == 48


def test_payload_is_json_and_rebuilds_the_game_quickly():
    tasks = training_tasks(OFFICIAL, seed=4, size=1000)
    assert len(tasks) == 1000 and len(tasks[10:20]) == 10
    assert tasks[10:20][3] == tasks[13]
    payload = json.loads(json.dumps(tasks[13].payload))
    assert generated_game(payload) == draw_game(OFFICIAL, 4, "train", 13)
    assert load_game(payload) is load_game(payload)
    load_game(tasks[0].payload)
    began = time.perf_counter()
    for task in tasks[100:130]:
        load_game(task.payload)
    assert (time.perf_counter() - began) / 30 < 0.05  # 5 ms on an idle core


def test_written_games_are_official_data(tmp_path: Path):
    counts = write_games(GenerateConfig(out=tmp_path, train=12, valid_seen=6, valid_unseen=6, games=TINY))
    assert counts == {"train": 12, "valid_seen": 6, "valid_unseen": 6}
    tasks = official_tasks(tmp_path, "train")
    assert Counter(task.task_type for task in tasks) == Counter(dict.fromkeys(TASK_TYPES, 2))
    for task in tasks:
        data = json.loads(Path(task.payload["game"]).read_text())
        player = Player(load_game(task.payload))
        for command in data["walkthrough"]:
            player.step(command)
        assert player.won
    training = [t.id for t in training_tasks(TINY, data=tmp_path)]
    assert sorted(training) == [t.id for t in tasks] != training  # the same games, not sorted by type
    assert training == [t.id for t in training_tasks(TINY, data=tmp_path)]
    chosen, name = eval_set(TINY, "valid_unseen", 4, data=tmp_path)
    assert len(chosen) == 4 and name.startswith("valid_unseen-4-")
    assert {task.task_type for task in official_tasks(tmp_path, "train", TASK_TYPES[:1])} == {TASK_TYPES[0]}


def test_official_source_skips_what_alfworld_skips(tmp_path: Path):
    write_games(GenerateConfig(out=tmp_path, train=4, valid_seen=0, valid_unseen=0, games=TINY))
    first, second, third, fourth = (Path(task.payload["game"]) for task in official_tasks(tmp_path, "train"))
    first.write_text(json.dumps(json.loads(first.read_text()) | {"solvable": False}))
    second.parents[1].rename(second.parents[2] / "pick_and_place_with_movable_recep-Pen-Mug-Desk-302")
    third.parents[1].rename(third.parents[2] / "pick_cool_then_place_in_recep-AppleSliced-None-Desk-302")
    assert [task.payload["game"] for task in official_tasks(tmp_path, "train")] == [str(fourth)]
    with pytest.raises(ValueError, match="ALFWORLD_DATA"):
        official_tasks(tmp_path / "nowhere", "train")
    with pytest.raises(ValueError, match="found none"):
        official_tasks(tmp_path, "train", TASK_TYPES[:0])


BAD = {
    "cut": lambda text: text[: len(text) // 2],
    "empty": lambda text: "",
    "an empty object": lambda text: "{}",
    "a list": lambda text: "[]",
    "another generator's": lambda text: json.dumps({"domain": "", "problem": "", "solvable": True}),
    "solvable in words": lambda text: json.dumps(json.loads(text) | {"solvable": "yes"}),
    "not UTF-8": lambda text: b"\xff\xfe" + text.encode("utf-16-le"),
}


@pytest.fixture(scope="module")
def games(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_games(GenerateConfig(out=folder, train=3, valid_seen=1, valid_unseen=0, games=TINY))
    return folder


@pytest.mark.parametrize(
    "damage", [*BAD, "a dangling link", "no traj_data.json", "a broken traj_data.json", "another task_type"]
)
def test_a_bad_file_among_the_good_is_named_or_left_out(games: Path, tmp_path: Path, caplog, damage: str):
    shutil.copytree(games, tmp_path, dirs_exist_ok=True)
    bad, good, other = sorted((tmp_path / "json_2.1.1/train").rglob("game.tw-pddl"))
    facts = bad.with_name("traj_data.json")
    if damage == "no traj_data.json":
        facts.unlink()
    elif damage == "a dangling link":
        bad.unlink()
        bad.symlink_to("nowhere")
    elif damage == "a broken traj_data.json":
        facts.write_text("{")
    elif damage == "another task_type":
        facts.write_text('{"task_type": "pick_and_fly"}')
    else:
        content = BAD[damage](bad.read_text())
        bad.write_bytes(content if isinstance(content, bytes) else content.encode())
    named = facts if damage.endswith(("traj_data.json", "task_type")) else bad
    for source in (
        lambda **how: training_tasks(TINY, data=tmp_path, **how),
        partial(official_tasks, tmp_path, "train"),
    ):
        with pytest.raises(ValueError) as error:
            source()
        message = str(error.value)
        assert (
            str(named) in message
            and "1 of 3 games" in message
            and "--alfworld.skip-bad" in message
            and "\n" not in message
        )
        caplog.clear()
        assert {task.payload["game"] for task in source(skip_bad=True)} == {str(good), str(other)}
        (line,) = [record.getMessage() for record in caplog.records]
        assert line.startswith("1 of 3 games under") and str(named) in line
    assert len(eval_set(TINY, "valid_seen", 1, data=tmp_path)[0]) == 1  # a bad file of another split is ignored


def test_a_game_that_is_won_from_the_start_is_over_at_its_reset(games: Path):
    task = official_tasks(games, "train")[0]
    data = json.loads(Path(task.payload["game"]).read_text())
    problem = re.sub(r"\(:goal.*", "(:goal (and)))", data["pddl_problem"], flags=re.DOTALL)
    game = Game(data["pddl_domain"], problem, data["grammar"])
    first = AlfworldEnv(load_game=lambda payload: game).reset(task.payload)
    assert first.terminated and first.won


def test_command_line(tmp_path: Path):
    command = [sys.executable, "-m", "scripts.alfworld_games", "--out", str(tmp_path), "--train", "2"]
    command += ["--valid-seen", "1", "--valid-unseen", "1", "--games.receptacles", "4", "6", "--games.things", "3", "6"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["games"] == {"train": 2, "valid_seen": 1, "valid_unseen": 1}
    assert len(list(tmp_path.rglob("game.tw-pddl"))) == len(list(tmp_path.rglob("traj_data.json"))) == 4
    command[command.index("--out") + 1] = str(next(tmp_path.rglob("game.tw-pddl")))
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    done = subprocess.run([*command, "--trian", "2"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "error: unknown field --trian; did you mean --train?\n")


def test_a_generated_game_brings_its_step_limit():
    task = training_tasks(replace(TINY, max_steps=3))[0]
    env = AlfworldEnv(AlfworldConfig(max_steps=50), load_game=load_game)
    env.reset(json.loads(json.dumps(task.payload)))
    assert [env.step("<action>look</action>").truncated for _ in range(3)] == [False, False, True]
