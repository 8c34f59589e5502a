"""Thoughts of an expert in a household, before a command: its task, what it knows, and why it gives the command.

A thought has one or two remarks and the step. All are drawn, and say only what the knowledge holds.
"""

import random
import re

from aem_jax.envs.alfworld.experts import candidates, destination
from aem_jax.envs.alfworld.generator.catalog import OPENABLE
from aem_jax.envs.alfworld.goals import PLACES, Goal, class_of
from aem_jax.envs.alfworld.knowledge import Knowledge
from aem_jax.envs.thoughts import NUMBERS, Grammar, a, listed, think, thoughts_of

WORDS = (12, 28)
"""Range of a thought's number of words."""

_REMEMBERED = 3
_STATES = {"clean": "clean", "heat": "hot", "cool": "cool"}
_IN = frozenset(name.lower() for name in OPENABLE)

REMARKS: Grammar = {
    "task": (
        "{duty} {aim}.",
        "{first_duty}: {aim}.",
        "{aim}, that is {what_for}.",
    ),
    "hand": (
        "{empty}my hands are empty.",
        "{empty}I hold nothing.",
        "{empty}I carry nothing right now.",
        "{empty}nothing is in my hands.",
        "{right}I hold {held}.",
        "{right}I have {held} in my hand.",
        "{right}{held} is in my hand.",
        "{right}I am carrying {held}.",
        "{right}I have got {held}.",
        "{wrong}I hold {held}, which is not {a_target}.",
        "{wrong}I am carrying {held}, but I need {a_target}.",
    ),
    "view": (
        "{start}I am in the middle of the room.",
        "{start}I have just started.",
        "{start}I stand in the room and look around.",
        "{bare}{here} is empty.",
        "{bare}there is nothing {at_here}.",
        "{bare}{here} holds nothing at all.",
        "{at_here} I see {seen}.",
        "{at_here} there is {seen}.",
        "I see {seen} {at_here}.",
        "{here} has {seen}.",
        "{absent}there is no {wanted} {at_here}.",
        "{absent}no {wanted} {at_here}.",
        "{absent}{here} does not have {a_wanted}.",
        "{shut}{here} is closed.",
        "{shut}I stand before {here}, which is closed.",
        "{shut}I cannot see inside {here}.",
    ),
    "past": (
        "I have already checked {looked}.",
        "I have looked at {looked} without success.",
        "{looked} did not have {a_wanted}.",
        "I found no {wanted} at {looked}.",
        "so far I have seen {looked}, but no {wanted} there.",
        "{missing}I have checked {number} places and {a_wanted} is still missing.",
        "{missing}after {number} places I still have not found {a_wanted}.",
        "{missing}I still need to find {a_wanted}.",
        "{missing}I do not know yet where {a_wanted} is.",
        "{missing}{unseen} places are left where {a_wanted} could be.",
    ),
    "progress": (
        "{one} is already {at_one}, so one more {target} is needed.",
        "one {target} is done: {one} is {at_one}.",
        "half of the task is done with {one} {at_one}.",
        "{untreated}{held} still has to be {state}.",
        "{untreated}I have not made {held} {state} yet.",
        "{untreated}{held} is not ready, it must be {state} first.",
        "{treated}{held} is {state} now.",
        "{treated}I have made {held} {state}.",
        "{treated}{held} is {state}, so only its place is missing.",
        "{lit}now I only need {a_place} for {held}.",
        "{lit}{held} needs the light of {a_place}.",
    ),
}
"""Topic -> remarks about the task and the room."""

