"""Writes generated games as files in the layout of ALFWorld's official data, each with a verified walkthrough.

python scripts/alfworld_games.py --out DIR [--train 60] [--games.receptacles 4 6]
"""

import json
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aem_jax import overrides
from aem_jax.envs.alfworld.engine import Game, Player
from aem_jax.envs.alfworld.experts import Oracle
from aem_jax.envs.alfworld.generator.config import GeneratorConfig
from aem_jax.envs.alfworld.generator.files import domain_text, game_data, grammar_text, problem_text
from aem_jax.envs.alfworld.generator.games import HouseholdGame, draw_game
from aem_jax.errors import ConfigError
from aem_jax.help import help_text

_LONGEST_WALKTHROUGH = 30
_USAGE = "python scripts/alfworld_games.py --out DIR"


@dataclass(frozen=True)
class GenerateConfig:
    """Write household games that any ALFWorld player can play."""

    out: Path = Path()
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


def trajectory_data(game: HouseholdGame, trial: str) -> dict[str, Any]:
    """Returns the content of the game's `traj_data.json`, which describes the task in ALFRED's fields."""
    light = game.task_type == "look_at_obj_in_light"
    return {
        "task_id": trial,
        "task_type": game.task_type,
        "pddl_params": {
            "object_target": game.target,
            "parent_target": "" if light else game.destination,
            "toggle_target": game.destination if light else "",
            "mrecep_target": "",
            "object_sliced": False,
        },
        "scene": {"floor_plan": f"FloorPlan{game.floor.number}", "scene_num": game.floor.number},
        "turk_annotations": {"anns": []},
    }


def write_game(game: HouseholdGame, root: Path, split: str, trial: str) -> None:
    """Writes one game to `root/json_2.1.1/split/…/trial/`, the layout of the official data.

    Args:
        game: the game.
        root: folder for `$ALFWORLD_DATA`.
        split: `train`, `valid_seen` or `valid_unseen`.
        trial: name of the game's folder.
    """
    name = f"{game.task_type}-{game.target}-None-{game.destination}-{game.floor.number}"
    folder = root / "json_2.1.1" / split / name / trial
    folder.mkdir(parents=True, exist_ok=True)
    data = game_data(game) | {"walkthrough": walkthrough(game)}
    (folder / "game.tw-pddl").write_text(json.dumps(data), encoding="utf-8")
    (folder / "traj_data.json").write_text(json.dumps(trajectory_data(game, trial)), encoding="utf-8")


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
            write_game(game, config.out, split, f"trial_{config.seed}_{index:06d}")
            counts[split] += 1
    return dict(counts)


def main() -> int:
    """Runs the command line."""
    try:
        words, options = overrides.split(sys.argv[1:])
        if "help" in options:
            about = "Write household games that any ALFWorld player can play."
            print(help_text(GenerateConfig(), _USAGE, about, options["help"]))
            return 0
        if words or "out" not in options:
            raise ConfigError(f"expected options with --out DIR among them, got {' '.join(sys.argv[1:]) or 'none'}")
        config = overrides.apply(GenerateConfig(), options)
        counts = write_games(config)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    print(json.dumps({"out": str(config.out), "games": counts}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
