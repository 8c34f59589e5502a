"""Scripted experts: one decision rule with two sources of knowledge.

`decide` computes the next command for a goal from the knowledge of the room. The `Oracle` takes this knowledge from the
engine's facts. Its success proves that a game can be solved, and it is an upper bound for every agent. The `Searcher`
uses only the text that the game has shown so far. It searches receptacles in a sensible order and remembers their
contents. A policy can learn from its demonstrations, because the policy reads the same text.
"""

import random
from collections.abc import Sequence
from typing import Any

from aem_jax.envs.alfworld.goals import Goal, class_of, number_of, parse_goal, search_order
from aem_jax.envs.alfworld.knowledge import Knowledge, known_from_facts, names_in, read_answer


def decide(goal: Goal, known: Knowledge) -> str | None:
    """Returns the next command towards `goal`, in the newer grammar (`move … to …`); None if nothing is left to try.

    Args:
        goal: the task.
        known: the knowledge of the room. If something is missing, the command continues the search.
    """
    if known.held is not None and class_of(known.held) != goal.target:
        return _put_away(known.held, known)
    if known.held is None:
        return _fetch(goal, known)
    if goal.light:
        lamps = known.places_of(goal.place)
        if not lamps:
            return _look_for(goal.place, known, goal)
        lamp, place = min(lamps, key=lambda item: item[1] != known.here)
        return f"use {lamp}" if known.here == place else f"go to {place}"
    if goal.treatment and known.held not in known.treated:
        station = _nearest(goal.station, known)
        return f"{goal.treatment} {known.held} with {station}" if known.here == station else f"go to {station}"
    return _put(known.held, destination(goal, known), known)


def candidates(goal: Goal, known: Knowledge) -> list[tuple[str, str]]:
    """Returns (object, receptacle) of every known target that is still to be fetched."""
    final = None if goal.light else destination(goal, known)
    return [
        (thing, place)
        for thing, place in known.places_of(goal.target)
        # An object that is already at its destination stays there, unless it still needs its treatment.
        if place != final or (goal.treatment and thing not in known.treated)
    ]


def _fetch(goal: Goal, known: Knowledge) -> str | None:
    found = candidates(goal, known)
    if not found:
        return _look_for(goal.target, known, goal)
    thing, place = min(found, key=lambda item: (item[1] != known.here, item[1] in known.closed))
    return _reach(place, known) or f"take {thing} from {place}"


def _look_for(wanted: str, known: Knowledge, goal: Goal) -> str | None:
    if known.here in known.receptacles and known.here not in known.contents:
        return f"{'open' if known.here in known.closed else 'examine'} {known.here}"
    unseen = [r for r in known.receptacles if r not in known.contents]
    unlikely = "" if goal.treatment else goal.place
    order = search_order(wanted, unseen, unlikely=unlikely, taste=known.taste)
    return f"go to {order[0]}" if order else None


def _put_away(thing: str, known: Knowledge) -> str | None:
    """Puts down an object that is not a target: here if it fits, else where such objects usually are."""
    places = search_order(class_of(thing), known.receptacles)
    for place in ([known.here] if known.here else []) + places:
        if f"move {thing} to {place}" not in known.refused:
            return _put(thing, place, known)
    return None


def _put(thing: str, place: str, known: Knowledge) -> str:
    return _reach(place, known) or f"move {thing} to {place}"


def _reach(place: str, known: Knowledge) -> str | None:
    if known.here != place:
        return f"go to {place}"
    return f"open {place}" if place in known.closed else None


def destination(goal: Goal, known: Knowledge) -> str:
    """Returns the receptacle to fill: the one with the most targets, because two targets must end in the same one."""
    options = [r for r in known.receptacles if class_of(r) == goal.place]
    if not options:
        raise ValueError(f"expected a {goal.place} in the room, got {known.receptacles}")

    def lacks(place: str) -> tuple[int, bool, int]:
        targets = sum(class_of(o) == goal.target for o in known.contents.get(place, ()))
        return -min(targets, goal.count - 1), place != known.here, number_of(place)

    return min(options, key=lacks)


def _nearest(kind: str, known: Knowledge) -> str:
    options = [r for r in known.receptacles if class_of(r) == kind]
    if not options:
        raise ValueError(f"expected a {kind} in the room, got {known.receptacles}")
    return min(options, key=lambda place: (place != known.here, number_of(place)))


