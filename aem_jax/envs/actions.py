"""The action format of our environments: `<action>…</action>` inside a response."""

import re

_ACTION = re.compile(r"<action>(.*?)</action>", re.DOTALL)


def extract_action(text: str) -> str | None:
    """Returns the command in the last `<action>…</action>` of a response, stripped; None if there is none.

    The last one counts, because the reasoning in a response may quote other actions first.
    """
    actions = _ACTION.findall(text)
    return actions[-1].strip() if actions else None


def as_action(command: str) -> str:
    """Returns a response that contains only the command."""
    return f"<action>{command}</action>"


def as_thought(thought: str, command: str) -> str:
    """Returns a response that contains a thought and the command.

    They stand on two lines, as chat models write them. Without the line break, byte-pair tokenizers join `><`, and
    `<action>` has other tokens than in the prompt.
    """
    return f"<think>{thought}</think>\n{as_action(command)}"
