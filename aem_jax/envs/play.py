"""Episodes played by a function of text: a scripted expert, a random baseline, or a person."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from aem_jax.envs.protocol import EnvError, Environment, StepResult, Task, describe, over_at_reset
from aem_jax.envs.serving.plain import checked_result

log = logging.getLogger(__name__)

Act = Callable[[StepResult], str]
"""Agent function: the environment's latest result -> the text of the response."""


@dataclass(frozen=True)
class Exchange:
    """One observation, the response to it, and the result of the step."""

    observation: str
    response: str
    result: StepResult


def play(env: Environment, task: Mapping[str, Any], act: Act, max_turns: int) -> tuple[Exchange, ...]:
    """Plays one episode to its end, or for at most `max_turns` turns.

    Args:
        env: the environment.
        task: the task's payload.
        act: the agent. If it has state, make a new one for each episode.
        max_turns: number of turns after which the episode is abandoned.

    Returns:
        The exchanges in order. The result of the last one contains how the episode ended.

    Raises:
        ValueError: the environment returned an object that is not a `StepResult`.
        EnvError: the reset ended the episode.
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


Outcome = TypeVar("Outcome")


def play_each(tasks: Iterable[Task], play_one: Callable[[Task], Outcome]) -> Iterator[tuple[Task, Outcome | None]]:
    """Plays tasks in order. A task that breaks its environment has the outcome None and a line in the log.

    Args:
        tasks: tasks to play.
        play_one: plays one task. Any exception, including an exit, affects only this task.

    Raises:
        EnvError: all tasks failed; the message contains the first error.
    """
    first, some = None, False
    for task in tasks:
        try:
            outcome = play_one(task)
        except (Exception, SystemExit) as error:
            reason = " ".join((str(error) if isinstance(error, EnvError) else describe(error)).split())
            log.warning("task %s is left out: %s", task.id, reason)
            first = first or f"every task broke its environment, {task.id} first: {reason}"
            yield task, None
        else:
            some = True
            yield task, outcome
    if first and not some:
        raise EnvError(first)
