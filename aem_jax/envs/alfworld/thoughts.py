"""Thoughts of an expert in a household, before a command: its task, what it knows, and why it gives the command.

A thought has one or two remarks and the step. All are drawn, and say only what the knowledge holds.
"""

import random
import re

from aem_jax.envs.alfworld.experts import candidates, destination
from aem_jax.envs.alfworld.generator.catalog import OPENABLE
from aem_jax.envs.alfworld.goals import PLACES, Goal, class_of
from aem_jax.envs.alfworld.knowledge import Knowledge
from aem_jax.envs.alfworld.phrasings import PHRASES, REMARKS, STEPS
from aem_jax.envs.thoughts import NUMBERS, a, listed, think, thoughts_of

WORDS = (12, 28)
"""Range of a thought's number of words."""

_REMEMBERED = 3
"""Number of places, and of objects, that a remark lists at most."""
_STATES = {"clean": "clean", "heat": "hot", "cool": "cool"}
_IN = frozenset(name.lower() for name in OPENABLE)

_GRAMMAR = thoughts_of(REMARKS, STEPS, PHRASES)


def thought(goal: Goal, known: Knowledge, command: str, rng: random.Random, on_round: bool = False) -> str:
    """Draws the thought of an expert that is about to give a command.

    Args:
        goal: the task.
        known: the expert's knowledge before the command.
        command: the command, in either grammar.
        rng: source of the wording.
        on_round: whether the command goes to the next place of the room's list out of habit.

    Raises:
        ValueError: no expert gives such a command.
    """
    step, command_facts = _read_command(goal, known, command)
    facts = {**_goal_facts(goal), **_known_facts(goal, known), **command_facts}
    return think("think_round" if on_round else f"think_{step}", facts, _GRAMMAR, rng, WORDS)


def _goal_facts(goal: Goal) -> dict[str, str]:
    facts = {"target": goal.target, "a_target": a(goal.target)}
    facts |= {"place": goal.place, "a_place": a(goal.place), "at_a_place": _at(a(goal.place))}
    if goal.treatment:
        state = _STATES[goal.treatment]
        facts |= {"treatment": goal.treatment, "state": state, "a_state": a(state), "a_station": a(goal.station)}
    kinds = {"light": goal.light, "two": goal.count == 2, "treating": bool(goal.treatment)}
    return facts | _conditions(**kinds, simple=not any(kinds.values()))


def _known_facts(goal: Goal, known: Knowledge) -> dict[str, str]:
    held, here = known.held, known.here
    right = held is not None and class_of(held) == goal.target
    facts = _conditions(
        empty=held is None,
        right=right,
        wrong=held is not None and not right,
        untreated=right and bool(goal.treatment) and held not in known.treated,
        treated=right and held in known.treated,
        lit=right and goal.light,
        settled=right and not goal.light and (not goal.treatment or held in known.treated),
        start=here is None,
    )
    if held:
        facts["held"] = held
    if here:
        things = known.contents.get(here)
        facts |= {"here": here, "at_here": _at(here)}
        facts |= _conditions(bare=things == [], shut=things is None and here in known.closed)
        if things:
            facts["seen"] = listed(things if len(things) <= _REMEMBERED else [*things[:_REMEMBERED], "other things"])
    if goal.count == 2 and (done := _delivered(goal, known)):
        facts |= {"one": done[0], "at_one": _at(done[1])}
    if wanted := _wanted(goal, known):
        facts |= _search_facts(wanted, goal, known) | {"a_wanted": f"another {wanted}" if "one" in facts else a(wanted)}
    return facts


def _search_facts(wanted: str, goal: Goal, known: Knowledge) -> dict[str, str]:
    """Facts about the search for a class of objects."""
    here, contents = known.here, known.contents
    facts = {"wanted": wanted, "a_such": a(wanted)} | _conditions(
        missing=not _found(wanted, goal, known),
        absent=here in contents and wanted not in map(class_of, contents[here]),
    )
    in_vain = [place for place in contents if place != here and wanted not in map(class_of, contents[place])]
    if in_vain:
        facts["looked"] = listed(in_vain[-_REMEMBERED:])
    counts = {"number": len(contents), "unseen": sum(place not in contents for place in known.receptacles)}
    return facts | {name: NUMBERS[count] for name, count in counts.items() if 2 <= count < len(NUMBERS)}


def _wanted(goal: Goal, known: Knowledge) -> str | None:
    """Returns the class of objects that the expert needs next."""
    if known.held is None:
        return goal.target
    return goal.place if goal.light and class_of(known.held) == goal.target else None


def _found(wanted: str, goal: Goal, known: Knowledge) -> list[tuple[str, str]]:
    return candidates(goal, known) if wanted == goal.target else known.places_of(wanted)


def _delivered(goal: Goal, known: Knowledge) -> tuple[str, str] | None:
    """Returns a target that is at its destination, and the destination."""
    place = destination(goal, known)
    return next(((thing, place) for thing in known.contents.get(place, ()) if class_of(thing) == goal.target), None)


def _read_command(goal: Goal, known: Knowledge, command: str) -> tuple[str, dict[str, str]]:
    """Returns the step of the task that a command takes, and the facts about the command.

    Raises:
        ValueError: no expert gives such a command.
    """
    wanted = _wanted(goal, known)
    if command == "look":
        return "look", {}
    if go := re.fullmatch(r"go to (.+)", command):
        return _read_going(goal, known, go[1])
    if examined := re.fullmatch(r"examine (.+)", command):
        return "examine", {"dest": examined[1]}
    if opened := re.fullmatch(r"open (.+)", command):
        step = "open_search" if wanted and not _found(wanted, goal, known) else "open_use"
        return step, {"dest": opened[1]}
    if used := re.fullmatch(r"use (.+)", command):
        return "use", {"thing": used[1]}
    if pair := re.fullmatch(r"(take|move|put|clean|heat|cool) (.+) (?:from|to|in/on|with) (.+)", command):
        verb, thing, place = pair.groups()
        facts = {"thing": thing, "dest": place, "at_dest": _at(place)}
        facts |= _conditions(refused=verb == "put" and f"move {thing} to {place}" in known.refused)
        put = "put" if class_of(thing) == goal.target else "away"
        return {"take": "take", "move": put, "put": put}.get(verb, "treat"), facts
    raise ValueError(f"expected a command of an ALFWorld expert, got {command!r}")


def _read_going(goal: Goal, known: Knowledge, place: str) -> tuple[str, dict[str, str]]:
    wanted, kind, held = _wanted(goal, known), class_of(place), known.held
    seen = place in known.contents
    facts = {"dest": place, "at_dest": _at(place), "at_kind": _at(a(kind))} | _conditions(new=not seen, old=seen)
    if wanted:
        here = [thing for thing, where in _found(wanted, goal, known) if where == place]
        if here:
            return "to_lamp" if held else "fetch", facts | {"thing": here[0]}
        return "stray" if seen else "search", facts | _conditions(likely=kind in PLACES.get(wanted, ()))
    if held and class_of(held) != goal.target:
        return "away_go", facts
    if goal.treatment and held not in known.treated:
        return "carry" if kind == goal.station else "stray", facts
    fits = kind == goal.place and (goal.count == 1 or not _delivered(goal, known) or place == destination(goal, known))
    return "bring" if fits else "stray", facts


def _at(place: str) -> str:
    """`cabinet 1` -> `in cabinet 1`, as in the game's own sentences."""
    return f"{'in' if re.sub('^an? ', '', place).split()[0] in _IN else 'on'} {place}"


def _conditions(**holds: bool) -> dict[str, str]:
    return {name: "" for name, true in holds.items() if true}