def next_on_round(known: Knowledge) -> str:
    """Returns the receptacle after this one in the room's list; the first one at the start, and after the last."""
    places = known.receptacles
    return places[0] if known.here is None else places[(places.index(known.here) + 1) % len(places)]


class Oracle:
    """An expert that reads the engine's facts, so it has the position of every object.

    Args:
        task: the game's first observation, or any text that contains the task sentence.
    """

    def __init__(self, task: str):
        self.goal = parse_goal(task)

    def act(self, player: Any) -> str:
        """Returns the next command in the game that `player` plays.

        Args:
            player: a started game, with `facts` and `admissible`.
        """
        known = known_from_facts(self.goal, player.facts)
        command = decide(self.goal, known)
        if command and command.startswith("go to ") and command not in player.admissible:
            known.here = command.removeprefix("go to ")  # at the same location as `here`, so within reach already
            command = decide(self.goal, known)
        if command is None:
            raise ValueError(f"expected a {self.goal.target} in the game, found none in its facts")
        return in_grammar(command, player.admissible)


class Searcher:
    """An expert that uses only the text: the list of receptacles, the task, and every observation since.

    Args:
        seed: seed of the order among equally good places to search; None: alphabetical order.
    """

    def __init__(self, seed: int | None = None):
        self._seed = seed
        self._goal: Goal | None = None
        self.known = Knowledge()
        """The knowledge of the room so far."""
        self._last = ""
        self._newer_grammar = True

    def act(self, observation: str, admissible: Sequence[str] = ()) -> str:
        """Reads an observation and returns the next command. The first observation must contain the task.

        Args:
            observation: text of the environment.
            admissible: admissible commands, if they are available. They decide the grammar of the `move` command.
        """
        self.observe(observation)
        return self.command(admissible)

    def observe(self, observation: str, command: str | None = None) -> None:
        """Reads an observation. `command` is the command before it, if this expert did not choose that command."""
        self._last = command or self._last
        if "Your task is to:" in observation:
            self._begin(observation)
        elif observation.strip() == "Nothing happens.":
            self._refuse()
        else:
            read_answer(observation, self._last, self.goal, self.known)

    def command(self, admissible: Sequence[str] = ()) -> str:
        """Returns the next command, based on all observations so far."""
        goal = self.goal
        command = decide(goal, self.known)
        if command is None:  # the object was missed or has moved: search every receptacle again
            self.known.contents.clear()
            self.known.refused.clear()
            command = decide(goal, self.known) or "look"
        self._last = in_grammar(command, admissible, self._newer_grammar)
        return self._last

    def _begin(self, observation: str) -> None:
        self._goal = parse_goal(observation)
        room = observation.split("you see", 1)[-1].split("Your task is to:")[0]
        rng = random.Random(f"searcher/{self._seed}")
        receptacles = names_in(room)
        kinds = sorted({class_of(name) for name in receptacles}) if self._seed is not None else []
        self.known = Knowledge(receptacles, taste={kind: rng.random() for kind in kinds})
        self._last = ""

    def _refuse(self) -> None:
        self.known.refused.add(self._last)
        if self._last.startswith("move "):
            self._newer_grammar = False  # older games use `put … in/on …`
        elif self._last.startswith("put "):
            thing, place = self._last.removeprefix("put ").split(" in/on ", 1)
            self.known.refused.add(f"move {thing} to {place}")
        elif self._last.startswith(("take ", "use ")) and self.known.here:
            self.known.contents.pop(self.known.here, None)
        elif self._last.startswith("go to ") and self._last.removeprefix("go to ") in self.known.receptacles:
            # The official games have receptacles that share a location. There, all of them are within reach.
            self.known.here = self._last.removeprefix("go to ")

    @property
    def goal(self) -> Goal:
        """The task, from the first observation."""
        if self._goal is None:
            raise ValueError("expected the first observation to hold the task ('Your task is to: …'); observe it first")
        return self._goal


def in_grammar(command: str, admissible: Sequence[str] = (), newer: bool = True) -> str:
    """Translates `command` to the grammar of the current game: `move X to Y`, or `put X in/on Y` in older games.

    Args:
        command: a command of the newer grammar.
        admissible: admissible commands. If they contain one of the two forms, that form is used.
        newer: whether to use the newer form otherwise.
    """
    if not command.startswith("move "):
        return command
    thing, place = command.removeprefix("move ").split(" to ", 1)
    older = f"put {thing} in/on {place}"
    if command in admissible:
        return command
    return older if older in admissible or not newer else command
