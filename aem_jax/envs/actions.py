"""The format of responses in our environments: `<action>…</action>`, and thoughts in `<think>…</think>` before it."""

import re

_ACTION = re.compile(r"<action>(.*?)</action>", re.DOTALL)


def extract_action(text: str) -> str | None:
    """Returns the command in the last `<action>…</action>` of a response, stripped; None if there is none.

    The last one counts, because the reasoning in a response may quote other actions first.
    """
    actions = _ACTION.findall(text)
    return actions[-1].strip() if actions else None


def has_thought(text: str) -> bool:
    """Returns whether a response contains `<think>` and, behind it, `</think>`."""
    return "</think>" in text.partition("<think>")[2]


def as_action(command: str) -> str:
    """Returns a response that contains only the command."""
    return f"<action>{command}</action>"


def as_thought(thought: str, command: str) -> str:
    """Returns a response that contains a thought and the command.

    They stand on two lines, as chat models write them. Without the line break, byte-pair tokenizers join `><`, and
    `<action>` has other tokens than in the prompt.
    """
    return f"<think>{thought}</think>\n{as_action(command)}"
