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
    calls: list[Call] = []
    problem = f"expected a call of a tool, got none; write it like this:\n{EXAMPLE}"
    at = text.find(_FUNCTION)
    while at >= 0:
        try:
            call, end = _read_call(text, at)
            calls.append(call)
        except CallError as error:
            problem, end = str(error), at + len(_FUNCTION)
        at = text.find(_FUNCTION, end)
    if not calls:
        raise CallError(problem)
    return Call(calls[-1].name, calls[-1].parameters, len(calls) - 1)


def _read_call(text: str, at: int) -> tuple[Call, int]:
    """The call that starts at `at`, and where it ends."""
    name, at = _read_name(text, at + len(_FUNCTION), "function")
    parameters: dict[str, str] = {}
    while True:
        at = _skip_space(text, at)
        if text.startswith(_END_FUNCTION, at):
            return Call(name, parameters), at + len(_END_FUNCTION)
        if at == len(text):
            return Call(name, parameters), at
        if not text.startswith(_PARAMETER, at):
            raise CallError(
                f"expected <parameter=...> or </function> in the call of {name!r}, got {text[at : at + 40]!r}"
            )
        parameter, start = _read_name(text, at + len(_PARAMETER), "parameter")
        if parameter in parameters:
            raise CallError(f"expected each parameter of {name!r} once, got {parameter!r} twice")
        end = _end_of_value(text, start)
        if end < 0:
            raise CallError(f"expected </parameter> after the parameter {parameter!r} of {name!r}, got none")
        parameters[parameter] = text[start:end].removeprefix("\n").removesuffix("\n")
        at = end + len(_END_PARAMETER)


def _read_name(text: str, start: int, what: str) -> tuple[str, int]:
    end = text.find(">", start, start + _LONGEST_NAME)
    name = text[start:end].strip() if end >= 0 else ""
    if not name or not name.replace("-", "_").replace(".", "_").isidentifier():
        raise CallError(f"expected <{what}=name>, got {text[start - len(what) - 2 : start + 20]!r}")
    return name, end + 1


def _end_of_value(text: str, start: int) -> int:
    end = text.find(_END_PARAMETER, start)
    while end >= 0:
        after = _skip_space(text, end + len(_END_PARAMETER))
        if after == len(text) or text.startswith((_PARAMETER, _END_FUNCTION), after):
            return end
        end = text.find(_END_PARAMETER, end + 1)
    return -1


def _skip_space(text: str, at: int) -> int:
    while at < len(text) and text[at].isspace():
        at += 1
    return at
