"""Floor plans: which receptacles stand in a room and which classes of things are found there.

A floor plan depends on its room kind, its number and the room size alone, never on a run's seed: a plan kept for
`valid_unseen` is unseen by every run of the same room size. No two plans of a kind have the same receptacles.
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
        number: its number, as in ALFRED (kitchens from 1, living rooms from 201, …).
        receptacles: (class, count), sorted.
        things: classes of movable things found here, sorted; each fits some receptacle.
        lamps: classes of lamps, sorted.
    """

    kind: str
    number: int
    receptacles: tuple[tuple[str, int], ...]
    things: tuple[str, ...]
    lamps: tuple[str, ...]

    def holders(self, thing: str) -> list[str]:
        """Receptacle classes of this room that can hold `thing`."""
        return [name for name, _ in self.receptacles if name in THINGS[thing].places]

    def goals(self, task_type: str) -> dict[str, list[str]]:
        """Target class -> its possible destinations (lamps for the light task) for which the task can be made."""
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
            if not treatment and len(holders) < 2:  # it has to start somewhere else
                continue
            destinations = [name for name in holders if name != station]
            if destinations:
                goals[thing] = destinations
        return goals


@lru_cache(maxsize=64)
def floor_plans(kind: str, size: tuple[int, int], count: int) -> tuple[Floor, ...]:
    """The first `count` floor plans of a room kind, all with different receptacles.

    Args:
        kind: room kind.
        size: least and most receptacles.
        count: number of floor plans.

    Raises:
        ValueError: rooms of this size do not differ enough for so many plans.
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
    """The floor plans of a split: the first fifth for `valid_unseen`, the others for `train` and `valid_seen`."""
    unseen = max(1, len(plans) // 5)
    return plans[:unseen] if split == "valid_unseen" else plans[unseen:]


def _draw_receptacles(kind: str, size: int, rng: random.Random) -> tuple[tuple[str, int], ...]:
    room = ROOMS[kind]
    counts = Counter(rng.choice(alternatives) for alternatives in room.required)
    while counts.total() < size:
        # How much of its usual number a class still lacks: large rooms come out as usual, small ones varied.
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
