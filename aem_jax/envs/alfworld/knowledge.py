"""An agent's knowledge of a room, and its two sources: the text of the game, and the engine's facts."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from aem_jax.envs.alfworld.goals import Goal, class_of, number_of


@dataclass
class Knowledge:
    """Knowledge of a room.

    Attributes:
        receptacles: all receptacle names.
        contents: receptacle -> objects known to be in or on it; receptacles whose content is unknown are missing.
        closed: receptacles known to be closed.
        here: the receptacle that the agent stands at, if any.
        held: the object in the agent's hand, if any.
        treated: objects that have received the goal's treatment.
        refused: commands that had no effect.
        taste: receptacle class -> rank among equally good places to search.
    """

    receptacles: list[str] = field(default_factory=list)
    contents: dict[str, list[str]] = field(default_factory=dict)
    closed: set[str] = field(default_factory=set)
    here: str | None = None
    held: str | None = None
    treated: set[str] = field(default_factory=set)
    refused: set[str] = field(default_factory=set)
    taste: dict[str, float] = field(default_factory=dict)

    def places_of(self, wanted: str) -> list[tuple[str, str]]:
        """Returns (object, receptacle) of every known object of a class."""
        return [(o, r) for r, objects in self.contents.items() for o in objects if class_of(o) == wanted]


def names_in(text: str) -> list[str]:
    """Extracts the objects that a text lists: `a mug 1, and a cup 2` -> [`mug 1`, `cup 2`]."""
    return re.findall(r"\ba (\w+ \d+)", text)


def read_answer(observation: str, command: str, goal: Goal, known: Knowledge) -> None:
    """Updates the knowledge from an observation. Both grammars use the same sentences here."""
    if arrived := re.match(r"You arrive at (.+?)\.", observation):  # older games name the place `loc 12`
        known.here = command.removeprefix("go to ") if command.startswith("go to ") else arrived[1]
    for place in re.findall(r"The (\w+ \d+) is closed\.", observation):
        known.closed.add(place)
    for place, things in re.findall(r"On the (\w+ \d+), you see (.*?)\.", observation):
        known.contents[place] = names_in(things)
    for place, things in re.findall(r"The (\w+ \d+) is open\. In it, you see (.*?)\.", observation):
        known.closed.discard(place)
        known.contents[place] = names_in(things)
    if closed := re.match(r"You close the (.+?)\.", observation):
        known.closed.add(closed[1])
    if taken := re.match(r"You pick up the (.+?) from the (.+?)\.", observation):
        known.held = taken[1]
        if taken[1] in known.contents.get(taken[2], ()):
            known.contents[taken[2]].remove(taken[1])
    if put := re.match(r"You (?:put|move) the (.+?) (?:in/on|to) the (.+?)\.", observation):
        known.held = None
        known.contents.setdefault(put[2], []).append(put[1])
    if treated := re.match(r"You (clean|heat|cool) the (.+?) using the (.+?)\.", observation):
        if treated[1] == goal.treatment:
            known.treated.add(treated[2])
        elif {treated[1], goal.treatment} == {"heat", "cool"}:  # each undoes the other
            known.treated.discard(treated[2])


def known_from_facts(goal: Goal, facts: Iterable[tuple[str, Sequence[str]]]) -> Knowledge:
    """Builds complete knowledge of a room from pairs (predicate, names of its arguments) in lower case."""
    known = Knowledge()
    openable, opened, agent_at = set(), set(), ""
    standing: dict[str, str] = {}
    kinds: dict[str, str] = {}
    fits: set[tuple[str, str]] = set()
    treated = {"clean": "isclean", "heat": "ishot", "cool": "iscool"}.get(goal.treatment)
    for predicate, arguments in facts:
        match predicate, arguments:
            case "receptacleatlocation", (place, location):
                standing[place] = location
            case "atlocation", (_, location):
                agent_at = location
            case "inreceptacle", (thing, place):
                known.contents.setdefault(place, []).append(thing)
            case "openable", (place,):
                openable.add(place)
            case "opened", (place,):
                opened.add(place)
            case "holds", (_, thing):
                known.held = thing
            case "objecttype" | "receptacletype", (name, kind):
                kinds[name] = kind
            case "cancontain", (place_kind, thing_kind):
                fits.add((place_kind, thing_kind))
            case (name, (thing,)) if name == treated:
                known.treated.add(thing)
    known.receptacles = sorted(standing, key=lambda name: (class_of(name), number_of(name)))
    known.contents = {place: sorted(known.contents.get(place, [])) for place in known.receptacles}
    known.closed = openable - opened
    unfit = [p for p in known.receptacles if (kinds.get(p), kinds.get(known.held or "")) not in fits]
    known.refused = {f"move {known.held} to {place}" for place in unfit}
    known.here = next((place for place in known.receptacles if standing[place] == agent_at), None)
    return known
