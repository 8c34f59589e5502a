"""Games as a pure function of (settings, seed, split, index).

The three splits share no game. `valid_unseen` has its own floor plans. `train` and `valid_seen` have the same floor
plans, but a hash of room, task and placement assigns every game to one of them. They are therefore disjoint for all
seeds, indices and numbers of games.
"""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from aem_jax.envs.alfworld.generator.catalog import ROOMS, TREATMENTS
from aem_jax.envs.alfworld.generator.config import GeneratorConfig
from aem_jax.envs.alfworld.generator.floors import Floor, floor_plans, split_floors

SPLITS = ("train", "valid_seen", "valid_unseen")

_SEEN_SHARE = 8
"""One of this many games on the training floor plans belongs to `valid_seen`."""

_CONTENT_TRIES = 1000

_SENTENCES = {
    "pick_and_place_simple": ("put a {obj} in {recep}", "put some {obj} on {recep}"),
    "look_at_obj_in_light": ("look at {obj} under the {recep}", "examine the {obj} with the {recep}"),
    "pick_clean_then_place_in_recep": ("put a clean {obj} in {recep}", "clean some {obj} and put it in {recep}"),
    "pick_heat_then_place_in_recep": ("put a hot {obj} in {recep}", "heat some {obj} and put it in {recep}"),
    "pick_cool_then_place_in_recep": ("put a cool {obj} in {recep}", "cool some {obj} and put it in {recep}"),
    "pick_two_obj_and_place": ("put two {obj} in {recep}", "find two {obj} and put them in {recep}"),
}


@dataclass(frozen=True)
class HouseholdGame:
    """One game, before its translation to PDDL.

    Attributes:
        floor: the room.
        task_type: one of `TASK_TYPES`.
        target: class of the target object.
        destination: receptacle class that the target must end in; for the light task, class of the lamp.
        sentence: the task as a sentence, without the full stop.
        placements: (object class, receptacle class, receptacle index from 0), lamps included, sorted.
    """

    floor: Floor
    task_type: str
    target: str
    destination: str
    sentence: str
    placements: tuple[tuple[str, str, int], ...]

    @property
    def signature(self) -> str:
        """Hex digest of room, task and placement. It does not depend on the wording of the task."""
        content = (self.floor.kind, self.floor.receptacles, self.task_type, self.target, self.destination)
        return hashlib.sha256(repr((content, self.placements)).encode()).hexdigest()


def draw_game(config: GeneratorConfig, seed: int, split: str, index: int) -> HouseholdGame:
    """Draws game number `index` of a split.

    Args:
        config: settings.
        seed: any integer; other seeds give other games of the same split.
        split: `train`, `valid_seen` or `valid_unseen`.
        index: 0 or more. It determines the task type, in turn.

    Raises:
        ValueError: the split is unknown, the index is negative, or the settings do not allow the task type.
    """
    if split not in SPLITS:
        raise ValueError(f"expected split to be one of {list(SPLITS)}, got {split!r}")
    if index < 0:
        raise ValueError(f"expected index >= 0, got {index}")
    task_type = config.task_types[index % len(config.task_types)]
    floors = _usable_floors(config, split, task_type)
    rng = random.Random(f"game/{seed}/{split}/{index}")
    for _ in range(_CONTENT_TRIES):
        game = _fill(rng.choice(rng.choice(floors)), task_type, config, rng)
        if _belongs(game, split):
            return game
    raise ValueError(
        f"expected a {task_type} game for {split} within {_CONTENT_TRIES} draws; widen things or receptacles"
    )


def _belongs(game: HouseholdGame, split: str) -> bool:
    if split == "valid_unseen":
        return True
    return (int(game.signature[:8], 16) % _SEEN_SHARE == 0) == (split == "valid_seen")


@lru_cache(maxsize=256)
def _usable_floors(config: GeneratorConfig, split: str, task_type: str) -> tuple[tuple[Floor, ...], ...]:
    """Returns the floor plans of a split that allow a task type, grouped by room kind."""
    usable = []
    for kind in config.room_kinds:
        plans = floor_plans(kind, config.receptacles or ROOMS[kind].receptacles, config.floor_plans)
        fitting = tuple(floor for floor in split_floors(plans, split) if floor.goals(task_type))
        if fitting:
            usable.append(fitting)
    if not usable:
        raise ValueError(
            f"expected a {split} floor plan on which {task_type} can be made in {list(config.room_kinds)}, found none; "
            "raise floor_plans or receptacles, or drop the task type"
        )
    return tuple(usable)


def _fill(floor: Floor, task_type: str, config: GeneratorConfig, rng: random.Random) -> HouseholdGame:
    goals = floor.goals(task_type)
    target = rng.choice(sorted(goals))
    destination = rng.choice(goals[target])
    total = rng.randint(*(config.things or ROOMS[floor.kind].things))

    copies = {target: min(rng.choice((1, 1, 2, 3)), config.max_copies, total)}
    if task_type == "pick_two_obj_and_place":
        copies[target] = max(2, copies[target])
    others = [thing for thing in floor.things if thing != target]
    while others and sum(copies.values()) < total:
        thing = rng.choice(others)
        copies[thing] = copies.get(thing, 0) + 1
        if copies[thing] == config.max_copies:
            others.remove(thing)

    spots = {name: [(name, i) for i in range(count)] for name, count in floor.receptacles}
    placements = []
    for thing in (*sorted(copies), *floor.lamps):
        holders = floor.holders(thing)
        if thing == target and task_type not in TREATMENTS and task_type != "look_at_obj_in_light":
            holders = [name for name in holders if name != destination]  # the goal must not hold at the start
        free = [spot for name in holders for spot in spots[name]]
        placements += [(thing, *rng.choice(free)) for _ in range(copies.get(thing, 1))]
    sentence = rng.choice(_SENTENCES[task_type]).format(obj=target.lower(), recep=destination.lower())
    return HouseholdGame(floor, task_type, target, destination, sentence, tuple(sorted(placements)))


def distinct_indices(config: GeneratorConfig, seed: int, split: str, size: int) -> Sequence[int]:
    """Returns the first `size` indices of a split with different games."""
    indices: list[int] = []
    seen: set[str] = set()
    index = 0
    while len(indices) < size:
        signature = draw_game(config, seed, split, index).signature
        if signature not in seen:
            seen.add(signature)
            indices.append(index)
        index += 1
        if index > 20 * size + 100:
            raise ValueError(
                f"expected {size} different {split} games, found {len(indices)} in {index} draws; "
                "widen things or receptacles"
            )
    return indices
