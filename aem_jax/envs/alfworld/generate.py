"""Writes games of our own as files in ALFWorld's layout, each with a walkthrough that was played: `--out DIR`."""

import json
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import tyro

from aem_jax.envs.alfworld.engine import Game, start
from aem_jax.envs.alfworld.experts import Oracle
from aem_jax.envs.alfworld.generator.config import GeneratorConfig
from aem_jax.envs.alfworld.generator.files import domain_text, grammar_text, problem_text, write_game
from aem_jax.envs.alfworld.generator.games import HouseholdGame, draw_game

_LONGEST_WALKTHROUGH = 30


@dataclass(frozen=True)
class GenerateConfig:
    """Write household games that any ALFWorld player can play."""

    out: Path
    """Folder to write to; afterwards `ALFWORLD_DATA=<out>` makes it the task source."""

    train: int = 60
    """Games of the training split."""

    valid_seen: int = 12
    """Games on the training floor plans, none of them a training game."""

    valid_unseen: int = 12
    """Games on floor plans that training never sees."""

    seed: int = 0
    """Other seeds give other games."""

    games: GeneratorConfig = field(default_factory=GeneratorConfig)
    """What the games look like."""


def walkthrough(game: HouseholdGame) -> list[str]:
    """Commands that solve the game, found by playing it with the oracle.

    Raises:
        ValueError: the oracle does not solve it.
    """
    player = start(Game(domain_text(), problem_text(game), grammar_text(game), task_type=game.task_type))
    oracle = Oracle(player.observation)
    commands: list[str] = []
    while not player.won:
        if len(commands) == _LONGEST_WALKTHROUGH:
            raise ValueError(f"expected a solvable game, the oracle failed: {game.sentence}, {commands}")
        commands.append(oracle.act(player))
        player.step(commands[-1])
    return commands


def write_games(config: GenerateConfig) -> dict[str, int]:
    """Writes all games of `config` and returns how many went to each split."""
    counts: Counter[str] = Counter()
    sizes = {"train": config.train, "valid_seen": config.valid_seen, "valid_unseen": config.valid_unseen}
    for split, size in sizes.items():
        for index in range(size):
            game = draw_game(config.games, config.seed, split, index)
            write_game(game, config.out, split, f"trial_{config.seed}_{index:06d}", walkthrough(game))
            counts[split] += 1
    return dict(counts)


def main() -> int:
    """The command line."""
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
