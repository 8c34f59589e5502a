"""ALFWorld's tasks: one interface for generated games, which are made in memory, and for the official data.

The payload of a task is a small JSON mapping. Any server can rebuild the game from it:
`{"generate": {"seed": 0, "split": "train", "index": 7, …settings…}}` or `{"game": "<path of a game.tw-pddl>"}`.
"""

import json
import logging
import os
import random
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NoReturn

from aem_jax.envs.alfworld.engine import Game, read_game, read_task_type
from aem_jax.envs.alfworld.generator.catalog import TASK_TYPES
from aem_jax.envs.alfworld.generator.config import GeneratorConfig
from aem_jax.envs.alfworld.generator.files import domain_text, game_data, grammar_text, problem_text
from aem_jax.envs.alfworld.generator.games import SPLITS, HouseholdGame, distinct_indices, draw_game
from aem_jax.envs.protocol import Task
from aem_jax.envs.suite import NumberedTasks, set_name
from aem_jax.overrides import override

log = logging.getLogger(__name__)

_OFFICIAL_FOLDER = "json_2.1.1"
_GAME_FILE = "game.tw-pddl"


def generated_tasks(config: GeneratorConfig, split: str, seed: int, indices: Sequence[int]) -> NumberedTasks:
    """Returns tasks of generated games. Each task names its game, which is generated when it is loaded.

    Args:
        config: settings of the generator.
        split: `train`, `valid_seen` or `valid_unseen`.
        seed: other seeds give other games of the same split.
        indices: numbers of the games; `range(n)` for the first n.

    Raises:
        ValueError: the split does not exist.
    """
    _check_split(split)
    return NumberedTasks(indices, partial(_generated_task, config, split, seed))


def _generated_task(config: GeneratorConfig, split: str, seed: int, index: int) -> Task:
    game = {"seed": seed, "split": split, "index": index}
    task_type = config.task_types[index % len(config.task_types)]
    return Task(f"{split}-{seed}-{index}", task_type, {"generate": game | config.to_json()})


def _check_split(split: str) -> None:
    if split not in SPLITS:
        raise ValueError(f"expected split to be one of {list(SPLITS)}, got {split!r}")


def official_tasks(
    root: str | Path, split: str, task_types: Collection[str] = TASK_TYPES, *, skip_bad: bool = False
) -> list[Task]:
    """Returns the official games of a split, sorted by path.

    As in ALFWorld itself, two kinds of games are skipped: those with `movable` or `Sliced` in their path, and those
    that are not known to be solvable.

    Args:
        root: the folder that `$ALFWORLD_DATA` names; the games are in `json_2.1.1/<split>`.
        split: `train`, `valid_seen` or `valid_unseen`.
        task_types: task types to keep.
        skip_bad: whether to skip files that contain no game, with a line in the log that counts them.

    Raises:
        ValueError: the folder does not exist or contains no game, or a file contains none; the message names the first.
    """
    _check_split(split)
    folder = Path(root) / _OFFICIAL_FOLDER / split
    if not folder.is_dir():
        raise ValueError(f"expected ALFWorld's data in {folder}, found no such folder; set ALFWORLD_DATA to its parent")
    tasks, bad, count = [], [], 0
    for path in sorted(_game_files(folder)):
        name = path.relative_to(folder).parent.as_posix()
        if "movable" in name or "Sliced" in name:
            continue
        count += 1
        try:
            task_type, solvable = _type_and_solvable(path)
        except (ValueError, OSError) as error:
            bad.append(str(error))
            continue
        if task_type in task_types and solvable:
            tasks.append(Task(name, task_type, {"game": str(path)}))
    if bad and not skip_bad:
        raise ValueError(
            f"{bad[0]} ({len(bad)} of {count} games under {folder} cannot be read); mend them, or leave them out with "
            "--alfworld.skip-bad"
        )
    if bad:
        log.warning("%d of %d games under %s are left out, the first: %s", len(bad), count, folder, bad[0])
    if not tasks:
        raise ValueError(f"expected solvable games of {list(task_types)} under {folder}, found none")
    return tasks


def _game_files(folder: Path) -> Iterator[Path]:
    """Yields the game files below a folder. Broken links are included; `Path.rglob` would skip them.

    Raises:
        OSError: a folder cannot be read.
    """

    def refuse(error: OSError) -> NoReturn:
        raise error

    for parent, folders, files in os.walk(folder, onerror=refuse):
        if _GAME_FILE in files or _GAME_FILE in folders:
            yield Path(parent, _GAME_FILE)


