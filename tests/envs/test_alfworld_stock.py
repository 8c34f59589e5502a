"""Our engine against the stock one on fresh games and fresh commands, step by step.

Needs an interpreter with `alfworld` and `textworld`: this one (the `alfworld` extra), or the one that the environment
variable AEM_JAX_STOCK_PYTHON names. AEM_JAX_STOCK_GAMES (default 4) sets how many games of each source are played.
"""

import importlib.util
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from envs import warehouse
from envs.alfworld_variants import first_release

from aem_jax.envs.alfworld.engine import Game, Player
from aem_jax.envs.testing.replay import alfworld_values
from scripts.alfworld_games import GenerateConfig, write_games

HERE = Path(__file__).parent
GOLDEN = HERE.parents[2] / "shared" / "alfworld"
GAMES = int(os.environ.get("AEM_JAX_STOCK_GAMES", "4"))
STEPS = 25
MALFORMED = ("", "LOOK", "go to nowhere 9", "take", "look now", " help ", "examine\tlook", "inventory  ")


class Stock:
    """The stock engine in a separate process."""

    def __init__(self, python: str):
        self.process = subprocess.Popen(
            [python, str(HERE / "alfworld_stock.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, **request: Any) -> dict[str, Any]:
        """Sends one request and waits for its answer."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, "the stock engine died; its stderr says why"
        return json.loads(line)


@pytest.fixture(scope="module")
def stock() -> Iterator[Stock]:
    python = os.environ.get("AEM_JAX_STOCK_PYTHON")
    if python is None:
        if not all(importlib.util.find_spec(name) for name in ("alfworld", "textworld")):
            pytest.skip(
                "the stock engine is not installed: pip install 'aem_jax[alfworld]', or set AEM_JAX_STOCK_PYTHON"
            )
        python = sys.executable
    engine = Stock(python)
    yield engine
    assert engine.process.stdin is not None
    engine.process.stdin.close()
    engine.process.wait(timeout=30)


def play_both(stock: Stock, path: Path, rng: random.Random, noise: float) -> None:
    """Plays one episode on both engines with a random policy; a share `noise` of the commands is malformed or stale."""
    player = Player(Game.load(path))
    theirs, command, history = stock.ask(load=str(path)), None, ["look"]
    for _ in range(STEPS):
        ours = alfworld_values(player)
        assert ours == theirs, f"{path.name} after {history}"
        if ours["done"]:
            return
        command = eager(player.admissible, rng)
        if rng.random() < noise:
            stale = rng.choice(history)
            command = rng.choice([*MALFORMED, stale, command.upper(), command + " now", command.replace(" 1", " 2")])
        history.append(command)
        player.step(command)
        theirs = stock.ask(step=command)


def eager(options: list[str], rng: random.Random) -> str:
    """A random command that prefers changes over moves."""
    acting = [
        command for command in options if command.split()[0] not in ("go", "look", "help", "inventory", "examine")
    ]
    return rng.choice(acting if acting and rng.random() < 0.7 else options)


@pytest.mark.skipif(not GOLDEN.is_dir(), reason="the golden games are not beside the repository (../shared/alfworld)")
@pytest.mark.parametrize("noise", [0.0, 0.4])
def test_golden_games_under_fresh_commands(stock: Stock, noise: float) -> None:
    rng = random.Random(f"golden {noise}")
    for path in rng.sample(sorted(GOLDEN.glob("*.tw-pddl")), GAMES):
        play_both(stock, path, rng, noise)


@pytest.mark.skipif(not GOLDEN.is_dir(), reason="the golden games are not beside the repository (../shared/alfworld)")
@pytest.mark.parametrize("noise", [0.0, 0.4])
def test_games_worded_as_in_the_first_release(stock: Stock, tmp_path: Path, noise: float) -> None:
    rng = random.Random(f"first release {noise}")
    for path in rng.sample(sorted(GOLDEN.glob("*.tw-pddl")), GAMES // 2):
        variant = tmp_path / path.name
        variant.write_text(json.dumps(first_release(json.loads(path.read_text()))))
        play_both(stock, variant, rng, noise)


def test_generated_games(stock: Stock, tmp_path: Path) -> None:
    rng = random.Random("generated")
    write_games(GenerateConfig(tmp_path, train=GAMES, valid_seen=0, valid_unseen=0, seed=rng.randrange(1000)))
    paths = sorted(tmp_path.rglob("game.tw-pddl"))
    assert len(paths) == GAMES
    for path in paths:
        play_both(stock, path, rng, noise=0.2)


def test_a_game_with_another_domain(stock: Stock, tmp_path: Path) -> None:
    # The stock engine reports every conditional effect as if it had fired, so its text for the lamp would differ.
    data = {"pddl_domain": warehouse.DOMAIN, "pddl_problem": warehouse.PROBLEM}
    data["grammar"] = warehouse.GRAMMAR.replace("It is #lamp#.", "Click.")
    path = tmp_path / "warehouse.tw-pddl"
    path.write_text(json.dumps(data))
    for seed in range(GAMES):
        play_both(stock, path, random.Random(seed), noise=0.2)
