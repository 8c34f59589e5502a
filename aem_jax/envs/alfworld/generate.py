"""Writes generated games as files in ALFWorld's layout, each with a verified walkthrough: `--out DIR`."""

import json
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import tyro

from aem_jax.envs.alfworld.engine import Game, Player
from aem_jax.envs.alfworld.experts import Oracle
from aem_jax.envs.alfworld.generator.config import GeneratorConfig
from aem_jax.envs.alfworld.generator.files import domain_text, grammar_text, problem_text, write_game
from aem_jax.envs.alfworld.generator.games import HouseholdGame, draw_game

_LONGEST_WALKTHROUGH = 30


@dataclass(frozen=True)
class GenerateConfig:
    """Write household games that any ALFWorld player can play."""

    out: Path
    """Output folder. Set `ALFWORLD_DATA=<out>` to use it as the source of tasks."""

    train: int = 60
    """Number of games of the training split."""

    valid_seen: int = 12
    """Number of games on the training floor plans. None of them is a training game."""

    valid_unseen: int = 12
    """Number of games on floor plans that are not in the training split."""

    seed: int = 0
    """Other seeds give other games."""

    games: GeneratorConfig = field(default_factory=GeneratorConfig)
    """Settings of the game generator."""


def walkthrough(game: HouseholdGame) -> list[str]:
    """Returns commands that solve the game. The oracle plays the game to find them.

    Raises:
        ValueError: the oracle does not solve the game.
    """
    player = Player(Game(domain_text(), problem_text(game), grammar_text(game), task_type=game.task_type))
    oracle = Oracle(player.observation)
    commands: list[str] = []
    while not player.won:
        if len(commands) == _LONGEST_WALKTHROUGH:
            raise ValueError(f"expected a solvable game, the oracle failed: {game.sentence}, {commands}")
        commands.append(oracle.act(player))
        player.step(commands[-1])
    return commands


def write_games(config: GenerateConfig) -> dict[str, int]:
    """Writes all games of `config` and returns the number of games per split."""
    counts: Counter[str] = Counter()
    sizes = {"train": config.train, "valid_seen": config.valid_seen, "valid_unseen": config.valid_unseen}
    for split, size in sizes.items():
        for index in range(size):
            game = draw_game(config.games, config.seed, split, index)
            write_game(game, config.out, split, f"trial_{config.seed}_{index:06d}", walkthrough(game))
            counts[split] += 1
    return dict(counts)


def main() -> int:
    """Runs the command line."""
    config = tyro.cli(GenerateConfig, prog="python -m aem_jax.envs.alfworld.generate", description=__doc__)
    try:
        counts = write_games(config)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    print(json.dumps({"out": str(config.out), "games": counts}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
