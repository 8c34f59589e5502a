"""The format of responses in our environments: `<action>…</action>`, and thoughts in `<think>…</think>` before it."""

_OPEN, _CLOSE = "<action>", "</action>"


def extract_action(text: str) -> str | None:
    """Returns the command in the last `<action>…</action>` of a response, stripped; None if there is none.

    The last one counts, because the reasoning in a response may quote other actions first.
    """
    command, end = None, 0
    # A regular expression would search the rest of the text for `</action>` from each `<action>`.
    while (start := text.find(_OPEN, end)) >= 0 and (close := text.find(_CLOSE, start)) >= 0:
        command, end = text[start + len(_OPEN) : close], close + len(_CLOSE)
    return None if command is None else command.strip()


def has_thought(text: str) -> bool:
    """Returns whether a response contains `<think>` and, behind it, `</think>`."""
    return "</think>" in text.partition("<think>")[2]


def as_action(command: str) -> str:
    """Returns a response that contains only the command."""
    return f"{_OPEN}{command}{_CLOSE}"


def as_thought(thought: str, command: str) -> str:
    """Returns a response that contains a thought and the command.

    They stand on two lines, as chat models write them. Without the line break, byte-pair tokenizers join `><`, and
    `<action>` has other tokens than in the prompt.
    """
    return f"<think>{thought}</think>\n{as_action(command)}"