STEPS: Grammar = {
    # A careless expert takes the steps `search` and `stray`. All steps that lead somewhere share words with them.
    "search": (
        "{need}, so {go}.",
        "{may}, so {go_there}.",
        "{may}. {go_there}.",
        "{go}, because {may}.",
        "{go}. {may}.",
        "{go}: {may}.",
        "{likely}{dest} is a likely place for {a_wanted}. {go_there}.",
        "{likely}{a_such} is often kept {at_kind}, so {go}.",
        "{likely}{go}, since {a_such} is often found {at_kind}.",
    ),
    "stray": (
        "{hunch}, so {go_there}.",
        "{hunch}. {go_there}.",
        "{go}, because {hunch}.",
        "{go} with {held}.",
        "{need}, so {go}.",
        "{need}. {go}.",
        "{go}, because {need}.",
    ),
    "fetch": (
        "{guess}, so {go_there}.",
        "{guess}. {go_there}.",
        "{need}, so {go}.",
        "{need}. {go}.",
        "{go}, because {need}.",
        "{where}, so {go_there}.",
        "{where}. {go_there}.",
        "{go}, because {where}.",
        "{go} to get {thing}.",
    ),
    "open_search": (
        "{inside}, so I open it.",
        "{inside}. let me open it.",
        "I will open {dest}, because {inside}.",
        "let me open {dest} to look for {a_wanted}.",
        "to see what is inside, I open {dest}.",
        "first {dest} has to be opened, then I can look inside.",
        "now I open {dest} and see if {a_wanted} is there.",
    ),
    "open_use": (
        "{closed_now}, so I open it.",
        "{closed_now}. let me open it first.",
        "I will open {dest}, because it is closed.",
        "before anything else I must open {dest}.",
        "I open {dest} first, then I can go on.",
    ),
    "take": (
        "{here_it_is}, so I take it from {dest}.",
        "{here_it_is}. I will take it from {dest}.",
        "I take {thing} from {dest}, it is what I need.",
        "let me pick up {thing} from {dest}.",
        "I can take {thing} from {dest} now.",
        "{dest} has {thing}, just what I want. I take it.",
        "{thing} {at_dest} is the {target} that I need. let me take it.",
    ),
    "carry": (
        "{guess}, so {go_there}.",
        "{guess}. {go_there}.",
        "{need}, so {go}.",
        "{need}. {go}.",
        "{go}, because {need}.",
        "{go} with {held}.",
        "{dest} can {treatment} {held}, so {go_there}.",
        "{go} to {treatment} {held}.",
        "{dest} is the place to {treatment} {held}. {go_there}.",
    ),
    "treat": (
        "{dest} is here, so I {treatment} {thing} with it.",
        "now I can {treatment} {thing} with {dest}.",
        "let me {treatment} {thing} with {dest}.",
        "I am at {dest} and {treatment} {thing} now.",
        "{thing} has to be {state}, and {dest} can do that.",
        "with {dest} I {treatment} {thing}, as the task demands.",
    ),
    "bring": (
        "{guess}, so {go_there}.",
        "{guess}. {go_there}.",
        "{need}, so {go}.",
        "{need}. {go}.",
        "{go}, because {need}.",
        "{go} with {held}.",
        "{dest} is {a_place}, so {go_there} with {held}.",
        "{go} to put {held} there.",
        "{dest} is where {held} should be. {go_there}.",
    ),
    "put": (
        "this is {dest}, so I put {thing} here.",
        "I put {thing} {at_dest} now.",
        "let me put {thing} {at_dest}.",
        "{dest} is {a_place}, the right place for {thing}. I leave it here.",
        "{thing} belongs here, {at_dest}. I put it down.",
        "now {thing} can go to {dest}.",
        "{refused}moving {thing} to {dest} had no effect, so I try to put it in other words.",
    ),
    "to_lamp": (
        "{guess}, so {go_there}.",
        "{guess}. {go_there}.",
        "{need}, so {go}.",
        "{need}. {go}.",
        "{go}, because {need}.",
        "{where}, so {go_there}.",
        "{where}. {go_there}.",
        "{go}, because {where}.",
        "{go} to use {thing}.",
    ),
    "use": (
        "{thing} is here, so I turn it on.",
        "now I use {thing} to look at {held}.",
        "let me switch on {thing} for {held}.",
        "I turn on {thing} and look at {held}.",
        "with {thing} I can see {held} in the light.",
        "here is {thing}, and {held} needs its light. I use it.",
    ),
    "away_go": (
        "I want to leave {held} somewhere. {go}.",
        "{go} to put {held} away.",
        "{held} is in the way, so {go}.",
        "{go}, where I can put down {held}.",
    ),
    "away": (
        "{held} is of no use, so I put it down {at_dest}.",
        "I leave {held} {at_dest} to have my hands free.",
        "let me put {held} {at_dest} and go on.",
        "{refused}moving {held} to {dest} had no effect, so I try to put it in other words.",
    ),
    "look": (
        "I do not know where to go, so I look around the room once more.",
        "nothing is left to try for the {target}, so let me look around.",
    ),
}
"""Step of the task -> sentences that lead to its command. They name all objects and places of the command."""

