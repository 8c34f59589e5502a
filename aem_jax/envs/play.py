"""Episodes played by a function of text: scripted experts, random baselines, a person at a keyboard."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from aem_jax.envs.protocol import EnvError, Environment, StepResult, checked_result, describe, over_at_reset

log = logging.getLogger(__name__)

Act = Callable[[StepResult], str]
"""What the environment said last -> the response's text."""


@dataclass(frozen=True)
class Exchange:
    """One observation, the response to it, and what the environment made of it."""

    observation: str
    response: str
    result: StepResult


def play(env: Environment, task: Mapping[str, Any], act: Act, max_turns: int) -> tuple[Exchange, ...]:
    """Plays one episode to its end, or for at most `max_turns`.

    Args:
        env: the environment.
        task: the task's payload.
        act: answers an observation; made anew for each episode if it remembers.
        max_turns: turns after which the episode is left.

    Returns:
        The exchanges in order; the last one's result says how the episode ended.

    Raises:
        ValueError: the environment answered with something else than a `StepResult`.
        EnvError: its reset has ended the episode.
    """
    result = checked_result(env, "reset", env.reset(task))
    if result.done:
        raise EnvError(over_at_reset(result))
    exchanges: list[Exchange] = []
    while len(exchanges) < max_turns and not result.done:
        response = act(result)
        observation, result = result.observation, checked_result(env, "step", env.step(response))
        exchanges.append(Exchange(observation, response, result))
    return tuple(exchanges)


class _Named(Protocol):
    @property
    def id(self) -> str: ...


Item = TypeVar("Item", bound=_Named)
Outcome = TypeVar("Outcome")


def play_each(tasks: Iterable[Item], play_one: Callable[[Item], Outcome]) -> Iterator[tuple[Item, Outcome | None]]:
    """What came of each task; None, and a line in the log, where its environment broke. Others lose nothing by it.

    Args:
        tasks: what is played, in order.
        play_one: plays one; whatever it raises, an exit included, is that task's.

    Raises:
        EnvError: all tasks broke; with the first one's error.
    """
    first, some = None, False
    for task in tasks:
        try:
            outcome = play_one(task)
        except (Exception, SystemExit) as error:
            said = str(error) if isinstance(error, EnvError) else describe(error)
            said = " ".join(said.split())
            log.warning("task %s is left out: %s", task.id, said)
            first = first or f"every task broke its environment, {task.id} first: {said}"
            yield task, None
        else:
            some = True
            yield task, outcome
    if first and not some:
        raise EnvError(first)