def _type_and_solvable(path: Path) -> tuple[str, bool]:
    """Returns a game's task type, and whether the game is known to be solvable.

    Raises:
        FileNotFoundError: the folder of the game has no `traj_data.json`.
        ValueError: one of the two files has unexpected content; the message names it.
    """
    solvable, facts = read_game(path).get("solvable", False), path.with_name("traj_data.json")
    if not isinstance(solvable, bool):
        raise ValueError(f"expected true or false as solvable in {path}, got {solvable!r:.80}")
    task_type = read_task_type(facts)
    if task_type not in TASK_TYPES:
        raise ValueError(f"expected a task_type of {', '.join(TASK_TYPES)} in {facts}, got {task_type!r:.80}")
    return task_type, solvable


def training_tasks(
    config: GeneratorConfig,
    *,
    seed: int = 0,
    size: int = 100_000,
    data: str | Path | None = None,
    skip_bad: bool = False,
) -> Sequence[Task]:
    """Returns the training tasks.

    Args:
        config: settings of the generator. With official data, only its task types are used: they select the games.
        seed: seed of generated games.
        size: number of generated games.
        data: folder of official data (`$ALFWORLD_DATA`); without it, games are generated.
        skip_bad: for official data, see `official_tasks`.

    Returns:
        The tasks. Every prefix of them is a fair sample.
    """
    if data is not None:
        tasks = official_tasks(data, "train", config.task_types, skip_bad=skip_bad)
        random.Random("training order").shuffle(tasks)  # they are sorted by task type
        return tasks
    return generated_tasks(config, "train", seed, range(size))


def eval_set(
    config: GeneratorConfig,
    split: str,
    size: int,
    seed: int = 0,
    *,
    data: str | Path | None = None,
    skip_bad: bool = False,
) -> tuple[Sequence[Task], str]:
    """Returns a fixed set of distinct games, and a name that changes when the content of any of them changes.

    Args:
        config: settings of the generator. With official data, only its task types are used: they select the games.
        split: `valid_seen` (training floor plans, other games) or `valid_unseen` (floor plans that are not trained on).
        size: number of games. With official data, the set has at most all games of the split.
        seed: seed of generated games.
        data: folder of official data (`$ALFWORLD_DATA`); without it, games are generated.
        skip_bad: for official data, see `official_tasks`.

    Returns:
        The tasks, and `<split>-<size>-<first 6 hex digits of the SHA-256 over the games' contents>`.
    """
    if size < 1:
        raise ValueError(f"expected size >= 1, got {size}")
    if data is not None:
        tasks = _spread(official_tasks(data, split, config.task_types, skip_bad=skip_bad), size)
        return tasks, set_name(split, len(tasks), (Path(task.payload["game"]).read_bytes() for task in tasks))
    tasks = generated_tasks(config, split, seed, distinct_indices(config, seed, split, size))
    games = (game_data(generated_game(task.payload)) for task in tasks)
    return tasks, set_name(split, len(tasks), (json.dumps(game, sort_keys=True).encode() for game in games))


def generated_game(payload: Mapping[str, Any]) -> HouseholdGame:
    """Generates the game of a `{"generate": …}` payload.

    Raises:
        ValueError: fields are missing, unknown or out of bounds.
    """
    settings = dict(payload["generate"])
    missing = [name for name in ("seed", "split", "index") if name not in settings]
    if missing:
        raise ValueError(f"expected seed, split and index in the payload's 'generate', {missing} missing")
    seed, split, index = (settings.pop(name) for name in ("seed", "split", "index"))
    return draw_game(override(GeneratorConfig(), settings), seed, split, index)


def load_game(payload: Mapping[str, Any]) -> Game:
    """Generates the game of a task's payload in memory, or reads it from its file. The latest games are cached.

    Raises:
        ValueError: the payload names neither a game file nor a game to generate.
    """
    path = payload.get("game")
    if "generate" not in payload and not (isinstance(path, str) and path):
        raise ValueError(
            f"expected 'generate' or 'game' (the path of a game file) in the payload, got keys {sorted(payload)}"
        )
    return _load_game(json.dumps(payload, sort_keys=True))


@lru_cache(maxsize=512)
def _load_game(payload_json: str) -> Game:
    payload = json.loads(payload_json)
    if "game" in payload:
        return Game.load(payload["game"])
    game = generated_game(payload)
    return Game(domain_text(), problem_text(game), grammar_text(game), task_type=game.task_type)


def _spread(tasks: Sequence[Task], size: int) -> list[Task]:
    """Selects `size` tasks, evenly spaced over the list, which is sorted by task type."""
    count = min(size, len(tasks))
    return [tasks[i * len(tasks) // count] for i in range(count)]
