"""Tool calls in a model's own words: how they are written into a prompt, and read from a response.

The chat template decides the format. Hermes (Qwen, SmolLM): `<tool_call>{"name": …, "arguments": {…}}</tool_call>`.
Llama 3: a JSON object with `name` and `parameters`, all of the response. A template without tools: the system message
describes Hermes' format, and calls and results are texts of messages. What cannot be parsed stays text.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from aem_jax.files import valid_json

ToolFormat = Literal["hermes", "llama3", "plain"]

_CALL = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)
_PYTHON_TAG = "<|python_tag|>"
_MARKERS: Mapping[ToolFormat, tuple[str, ...]] = {
    "hermes": ("<tool_call>",),
    "plain": ("<tool_call>",),
    "llama3": ("{", _PYTHON_TAG),
}


@dataclass(frozen=True)
class ToolCall:
    """A call.

    Attributes:
        id: of the call, unique in its episode.
        name: of the function.
        arguments: a JSON text.
    """

    id: str
    name: str
    arguments: str

    def as_json(self) -> dict[str, Any]:
        """The call in OpenAI's form."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


def tool_format(template: str) -> ToolFormat:
    """The format of a chat template."""
    if "tools" not in template:
        return "plain"
    if "<tool_call>" in template:
        return "hermes"
    return "llama3" if "parameters" in template and "ipython" in template else "plain"


def calls_begin(text: str, format: ToolFormat) -> int:
    """The index from which a text, perhaps incomplete, may be tool calls; its length if none begins in it."""
    if format == "llama3":
        start = len(text) - len(text.lstrip())
        rest = text[start:]
        may_begin = any(rest.startswith(marker) or marker.startswith(rest) for marker in _MARKERS[format])
        return 0 if may_begin else len(text)
    (marker,) = _MARKERS[format]
    if (found := text.find(marker)) >= 0:
        return found
    partial = max((n for n in range(1, len(marker)) if text.endswith(marker[:n])), default=0)
    return len(text) - partial


def parse_calls(text: str, format: ToolFormat, prefix: str) -> tuple[str, list[ToolCall], bool]:
    """Reads the tool calls of a response.

    Args:
        text: of the response.
        format: of the model.
        prefix: of the calls' ids.

    Returns:
        The text beside the calls, the calls, and whether all that looked like a call is one. If it is not, all of the
        response is text.
    """
    if format == "llama3":
        body = text.strip().removeprefix(_PYTHON_TAG).strip()
        if not body.startswith("{"):
            return text, [], True
        calls = [_call(part, f"{prefix}{index}") for index, part in enumerate(_objects(body))]
        content = ""
    else:
        found = [match[1] for match in _CALL.finditer(text)]
        if not found:
            return text, [], True
        calls = [_call(part, f"{prefix}{index}") for index, part in enumerate(map(_object, found))]
        content = text[: text.index("<tool_call>")].strip()
    complete = [call for call in calls if call is not None]
    return (content, complete, True) if complete and len(complete) == len(calls) else (text, [], False)


def _object(text: str) -> Any:
    try:
        return valid_json(json.loads(text))
    except (ValueError, RecursionError):
        return None


def _objects(text: str) -> list[Any]:
    """The JSON values of a text that are separated by `;` or white space; [None] if it is anything else."""
    decoder, values, at = json.JSONDecoder(), [], 0
    while at < len(text):
        try:
            value, at = decoder.raw_decode(text, at)
            values.append(valid_json(value))
        except (ValueError, RecursionError):
            return [None]
        while at < len(text) and (text[at].isspace() or text[at] == ";"):
            at += 1
    return values


def _call(value: Any, identity: str) -> ToolCall | None:
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    if not isinstance(arguments, Mapping):
        return None
    return ToolCall(identity, value["name"], json.dumps(arguments, ensure_ascii=False))


def as_template_expects(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]], format: ToolFormat
) -> tuple[Sequence[Mapping[str, Any]], Sequence[Mapping[str, Any]]]:
    """Messages and tools for a chat template; for one without tools, both as texts of messages."""
    if format != "plain":
        return messages, tools
    plain: list[Mapping[str, Any]] = []
    for message in messages:
        content = message["content"]
        if message["role"] == "tool":
            plain.append({"role": "user", "content": f"<tool_response>\n{content}\n</tool_response>"})
        elif calls := message.get("tool_calls"):
            texts = [f"<tool_call>\n{json.dumps(_plain(call), ensure_ascii=False)}\n</tool_call>" for call in calls]
            plain.append({"role": "assistant", "content": "\n".join([content, *texts] if content else texts)})
        else:
            plain.append({"role": message["role"], "content": content})
    if tools:
        first = plain.pop(0)["content"] if plain and plain[0]["role"] == "system" else ""
        described = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
        text = (
            f"You may call these functions:\n<tools>\n{described}\n</tools>\n"
            "For each call, write a JSON object with the name and the arguments of the function:\n<tool_call>\n"
            '{"name": "…", "arguments": {…}}\n</tool_call>'
        )
        plain.insert(0, {"role": "system", "content": f"{first}\n\n{text}" if first else text})
    return plain, ()


def _plain(call: Mapping[str, Any]) -> dict[str, Any]:
    return {"name": call["function"]["name"], "arguments": call["function"]["arguments"]}
