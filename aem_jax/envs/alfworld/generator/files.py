"""A household game in ALFWorld's format: PDDL problem, domain and grammar."""

from collections import Counter
from functools import lru_cache
from pathlib import Path
from typing import Any

from aem_jax.envs.alfworld.generator.catalog import OPENABLE, THINGS
from aem_jax.envs.alfworld.generator.games import HouseholdGame

_DOMAIN_TYPES = ("SinkBasin", "Microwave", "Fridge"), ("Knife", "ButterKnife")
"""Receptacle and object classes in the actions of the domain. They must exist in every problem."""

_FLAGS = {
    "clean": "cleanable", "heat": "heatable", "cool": "coolable",
    "slice": "sliceable", "light": "toggleable", "hollow": "isReceptacleObject",
}  # fmt: skip

_HAVE = "(objectType ?o {obj}Type) (receptacleType ?r {recep}Type) (inReceptacle ?o ?r)"
_GOALS = {
    "pick_and_place_simple": "(exists (?r - receptacle ?o - object) (and " + _HAVE + "))",
    "look_at_obj_in_light": (
        "(exists (?a - agent ?o - object ?t - object ?r - receptacle ?l - location) (and "
        "(objectType ?o {obj}Type) (holds ?a ?o) (objectType ?t {recep}Type) (toggleable ?t) (isToggled ?t) "
        "(inReceptacle ?t ?r) (receptacleAtLocation ?r ?l) (atLocation ?a ?l)))"
    ),
    "pick_clean_then_place_in_recep": "(exists (?r - receptacle ?o - object) (and (isClean ?o) " + _HAVE + "))",
    "pick_heat_then_place_in_recep": "(exists (?r - receptacle ?o - object) (and (isHot ?o) " + _HAVE + "))",
    "pick_cool_then_place_in_recep": "(exists (?r - receptacle ?o - object) (and (isCool ?o) " + _HAVE + "))",
    "pick_two_obj_and_place": (
        "(exists (?r - receptacle ?o - object ?p - object) (and "
        "(not (= ?o ?p)) (objectType ?p {obj}Type) (inReceptacle ?p ?r) " + _HAVE + "))"
    ),
}


@lru_cache(maxsize=1)
def domain_text() -> str:
    """Returns the PDDL domain, which all games share."""
    return Path(__file__).with_name("domain.pddl").read_text(encoding="utf-8")


@lru_cache(maxsize=1)
def _grammar_template() -> str:
    return Path(__file__).with_name("grammar.twl2").read_text(encoding="utf-8")


def grammar_text(game: HouseholdGame) -> str:
    """Returns the TWL2 grammar, which contains the game's task."""
    return _grammar_template().replace("@TASK@", game.sentence)


def problem_text(game: HouseholdGame) -> str:
    """Returns the PDDL problem: objects, initial facts and goal."""
    receptacles = {(name, i): _entity(name, count - i) for name, count in game.floor.receptacles for i in range(count)}
    locations = {key: f"loc_bar_{n:02d}" for n, key in enumerate(receptacles, start=1)}
    totals = Counter(name for name, _, _ in game.placements)
    left = totals.copy()
    things = []
    for name, holder, index in game.placements:
        things.append((_entity(name, left[name]), name, receptacles[holder, index]))
        left[name] -= 1
    # Names of classes and instances are distinct: only the latter contain `_bar_`.
    receptacle_types = sorted({name for name, _ in game.floor.receptacles} | set(_DOMAIN_TYPES[0]))
    object_types = sorted(set(totals) | set(_DOMAIN_TYPES[1]))

    objects = ["agent1 - agent"]
    objects += [f"{name}Type - rtype" for name in receptacle_types]
    objects += [f"{name}Type - otype" for name in object_types]
    objects += [f"{thing} - object" for thing, _, _ in things]
    objects += [f"{receptacle} - receptacle" for receptacle in receptacles.values()]
    objects += [f"{location} - location" for location in ("loc_bar_00", *locations.values())]

    init = ["atLocation agent1 loc_bar_00"]
    init += [f"receptacleType {receptacle} {key[0]}Type" for key, receptacle in receptacles.items()]
    init += [f"openable {receptacle}" for key, receptacle in receptacles.items() if key[0] in OPENABLE]
    init += [f"receptacleAtLocation {receptacle} {locations[key]}" for key, receptacle in receptacles.items()]
    init += [f"canContain {r}Type {o}Type" for r, _ in game.floor.receptacles for o in totals if r in THINGS[o].places]
    for thing, name, receptacle in things:
        init += [f"objectType {thing} {name}Type", f"inReceptacle {thing} {receptacle}"]
        init += [f"pickupable {thing}"] if THINGS[name].movable else []
        init += [f"{_FLAGS[affordance]} {thing}" for affordance in sorted(THINGS[name].affordances)]
    goal = _GOALS[game.task_type].format(obj=game.target, recep=game.destination)
    return "\n".join(
        ["(define (problem household)", "(:domain alfred)", "(:objects", *objects, ")", "(:init"]
        + [f"({fact})" for fact in init]
        + [")", f"(:goal (and {goal}))", ")", ""]
    )


def game_data(game: HouseholdGame) -> dict[str, Any]:
    """Returns the content of the game's `game.tw-pddl`."""
    return {
        "pddl_domain": domain_text(),
        "grammar": grammar_text(game),
        "pddl_problem": problem_text(game),
        "solvable": True,
        "walkthrough": None,
    }


def _entity(name: str, number: int) -> str:
    """Returns the PDDL name of an instance. The engine numbers instances from the last id, so callers count down."""
    if name in ("SinkBasin", "BathtubBasin"):  # in ALFWorld, the end of the id distinguishes a basin from its sink
        return f"{name.removesuffix('Basin')}_bar_{number:02d}_bar_{name}"
    return f"{name}_bar_{number:02d}"
