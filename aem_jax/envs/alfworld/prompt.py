"""The prompt of an ALFWorld episode in one message."""

from aem_jax.envs.prompt import Situation, compose

ROLE = "You act in a household by text commands."
_TASK = "Your task is to: "


def prompt(situation: Situation) -> str:
    """Composes the prompt. As in verl-agent, the command `help` is not listed.

    The task is the end of the first observation. A game of another grammar may state no task; then it is all of it.
    """
    task = situation.first.partition(_TASK)[2] or situation.first
    return compose(ROLE, task.strip(), situation, [action for action in situation.admissible if action != "help"])
