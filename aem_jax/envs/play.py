"""An episode played by a function of text: scripted experts, random baselines, a person at a keyboard."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from aem_jax.envs.protocol import Environment, StepResult, checked_result

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
    """
    result = checked_result(env, "reset", env.reset(task))
    exchanges: list[Exchange] = []
    while len(exchanges) < max_turns and not (result.terminated or result.truncated):
        response = act(result)
        observation, result = result.observation, checked_result(env, "step", env.step(response))
        exchanges.append(Exchange(observation, response, result))
    return tuple(exchanges)
