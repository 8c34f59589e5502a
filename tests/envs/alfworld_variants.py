"""Game data with other wordings and other PDDL, so that the engine cannot depend on one release."""

import re
from collections.abc import Mapping
from typing import Any

_REPLACED = {
    "pddl_domain": (
        ("(?a - agent ?lStart - location ?lEnd - location ?r - receptacle)", "(?a - agent ?lStart ?lEnd - location)"),
        (
            "(receptacleAtLocation ?r ?lEnd)\n                    ;(exists",
            "(exists (?r - receptacle) (receptacleAtLocation ?r ?lEnd))\n                    ;(exists",
        ),
    ),
    "grammar": (
        ("move {o} to {r}", "put {o} in/on {r}"),
        ("You move the {o.name} to the {r.name}.", "You put the {o.name} in/on the {r.name}."),
        (
            "You arrive at {r.name}. #examineReceptacle.feedback#",
            "You arrive at {lend.name}. "
            "{#examineReceptacle.feedback# | receptacleatlocation(r:receptacle, lend:location)}",
        ),
    ),
}


def first_release(data: dict[str, Any]) -> dict[str, Any]:
    """The same game in the form of older files: `put X in/on Y`, `You arrive at loc 12`, "go to" takes places.

    The first two receptacles are moved to one place, so that a command can name both.
    """
    data = dict(data)
    for key, pairs in _REPLACED.items():
        for old, new in pairs:
            if old not in data[key]:
                raise ValueError(f"expected {old!r} in {key}, got none")
            data[key] = data[key].replace(old, new)
    kept, merged = sorted(set(re.findall(r"\(receptacleAtLocation \w+ (\w+)\)", data["pddl_problem"])))[:2]
    facts = data["pddl_problem"].index("(:init")
    data["pddl_problem"] = data["pddl_problem"][:facts] + data["pddl_problem"][facts:].replace(merged + ")", kept + ")")
    return data


def with_shared_locations(problem: str, shared: Mapping[str, int]) -> str:
    """The same problem, in which up to `shared[kind]` receptacles of a kind are at the location of one of them."""
    places = re.findall(r"\(receptacleAtLocation (\S+) (\S+)\)", problem)
    for kind, count in shared.items():
        same = [(name, location) for name, location in places if name.startswith(f"{kind}_bar_")]
        for first in range(0, len(same), count):
            for name, location in same[first + 1 : first + count]:
                old, new = (f"(receptacleAtLocation {name} {at})" for at in (location, same[first][1]))
                problem = problem.replace(old, new)
    return problem
