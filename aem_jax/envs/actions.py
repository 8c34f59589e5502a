"""How our environments are told what to do: `<action>…</action>` inside a response."""

import re

_ACTION = re.compile(r"<action>(.*?)</action>", re.DOTALL)


def extract_action(text: str) -> str | None:
    """The command inside the last `<action>…</action>` of a response, stripped; None without one.

    The last, because a response that thinks aloud may quote actions before it takes one.
    """
    found = _ACTION.findall(text)
    return found[-1].strip() if found else None


def as_action(command: str) -> str:
    """A response that is nothing but the command."""
    return f"<action>{command}</action>"
