"""Damaged files of ALFWorld and WebShop: each gives a one-line error that names it, or a playable result.

The damage is random, from seeds: files are cut, spans are lost, doubled or overwritten, values are replaced.
"""

import json
import random
from pathlib import Path

from aem_jax.envs.actions import as_action
from aem_jax.envs.alfworld.engine import Game
from aem_jax.envs.alfworld.env import AlfworldEnv
from aem_jax.envs.alfworld.generator.config import TINY
from aem_jax.envs.alfworld.tasks import official_tasks
from aem_jax.envs.serving.plain import checked_result
from aem_jax.envs.webshop.env import WebshopConfig, WebshopEnv, shop_front
from aem_jax.envs.webshop.generator.config import GeneratorConfig
from aem_jax.envs.webshop.generator.make import make_shop
from aem_jax.envs.webshop.shop import ShopConfig, open_shop
from aem_jax.envs.webshop.tasks import SPLITS, goal_tasks
from scripts.alfworld_games import GenerateConfig, write_games

SEEDS = 200
WEBSHOP = WebshopConfig(tagger="small")
VALUES = (None, 7, 1e308, [], {}, "", "x", "$", "$9" + "9" * 400, "((", "half \ud83d", True, [None])


def damaged_bytes(data: bytes, rng: random.Random) -> bytes:
    at, length = rng.randrange(len(data)), rng.choice([1, 3, 20, 400])
    junk = rng.randbytes(rng.choice([1, 3, 20]))
    return rng.choice(
        [
            data[:at],
            data[:at] + data[at + length :],
            data[:at] + junk + data[at + length :],
            data[:at] + 2 * data[at : at + length] + data[at + length :],
            rng.choice([b"", b"{}", b"[]", b"null", b"\0" * 9, data.decode().encode("utf-16")]),
        ]
    )


def damaged_json(data: bytes, rng: random.Random) -> bytes:
    """Removes, replaces or damages a random value of the JSON."""
    root = value = json.loads(data)
    while True:
        key = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
        inner = value[key]
        if not isinstance(inner, (dict, list)) or not inner or rng.random() < 0.2:
            break
        value = inner
    if isinstance(inner, str) and len(inner) > 20 and rng.random() < 0.7:
        value[key] = damaged_bytes(inner.encode(), rng).decode(errors="replace")
    elif rng.random() < 0.2:
        del value[key]
    else:
        value[key] = rng.choice(VALUES)
    return json.dumps(root).encode()


def play(env, task, actions, rng: random.Random) -> None:
    """Plays a few steps with these actions, or with admissible ones if None. Every answer must be valid."""
    result = checked_result(env, "reset", env.reset(json.loads(json.dumps(task, allow_nan=False))))
    for action in actions:
        if result.done:
            return
        admissible = [action for action in result.info["admissible"] if "…" not in action]
        result = checked_result(env, "step", env.step(as_action(action or rng.choice([*admissible, "look"]))))


def check_damaged(files: list[Path], play_all) -> None:
    """Damages one file after the other and plays the readable ones.

    The only allowed error is a ValueError that names the file. Some damage must be detected, but not all.
    """
    original, refused = {file: file.read_bytes() for file in files}, 0
    for seed in range(SEEDS):
        rng = random.Random(seed)
        file = rng.choice(files)
        file.write_bytes(rng.choice([damaged_bytes, damaged_json, damaged_json])(original[file], rng))
        try:
            play_all(rng)
        except ValueError as error:
            refused += 1
            assert str(file) in str(error) and "\n" not in str(error), (seed, str(error))
        file.write_bytes(original[file])
    assert SEEDS / 10 < refused < SEEDS


def test_game_files(tmp_path: Path):
    """Damages one of two games. The other is intact, so one game can always be played."""
    write_games(GenerateConfig(out=tmp_path, train=2, valid_seen=0, valid_unseen=0, games=TINY))
    game, _ = sorted(tmp_path.rglob("game.tw-pddl"))
    walkthrough = json.loads(game.read_bytes())["walkthrough"]

    def play_all(rng: random.Random) -> None:
        for task in official_tasks(tmp_path, "train"):
            env = AlfworldEnv(load_game=lambda payload: Game.load(payload["game"]))  # not cached
            play(env, task.payload, [None, None, *walkthrough], rng)

    check_damaged([game, game.with_name("traj_data.json")], play_all)


def test_shop_files(tmp_path: Path):
    data = make_shop(GeneratorConfig(products=8), 1)
    contents = {"items_shuffle": data.items, "items_ins_v2": data.annotations, "items_human_ins": data.instructions}
    files = [tmp_path / f"{name}{'' if 'human' in name else '_1000'}.json" for name in contents]
    for file, content in zip(files, contents.values(), strict=True):
        file.write_text(json.dumps(content))

    def play_all(rng: random.Random) -> None:
        source = ShopConfig(str(tmp_path), goals=rng.choice(["human", "synthetic"]), cache=str(tmp_path / "cache"))
        catalog = open_shop(source)
        front = shop_front(WEBSHOP, catalog)
        for split in SPLITS:
            try:
                tasks = goal_tasks(catalog, split)[:1]
            except ValueError as error:
                assert "expected goals of split" in str(error)  # with few products a split may have no goals
                continue
            for task in tasks:
                query = f"search[{task.payload['goal']['query']}]"
                play(WebshopEnv(front, WEBSHOP), task.payload, [query, None, None, None, "click[buy now]"], rng)

    check_damaged(files, play_all)


def test_a_catalog_that_was_damaged_on_disk_is_made_again(tmp_path: Path, caplog):
    source = ShopConfig(cache=str(tmp_path), made=GeneratorConfig(products=8))
    catalog = open_shop(source)
    (place,) = (path for path in tmp_path.iterdir() if path.is_dir())
    sold, wanted = [catalog.product(number) for number in range(8)], list(catalog.goals)
    files = sorted(place.iterdir())
    original = {file: file.read_bytes() for file in files}
    for seed in range(SEEDS // 4):
        rng = random.Random(seed)
        file = files[seed % len(files)]
        file.write_bytes(
            damaged_bytes(original[file], rng) if file.suffix != ".npy" else original[file][: rng.randrange(99)]
        )
        reopened = open_shop(source)
        assert (reopened.id, [reopened.product(number) for number in range(8)]) == (catalog.id, sold)
        assert list(reopened.goals) == wanted and {file: file.read_bytes() for file in files} == original
    assert all("is made again: expected" in record.getMessage() for record in caplog.records)
