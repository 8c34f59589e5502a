"""Reads a policy's response for the call of a tool, in the form that this field's agents write:

    <function=execute_bash>
    <parameter=command>
    ls -la
    </parameter>
    </function>

One call a response; the last, because a response that thinks aloud may quote calls before it makes one. What stands
before the last `</think>` is not looked at.
"""

from collections.abc import Mapping
from dataclasses import dataclass

_FUNCTION, _PARAMETER, _END_FUNCTION, _END_PARAMETER = "<function=", "<parameter=", "</function>", "</parameter>"
_LONGEST_NAME = 64

EXAMPLE = "<function=execute_bash>\n<parameter=command>\nls\n</parameter>\n</function>"


@dataclass(frozen=True)
class Call:
    """One call of a tool.

    Attributes:
        name: of the tool.
        parameters: name -> value, without the line breaks next to its tags.
        others: how many further calls the response held, none of which counts.
    """

    name: str
    parameters: Mapping[str, str]
    others: int = 0


class CallError(ValueError):
    """The response holds no call that can be understood; says so to the policy."""


def find_call(text: str) -> Call:
    """The last whole call of a response.

    A value ends at the first `</parameter>` that another parameter, `</function>` or the end of the text follows, so
    values may hold such tags themselves. `</function>` may be missing at the very end, where generation stops at it.

    Args:
        text: the policy's whole response.

    Raises:
        CallError: it holds none.
    """
    text = text.rpartition("</think>")[2]
    reader = _Reader(text)
    calls: list[Call] = []
    problem = f"expected a call of a tool, got none; write it like this:\n{EXAMPLE}"
    while reader.find_function():
        try:
            calls.append(reader.call())
        except CallError as error:
            problem = str(error)  # and on from where it went wrong, so that no text is read over and over
    if not calls:
        raise CallError(problem)
    return Call(calls[-1].name, calls[-1].parameters, len(calls) - 1)


class _Reader:
    """Reads a text once, from `at` on."""

    def __init__(self, text: str):
        self.text, self.at = text, 0
        self._no_value_ends_after = len(text)

    def find_function(self) -> bool:
        """Goes on to the next tag of a function, if there is one."""
        found = self.text.find(_FUNCTION, self.at)
        self.at = found if found >= 0 else len(self.text)
        return found >= 0

    def call(self) -> Call:
        """The call that starts here."""
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
                found = self.text[self.at : self.at + 40]
                raise CallError(f"expected <parameter=...> or </function> in the call of {name!r}, got {found!r}")
            parameter = self._name(_PARAMETER)
            start, end = self.at, self._end_of_value()
            if end < 0:
                raise CallError(f"expected </parameter> after the parameter {parameter!r} of {name!r}, got none")
            if parameter in parameters:
                raise CallError(f"expected each parameter of {name!r} once, got {parameter!r} twice")
            parameters[parameter] = self.text[start:end].removeprefix("\n").removesuffix("\n")

    def _name(self, tag: str) -> str:
        """The name in the opening tag that starts here."""
        start = self.at + len(tag)
        end = self.text.find(">", start, start + _LONGEST_NAME)
        name = self.text[start:end].strip() if end >= 0 else ""
        if not name.replace("-", "_").replace(".", "_").isidentifier():
            found = self.text[self.at : start + 20]
            self.at = start
            raise CallError(f"expected {tag}name>, got {found!r}")
        self.at = end + 1
        return name

    def _end_of_value(self) -> int:
        """Where the value that starts here ends, or -1; goes on behind its closing tag."""
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
