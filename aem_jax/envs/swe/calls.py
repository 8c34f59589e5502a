"""Parses the tool call in a policy's response, in the format that is usual for software-engineering agents:

    <function=execute_bash>
    <parameter=command>
    ls -la
    </parameter>
    </function>

A response makes one call. The last one counts, because a response that reasons in text may quote calls before it makes
one. Text before the last `</think>` is ignored.
"""

from collections.abc import Mapping
from dataclasses import dataclass

_FUNCTION, _PARAMETER, _END_FUNCTION, _END_PARAMETER = "<function=", "<parameter=", "</function>", "</parameter>"
_LONGEST_NAME = 64

EXAMPLE = "<function=execute_bash>\n<parameter=command>\nls\n</parameter>\n</function>"


@dataclass(frozen=True)
class Call:
    """One tool call.

    Attributes:
        name: name of the tool.
        parameters: name -> value, without the line breaks next to its tags.
        others: number of earlier calls in the response, which are ignored.
    """

    name: str
    parameters: Mapping[str, str]
    others: int = 0


class CallError(ValueError):
    """The response contains no valid call; the message is shown to the policy."""


def find_call(text: str) -> Call:
    """Returns the last complete call of a response.

    A value ends at the first `</parameter>` that is followed by another parameter, by `</function>` or by the end of
    the text, so values may contain such tags themselves. `</function>` may be missing at the very end, because
    generation stops at it.

    Args:
        text: the policy's complete response.

    Raises:
        CallError: the response contains no valid call.
    """
    text = text.rpartition("</think>")[2]
    reader = _Reader(text)
    calls: list[Call] = []
    problem = f"expected a call of a tool, got none; write it like this:\n{EXAMPLE}"
    while reader.find_function():
        try:
            calls.append(reader.call())
        except CallError as error:
            problem = str(error)  # the search continues after the error, so no text is read twice
    if not calls:
        raise CallError(problem)
    return Call(calls[-1].name, calls[-1].parameters, len(calls) - 1)


class _Reader:
    """Parses a text in one pass; `at` is the current position."""

    def __init__(self, text: str):
        self.text, self.at = text, 0
        self._no_value_ends_after = len(text)

    def find_function(self) -> bool:
        """Moves to the next `<function=` tag; False if there is none."""
        start = self.text.find(_FUNCTION, self.at)
        self.at = start if start >= 0 else len(self.text)
        return start >= 0

    def call(self) -> Call:
        """Parses the call at the current position."""
        name = self._name(_FUNCTION)
        parameters: dict[str, str] = {}
        while True:
            self._skip_space()
            if self.at == len(self.text):
                return Call(name, parameters)
            if self.text.startswith(_END_FUNCTION, self.at):
                self.at += len(_END_FUNCTION)
                return Call(name, parameters)
            if not self.text.startswith(_PARAMETER, self.at):
                text = self.text[self.at : self.at + 40]
                raise CallError(f"expected <parameter=...> or </function> in the call of {name!r}, got {text!r}")
            parameter = self._name(_PARAMETER)
            start, end = self.at, self._end_of_value()
            if end < 0:
                raise CallError(f"expected </parameter> after the parameter {parameter!r} of {name!r}, got none")
            if parameter in parameters:
                raise CallError(f"expected each parameter of {name!r} once, got {parameter!r} twice")
            parameters[parameter] = self.text[start:end].removeprefix("\n").removesuffix("\n")

    def _name(self, tag: str) -> str:
        """Parses the name in the opening tag at the current position."""
        start = self.at + len(tag)
        end = self.text.find(">", start, start + _LONGEST_NAME)
        name = self.text[start:end].strip() if end >= 0 else ""
        if not name.replace("-", "_").replace(".", "_").isidentifier():
            text = self.text[self.at : start + 20]
            self.at = start
            raise CallError(f"expected {tag}name>, got {text!r}")
        self.at = end + 1
        return name

    def _end_of_value(self) -> int:
        """Returns the end of the value at the current position, or -1, and moves past its closing tag."""
        end = -1 if self.at >= self._no_value_ends_after else self.text.find(_END_PARAMETER, self.at)
        start = self.at
        while end >= 0:
            self.at = end + len(_END_PARAMETER)
            self._skip_space()
            if self.at == len(self.text) or self.text.startswith((_PARAMETER, _END_FUNCTION), self.at):
                return end
            end = self.text.find(_END_PARAMETER, end + 1)
        self.at = start
        self._no_value_ends_after = min(self._no_value_ends_after, start)
        return -1

    def _skip_space(self) -> None:
        while self.at < len(self.text) and self.text[self.at].isspace():
            self.at += 1