PHRASES: Grammar = {
    "duty": ("I have to", "I need to", "my task is to", "I was asked to", "the goal is to", "in the end I must"),
    "first_duty": ("the task", "my task", "remember the goal", "what I am asked for", "the goal"),
    "what_for": ("what I am here for", "the goal", "my task", "what I have to do", "what counts"),
    "aim": (
        "{simple}put {a_target} {at_a_place}",
        "{simple}bring {a_target} to {a_place}",
        "{two}put one {target} and then another {at_a_place}",
        "{two}bring {a_target} and a second one to {a_place}",
        "{light}look at {a_target} under {a_place}",
        "{light}hold {a_target} in the light of {a_place}",
        "{treating}{treatment} {a_target} and put it {at_a_place}",
        "{treating}bring {a_state} {target} to {a_place}",
    ),
    "go": (
        "I will go to {dest}",
        "let me go to {dest}",
        "I go to {dest} now",
        "I should go to {dest} next",
        "next I walk to {dest}",
        "I will try {dest}",
        "{dest} is my next stop",
        "the next step is {dest}",
    ),
    "go_there": ("I will go there", "let me go there", "that is my next stop", "I go there now", "I will try it next"),
    "may": (
        "{a_wanted} may be {at_dest}",
        "perhaps {a_wanted} is {at_dest}",
        "{a_wanted} could well be {at_dest}",
        "maybe {dest} has {a_wanted}",
        "I want to know what is {at_dest}",
        "I have not seen yet what is {at_dest}",
        "{guess}",
    ),
    "hunch": (
        "{guess}",
        "{new}I want to know what is {at_dest}",
        "{new}I have not seen yet what is {at_dest}",
        "{old}I may have missed something {at_dest}",
        "{old}I want to look at {dest} again",
        "I take {held} along to {dest}",
        "maybe {dest} is of use for {held}",
    ),
    "need": (
        "{a_wanted} is what I need",
        "I am after {a_wanted}",
        "{untreated}first {held} has to be {state}",
        "{untreated}I still have to {treatment} {held}",
        "{settled}now {held} needs its place",
        "{settled}{held} has to get to {a_place}",
        "{lit}{held} needs some light",
    ),
    "guess": (
        "{dest} looks like a good choice now",
        "my guess is {dest}",
        "I have a feeling about {dest}",
        "{dest} may help with the {target}",
        "it seems right to try {dest}",
    ),
    "where": (
        "{thing} is {at_dest}",
        "I know that {thing} is {at_dest}",
        "{dest} has {thing}",
        "I saw {thing} {at_dest}",
        "I remember {thing} {at_dest}",
    ),
    "inside": (
        "{a_wanted} may be inside {dest}",
        "{dest} could hide {a_wanted}",
        "I want to look inside {dest}",
        "perhaps {dest} holds {a_wanted}",
        "I cannot rule out {dest} while it is closed",
    ),
    "closed_now": ("{dest} is closed", "{dest} has to be open", "I cannot use {dest} while it is closed"),
    "here_it_is": (
        "{thing} is what I need",
        "there is {thing}",
        "here I see {thing}",
        "{thing} is right here",
        "I have found {thing}",
    ),
}
"""Parts of remarks and steps."""

_GRAMMAR = thoughts_of(REMARKS, STEPS, PHRASES)


def thought(goal: Goal, known: Knowledge, command: str, rng: random.Random) -> str:
    """Draws the thought of an expert that is about to give a command.

    Args:
        goal: the task.
        known: the expert's knowledge before the command.
        command: the command, in either grammar.
        rng: source of the wording.

    Raises:
        ValueError: no expert gives such a command.
    """
    step, command_facts = _read_command(goal, known, command)
    facts = {**_goal_facts(goal), **_known_facts(goal, known), **command_facts}
    return think(f"think_{step}", facts, _GRAMMAR, rng, WORDS)


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
