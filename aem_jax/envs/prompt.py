"""Prompts that an environment composes: one message with the task, the last turns and the admissible actions.

Parts and order are those of verl-agent's prompts for ALFWorld and WebShop (github.com/langfengQ/verl-agent,
`agent_system/environments`), the stack in which the paper's results on them were measured. The words are our own.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from aem_jax.envs.actions import extract_action

UNTAGGED_CHARACTERS = 30
"""Length of what the history shows of a response without an action; verl-agent shows as much in ALFWorld (20 in
WebShop)."""


class Situation(NamedTuple):
    """An episode before a response, as far as its prompt shows it.

    Attributes:
        first: the first observation.
        past: observation and response of the last turns, oldest first; empty at the first step.
        step: number of the response that follows, from 1.
        observation: the current observation.
        admissible: the actions that are possible now.
    """

    first: str
    past: Sequence[tuple[str, str]]
    step: int
    observation: str
    admissible: Sequence[str]


Prompt = Callable[[Situation], str]
"""Composes the user message of a prompt."""


def compose(
    role: str, task: str, situation: Situation, actions: Iterable[str], show: Callable[[str], str] = str.strip
) -> str:
    """Returns the message: task, number of steps, last turns, current observation, actions, and the form of a response.

    Args:
        role: who the agent is; a sentence.
        task: the task.
        situation: the episode.
        actions: the actions to list.
        show: observation -> its text in the prompt.
    """
    step, past = situation.step, situation.past
    before = []
    if step > 1:
        taken = f"Steps taken so far: {step - 1}."
        turns = [
            f"Observation {number}: {show(observation)}\nAction {number}: {recorded_action(response)}"
            for number, (observation, response) in enumerate(past, start=step - len(past))
        ]
        before = ["\n".join([f"{taken} The latest of them:" if past else taken, *turns])]
    parts = [
        f"{role}\nYour task: {task}",
        *before,
        f"Now, at step {step}, you observe: {show(situation.observation)}",
        "\n".join(["Your admissible actions:", *actions]),
        "First reason about the situation step by step, between <think> and </think>. "
        "Then choose one admissible action and write it between <action> and </action>.",
    ]
    return "\n\n".join(parts)


def recorded_action(response: str) -> str:
    """Returns a response as the history shows it, in one line: its action without its thoughts, or else its end."""
    action = extract_action(response)
    if action is None:
        return " ".join(response.split())[-UNTAGGED_CHARACTERS:]
    return " ".join(action.split())
