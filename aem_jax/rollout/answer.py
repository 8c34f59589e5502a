"""What came of a call to an environment, as the process that made it tells the others."""

import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from aem_jax.distributed import ProcessGroup
from aem_jax.rollout.episode import Episode
from aem_jax.trajectory import Ending


@dataclass(frozen=True)
class Answer:
    """What an environment said to an episode, and what follows from it: all that is needed to go on.

    Attributes:
        error: why the call failed; None where it did not, and of a call that failed nothing else is set.
        lost: whether it failed with its server.
        retry: whether a failed one may do better from its task again.
        reward: what the response earned.
        valid_action: whether the environment understood it.
        won: whether the task is solved.
        score: the task's own score.
        response: text of the response that was answered.
        observation: text of what was heard.
        ending: how the episode ended; None while it goes on.
        keep: leading ids of the slot that stay.
        ids: what the model hears next, behind those.
    """

    error: str | None = None
    lost: bool = False
    retry: bool = True
    reward: float = 0.0
    valid_action: bool = True
    won: bool = False
    score: float = 0.0
    response: str = ""
    observation: str = ""
    ending: Ending | None = None
    keep: int = 0
    ids: Sequence[int] = ()


def exchange(hosts: ProcessGroup, own: Mapping[int, Answer], cohort: Sequence[Episode | None]) -> Mapping[int, Answer]:
    """The answers to all slots of a cohort, from those to each process's own. Collective.

    Everything that a rollout decides follows from these answers and from what the devices said, which is the same
    everywhere: so all processes go on with the same calls.

    Raises:
        RuntimeError: the processes do not hold the same cohort; they would no longer make the same calls.
    """
    if hosts.count == 1:
        return own
    said = hosts.gather_json({"cohort": _checksum(cohort), "answers": {slot: _plain(a) for slot, a in own.items()}})
    for process, each in enumerate(said):
        if each["cohort"] != said[0]["cohort"]:
            raise RuntimeError(
                f"process {process} and process 0 no longer play the same episodes; have all the same code, packages "
                "and devices?"
            )
    return {int(slot): _answer(plain) for each in said for slot, plain in each["answers"].items()}


def _plain(answer: Answer) -> dict[str, Any]:
    return {**vars(answer), "ending": answer.ending and answer.ending.value}


def _answer(plain: dict[str, Any]) -> Answer:
    return Answer(**{**plain, "ending": plain["ending"] and Ending(plain["ending"])})


def _checksum(cohort: Iterable[Episode | None]) -> int:
    """Of who sits where, and what each has said."""
    total = 0
    for episode in cohort:
        place = (-1,) if episode is None else (episode.group, episode.member, episode.retries, len(episode.ids))
        total = zlib.crc32(repr(place).encode(), total)
        for part in () if episode is None else episode.said[0]:
            total = zlib.crc32(part.tobytes(), total)
    return total
