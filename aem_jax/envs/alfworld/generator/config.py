"""Settings of the generator of household games."""

from dataclasses import asdict, dataclass
from typing import Any

from aem_jax.envs.alfworld.generator.catalog import ROOM_KINDS, ROOMS, TASK_TYPES


@dataclass(frozen=True)
class GeneratorConfig:
    """Settings of generated games. The defaults give rooms of the official sizes; `TINY` gives short episodes."""

    task_types: tuple[str, ...] = TASK_TYPES
    """Task types. Successive games take them in turn."""

    room_kinds: tuple[str, ...] = ROOM_KINDS
    """Room kinds. Every task type must be possible in at least one of them."""

    receptacles: tuple[int, int] | None = None
    """Minimum and maximum number of receptacles; none: as in official rooms."""

    things: tuple[int, int] | None = None
    """Minimum and maximum number of movable objects; none: as in official rooms."""

    floor_plans: int = 30
    """Number of floor plans of each room kind. The first fifth (at least one) is reserved for `valid_unseen`."""

    max_copies: int = 3
    """Maximum number of movable objects of one class."""

    max_steps: int = 50
    """Steps after which an episode is truncated: part of tasks, not of game files."""

    def __post_init__(self) -> None:
        for name in ("task_types", "room_kinds", "receptacles", "things"):  # JSON gives lists
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else tuple(value))
        _check_names("task_types", self.task_types, TASK_TYPES)
        _check_names("room_kinds", self.room_kinds, ROOM_KINDS)
        least = max(len(ROOMS[kind].required) for kind in self.room_kinds) + 1
        _check_range("receptacles", self.receptacles, least, 40)
        _check_range("things", self.things, 2, 99)
        for name, lowest, highest in (("floor_plans", 2, 99), ("max_copies", 2, 9), ("max_steps", 1, 10_000)):
            value = getattr(self, name)
            if not isinstance(value, int) or not lowest <= value <= highest:
                raise ValueError(f"expected {name} between {lowest} and {highest}, got {value!r}")
        for task_type in self.task_types:
            fitting = [kind for kind in ROOM_KINDS if task_type in ROOMS[kind].task_types]
            if not set(fitting) & set(self.room_kinds):
                raise ValueError(
                    f"expected a room kind in which {task_type} makes sense, got {list(self.room_kinds)}; "
                    f"add one of {fitting} or drop the task type"
                )

    def to_json(self) -> dict[str, Any]:
        """Returns the settings as a JSON mapping."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


def _check_names(field: str, names: tuple[str, ...], known: tuple[str, ...]) -> None:
    if not names or len(set(names)) < len(names) or not set(names) <= set(known):
        raise ValueError(f"expected {field} to be distinct names of {list(known)}, got {list(names)}")


def _check_range(field: str, bounds: tuple[int, int] | None, lowest: int, highest: int) -> None:
    if bounds is None:
        return
    if len(bounds) != 2 or not all(isinstance(b, int) for b in bounds) or not lowest <= bounds[0] <= bounds[1]:
        raise ValueError(f"expected {field} to be (least, most) with {lowest} <= least <= most, got {list(bounds)}")
    if bounds[1] > highest:
        raise ValueError(f"expected at most {highest} {field}, got {bounds[1]}")


TINY = GeneratorConfig(receptacles=(4, 6), things=(3, 6), max_copies=2, max_steps=15)
"""Rooms so small that a policy of a million parameters learns on two CPU cores."""
