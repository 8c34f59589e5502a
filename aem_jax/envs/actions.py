"""The action format of our environments: `<action>…</action>` inside a response."""

import re

_ACTION = re.compile(r"<action>(.*?)</action>", re.DOTALL)


def extract_action(text: str) -> str | None:
    """The command inside the last `<action>…</action>` of a response, stripped; None without one.

    The last, because a response that thinks aloud may quote actions before it takes one.
    """
    actions = _ACTION.findall(text)
    return actions[-1].strip() if actions else None


def as_action(command: str) -> str:
    """A response that holds the command alone."""
    return f"<action>{command}</action>"
