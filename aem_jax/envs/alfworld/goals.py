"""Goals that are parsed from task sentences, and the order in which a search visits receptacles."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from aem_jax.envs.alfworld.generator.catalog import OPENABLE, SENTENCES, THINGS, TREATMENTS

_SENTENCES = tuple(
    (task_type, template.format(obj=r"(?P<target>\w+)", recep=r"(?P<place>\w+)"))
    for task_type, templates in SENTENCES.items()
    for template in templates
)

PLACES = {name.lower(): frozenset(place.lower() for place in thing.places) for name, thing in THINGS.items()}
"""Object class -> receptacle classes that usually contain such objects, in lower case."""
_CLOSED = frozenset(name.lower() for name in OPENABLE)


@dataclass(frozen=True)
class Goal:
    """The goal of a task.

    Attributes:
        task_type: one of the six task types.
        target: class of the target objects, in lower case.
        place: class of the receptacle that the targets must end in; for the light task, class of the lamp.
        treatment: "clean", "heat", "cool" or "".
        station: class of the receptacle that gives the treatment, or "".
    """

    task_type: str
    target: str
    place: str
    treatment: str = ""
    station: str = ""

    @property
    def light(self) -> bool:
        """Whether the task is to look at the target under a lamp."""
        return self.task_type == "look_at_obj_in_light"

    @property
    def count(self) -> int:
        """Number of targets that must end at the place."""
        return 2 if self.task_type == "pick_two_obj_and_place" else 1


def parse_goal(text: str) -> Goal:
    """Parses the goal from a game's first observation.

    Raises:
        ValueError: the text contains no task sentence of the six types.
    """
    task = re.search(r"Your task is to: (.+?)\.?\s*$", text, re.MULTILINE)
    sentence = task[1] if task else text.strip()
    for task_type, pattern in _SENTENCES:
        match = re.fullmatch(pattern, sentence.strip())
        if match:
            treatment, station = TREATMENTS.get(task_type, ("", ""))
            return Goal(task_type, match["target"], match["place"], treatment, station.lower())
    raise ValueError(
        f"expected a task in the words of ALFWorld's templates ('put a mug in shelf', …), got {sentence[:120]!r}"
    )


def class_of(name: str) -> str:
    """`cabinet 12` -> `cabinet`."""
    return name.rsplit(" ", 1)[0]


def number_of(name: str) -> int:
    """`cabinet 12` -> 12."""
    return int(name.rsplit(" ", 1)[1])


def search_order(
    wanted: str, receptacles: Iterable[str], *, unlikely: str = "", taste: Mapping[str, float] | None = None
) -> list[str]:
    """Sorts receptacles in the order in which a sensible person looks for `wanted`.

    Places that usually contain such objects come first. Among them, receptacles that cannot be closed come first. Class
    and number decide ties. For an unknown class of objects, every place is equally likely.

    Args:
        wanted: object class in lower case.
        receptacles: names such as `cabinet 12`.
        unlikely: a receptacle class to visit late: an object to bring to the sofa is probably not on the sofa.
        taste: receptacle class -> rank among equally good classes; alphabetical order if not given.
    """
    likely = PLACES.get(wanted)

    def rank(name: str) -> tuple[bool, bool, bool, float, str, int]:
        kind = class_of(name)
        improbable = likely is not None and kind not in likely
        return improbable, kind == unlikely, kind in _CLOSED, (taste or {}).get(kind, 0.0), kind, number_of(name)

    return sorted(receptacles, key=rank)
