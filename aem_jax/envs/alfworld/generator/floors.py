"""Floor plans: the receptacles of a room, and the classes of objects that occur in it.

A floor plan depends only on its room kind, its number and the room size, not on a run's seed. A plan that is reserved
for `valid_unseen` is therefore unseen in every run with the same room size. No two plans of a kind have the same
receptacles.
"""

import random
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

from aem_jax.envs.alfworld.generator.catalog import ROOMS, THINGS, TREATMENTS

_LAYOUT_TRIES = 500


@dataclass(frozen=True)
class Floor:
    """One floor plan.

    Attributes:
        kind: room kind.
        number: number as in ALFRED (kitchens from 1, living rooms from 201, …).
        receptacles: (class, count), sorted.
        things: classes of movable objects that occur here, sorted. Every class has a receptacle that can contain it.
        lamps: classes of lamps, sorted.
    """

    kind: str
    number: int
    receptacles: tuple[tuple[str, int], ...]
    things: tuple[str, ...]
    lamps: tuple[str, ...]

    def holders(self, thing: str) -> list[str]:
        """Returns the receptacle classes of this room that can contain `thing`."""
        return [name for name, _ in self.receptacles if name in THINGS[thing].places]

    def goals(self, task_type: str) -> dict[str, list[str]]:
        """Returns the possible tasks of a type: target class -> possible destinations (for the light task, lamps)."""
        if task_type not in ROOMS[self.kind].task_types:
            return {}
        if task_type == "look_at_obj_in_light":
            return {thing: list(self.lamps) for thing in self.things} if self.lamps else {}
        treatment, station = TREATMENTS.get(task_type, ("", ""))
        if station and station not in dict(self.receptacles):
            return {}
        goals = {}
        for thing in self.things:
            holders = self.holders(thing)
            if treatment and treatment not in THINGS[thing].affordances:
                continue
            if not treatment and len(holders) < 2:  # it must start in another place
                continue
            destinations = [name for name in holders if name != station]
            if destinations:
                goals[thing] = destinations
        return goals


@lru_cache(maxsize=64)
def floor_plans(kind: str, size: tuple[int, int], count: int) -> tuple[Floor, ...]:
    """Returns the first `count` floor plans of a room kind. Their receptacles differ.

    Args:
        kind: room kind.
        size: minimum and maximum number of receptacles.
        count: number of floor plans.

    Raises:
        ValueError: there are too few different rooms of this size.
    """
    plans: list[Floor] = []
    for number in range(ROOMS[kind].first_floor, ROOMS[kind].first_floor + count):
        rng = random.Random(f"floor/{kind}/{number}/{size[0]}-{size[1]}")
        taken = {plan.receptacles for plan in plans}
        for _ in range(_LAYOUT_TRIES):
            receptacles = _draw_receptacles(kind, rng.randint(*size), rng)
            if receptacles not in taken:
                break
        else:
            raise ValueError(
                f"expected {count} different {kind} plans of {size[0]} to {size[1]} receptacles, "
                f"found {len(plans)}; lower floor_plans or widen receptacles"
            )
        plans.append(_furnish(kind, number, receptacles, rng))
    return tuple(plans)


def split_floors(plans: tuple[Floor, ...], split: str) -> tuple[Floor, ...]:
    """Returns the floor plans of a split: the first fifth for `valid_unseen`, the others for the other splits."""
    unseen = max(1, len(plans) // 5)
    return plans[:unseen] if split == "valid_unseen" else plans[unseen:]


def _draw_receptacles(kind: str, size: int, rng: random.Random) -> tuple[tuple[str, int], ...]:
    room = ROOMS[kind]
    counts = Counter(rng.choice(alternatives) for alternatives in room.required)
    while counts.total() < size:
        # Classes are drawn by their mean count: large rooms become typical, small ones varied.
        lacking = {name: mean for name, (mean, most) in room.frequency.items() if counts[name] < most}
        if not lacking:
            break
        counts[rng.choices(list(lacking), list(lacking.values()))[0]] += 1
    return tuple(sorted(counts.items()))


def _furnish(kind: str, number: int, receptacles: tuple[tuple[str, int], ...], rng: random.Random) -> Floor:
    names = {name for name, _ in receptacles}
    things, lamps = [], []
    for name, thing in sorted(THINGS.items()):
        present = rng.random() < thing.rooms.get(kind, 0.0)
        if present and thing.places & names:
            (things if thing.movable else lamps).append(name)
    if not lamps and "look_at_obj_in_light" in ROOMS[kind].task_types:
        lamps.append("FloorLamp")
    return Floor(kind, number, receptacles, tuple(things), tuple(lamps))
