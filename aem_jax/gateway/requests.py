"""OpenAI's chat-completions API as data: requests with their checks, responses, chunks of a stream, and errors.

What the API offers and training cannot serve is refused, not ignored: the learner must see the distribution that was
sampled. Pure functions; `server.py` serves them.
"""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from aem_jax.envs.serving.plain import number
from aem_jax.gateway.tool_calls import ToolCall

_ROLES = ("system", "developer", "user", "assistant", "tool")
_WITHOUT_EFFECT = (
    *("model", "user", "metadata", "store", "seed", "service_tier", "safety_identifier"),
    *("prompt_cache_key", "prompt_cache_retention", "stream_options", "reasoning_effort", "verbosity"),
)
"""Fields without an effect on what is sampled here. An episode's own key replaces `seed`."""


class ApiError(Exception):
    """A refused request, in the form of OpenAI's errors.

    Attributes:
        status: HTTP status.
        code: OpenAI's error code.
        param: the field that is refused, if it is one.
    """

    def __init__(self, message: str, *, status: int = 400, code: str | None = None, param: str | None = None):
        super().__init__(message)
        self.status, self.code, self.param = status, code, param

    def body(self) -> dict[str, Any]:
        """The JSON body."""
        kinds = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True)
class SampledAs:
    """How the run samples: the only values of a request's sampling settings.

    Attributes:
        temperature: of the run.
        top_p: of the run.
        lenient: ignore other values instead of refusing them.
        option: the option that sets `lenient`.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    lenient: bool = False
    option: str = "--harness.lenient True"


@dataclass(frozen=True)
class ChatRequest:
    """A checked request.

    Attributes:
        messages: role and content (a text) of each, with tool calls and their ids where there are any. Arguments of a
            tool call are a mapping if they are a JSON mapping.
        tools: definitions of functions.
        max_tokens: most tokens of the response; 0: the run's limit.
        stop: texts that end the response and are no part of it.
        stream: whether the response is sent in chunks.
        stream_usage: whether the last chunk counts tokens.
        logprobs: whether log-probabilities of the sampled tokens are sent.
        ignored: settings that were ignored because of `SampledAs.lenient`.
    """

    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    max_tokens: int = 0
    stop: tuple[str, ...] = ()
    stream: bool = False
    stream_usage: bool = False
    logprobs: bool = False
    ignored: tuple[str, ...] = ()


def parse_request(body: Any, sampled: SampledAs) -> ChatRequest:
    """Checks the body of a request.

    Raises:
        ApiError: a field is missing, malformed, or asks for what is not sampled here; names it.
    """
    if not isinstance(body, Mapping):
        raise ApiError(f"expected a JSON object, got {type(body).__name__}")
    values = {name: value for name, value in body.items() if value is not None}
    ignored = []
    for name, value in values.items():
        if name in _CHECKED or name in _WITHOUT_EFFECT:
            continue
        if not sampled.lenient:
            raise ApiError(
                f"{name} is not supported, got {value!r:.80}; leave it out, or start with {sampled.option}",
                param=name,
            )
        ignored.append(name)
    for name, only in (("temperature", sampled.temperature), ("top_p", sampled.top_p)):
        value = _number(values, name, only)
        if value != only:
            if not sampled.lenient:
                raise ApiError(
                    f"{name} must be {only:g}, as the run samples, got {value:g}; leave it out, or start with "
                    f"{sampled.option}, which ignores it",
                    param=name,
                )
            ignored.append(name)
    for name, only in _FIXED.items():
        if values.get(name, only) != only:
            raise ApiError(f"{name} must be {only!r}, got {values[name]!r:.80}; leave it out", param=name)
    tools = _tools(values.get("tools", []))
    choice = values.get("tool_choice", "auto")
    if choice not in ("auto", "none"):
        if not sampled.lenient:
            raise ApiError(
                f"tool_choice must be 'auto' or 'none', got {choice!r:.80}; the policy samples freely; start with "
                f"{sampled.option}, which ignores it",
                param="tool_choice",
            )
        ignored.append("tool_choice")
    if not _flag(values, "parallel_tool_calls", default=True):
        if not sampled.lenient:
            raise ApiError(
                "parallel_tool_calls must be true, got False; the policy samples freely and may call several tools in "
                f"one response; leave it out, or start with {sampled.option}, which ignores it",
                param="parallel_tool_calls",
            )
        ignored.append("parallel_tool_calls")
    stop = values.get("stop", [])
    stop = [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list) or not all(isinstance(text, str) and text for text in stop):
        raise ApiError(f"stop must be a text or a list of texts, got {stop!r:.80}", param="stop")
    limits = [_count(values, name) for name in ("max_tokens", "max_completion_tokens") if name in values]
    stream_options = values.get("stream_options", {})
    return ChatRequest(
        messages=_messages(values.get("messages")),
        tools=() if choice == "none" else tools,
        max_tokens=min(limits, default=0),
        stop=tuple(stop),
        stream=_flag(values, "stream"),
        stream_usage=isinstance(stream_options, Mapping) and bool(stream_options.get("include_usage")),
        logprobs=_flag(values, "logprobs"),
        ignored=tuple(ignored),
    )


_FIXED: Mapping[str, Any] = {
    "n": 1,
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "logit_bias": {},
    "top_logprobs": 0,
    "response_format": {"type": "text"},
    "modalities": ["text"],
}
"""Fields with one possible value. A greedy or constrained sample would not be one of the policy's."""
_CHECKED = {
    *("messages", "temperature", "top_p", "tools", "tool_choice", "stop", "max_tokens", "max_completion_tokens"),
    *("stream", "logprobs", "parallel_tool_calls"),
    *_FIXED,
}


def _number(values: Mapping[str, Any], name: str, default: float) -> float:
    value = values.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or number(value) is None:
        raise ApiError(f"{name} must be a number, got {value!r:.80}", param=name)
    return value


def _count(values: Mapping[str, Any], name: str) -> int:
    value = values[name]
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ApiError(f"{name} must be an integer of at least 1, got {value!r:.80}", param=name)
    return value


def _flag(values: Mapping[str, Any], name: str, *, default: bool = False) -> bool:
    value = values.get(name, default)
    if not isinstance(value, bool):
        raise ApiError(f"{name} must be true or false, got {value!r:.80}", param=name)
    return value


def _tools(tools: Any) -> tuple[Mapping[str, Any], ...]:
    if not isinstance(tools, list):
        raise ApiError(f"tools must be a list, got {tools!r:.80}", param="tools")
    for index, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if not (isinstance(function, Mapping) and isinstance(function.get("name"), str) and function["name"]):
            raise ApiError(
                f"tools[{index}] must be {{'type': 'function', 'function': {{'name': …}}}}, got {tool!r:.80}",
                param=f"tools[{index}]",
            )
    return tuple(tools)


def _messages(messages: Any) -> tuple[Mapping[str, Any], ...]:
    if not isinstance(messages, list) or not messages:
        raise ApiError(f"messages must be a list of at least one message, got {messages!r:.80}", param="messages")
    return tuple(_message(message, f"messages[{index}]") for index, message in enumerate(messages))


def _message(message: Any, where: str) -> Mapping[str, Any]:
    role = message.get("role") if isinstance(message, Mapping) else None
    if role not in _ROLES:
        raise ApiError(f"{where}.role must be one of {', '.join(_ROLES)}, got {role!r:.80}", param=f"{where}.role")
    content = _text(message.get("content"), where)
    checked: dict[str, Any] = {"role": "system" if role == "developer" else role, "content": content}
    if role == "tool":
        identity = message.get("tool_call_id")
        if not isinstance(identity, str):
            raise ApiError(f"{where}.tool_call_id must be a text, got {identity!r:.80}", param=f"{where}.tool_call_id")
        checked["tool_call_id"] = identity
    if isinstance(name := message.get("name"), str):
        checked["name"] = name
    if role == "assistant" and (calls := message.get("tool_calls")):
        if not isinstance(calls, list):
            raise ApiError(f"{where}.tool_calls must be a list, got {calls!r:.80}", param=f"{where}.tool_calls")
        checked["tool_calls"] = [_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(calls)]
    return checked


def _call(call: Any, where: str) -> Mapping[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str):
        raise ApiError(f"{where}.function.name must be a text, got {name!r:.80}", param=f"{where}.function.name")
    arguments = function.get("arguments", "") if isinstance(function, Mapping) else ""
    try:
        mapping = json.loads(arguments) if isinstance(arguments, str) else arguments
    except (ValueError, RecursionError):
        mapping = None
    arguments = mapping if isinstance(mapping, Mapping) else arguments
    return {"id": call.get("id", ""), "type": "function", "function": {"name": name, "arguments": arguments}}


def _text(content: Any, where: str) -> str:
    """The text of a content: a text, a list of text parts, or nothing."""
    if content is None or isinstance(content, str):
        return content or ""
    if isinstance(content, list):
        for index, part in enumerate(content):
            if not (isinstance(part, Mapping) and isinstance(part.get("text"), str)):
                kind = part.get("type") if isinstance(part, Mapping) else part
                raise ApiError(
                    f"{where}.content[{index}] must be a text, got {kind!r:.80}; the policy reads text alone",
                    param=f"{where}.content[{index}]",
                )
        return "".join(part["text"] for part in content)
    raise ApiError(f"{where}.content must be a text or a list of texts, got {content!r:.80}", param=f"{where}.content")


@dataclass(frozen=True)
class Completion:
    """A complete response.

    Attributes:
        model: name of the policy.
        content: text beside tool calls.
        calls: its tool calls.
        finish_reason: "stop", "length" or "tool_calls".
        prompt_tokens: tokens of the prompt.
        completion_tokens: sampled tokens.
        logprobs: text and log-probability of each sampled token, if they were asked for.
    """

    model: str
    content: str
    calls: Sequence[ToolCall]
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    logprobs: Sequence[tuple[str, float]] | None = None

    @property
    def usage(self) -> dict[str, int]:
        """Numbers of tokens."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        }

    def message(self) -> dict[str, Any]:
        """The assistant's message."""
        calls = {"tool_calls": [call.as_json() for call in self.calls]} if self.calls else {}
        return {"role": "assistant", "content": None if self.calls and not self.content else self.content, **calls}

    def body(self, identity: str) -> dict[str, Any]:
        """The JSON body of a response that is not streamed; `identity`: its id."""
        choice = {
            "index": 0,
            "message": self.message(),
            "finish_reason": self.finish_reason,
            "logprobs": logprobs_json(self.logprobs),
        }
        return _envelope(identity, self.model, "chat.completion", [choice]) | {"usage": self.usage}

    def last_chunks(self, identity: str, request: ChatRequest) -> list[dict[str, Any]]:
        """The end of a stream: tool calls, the reason why it ended, and usage if it was asked for."""
        chunks = []
        if self.calls:
            calls = [{"index": index, **call.as_json()} for index, call in enumerate(self.calls)]
            chunks.append(chunk(identity, self.model, {"tool_calls": calls}))
        chunks.append(chunk(identity, self.model, {}, finish_reason=self.finish_reason))
        if request.stream_usage:
            chunks.append(_envelope(identity, self.model, "chat.completion.chunk", []) | {"usage": self.usage})
        return chunks


def chunk(
    identity: str,
    model: str,
    delta: Mapping[str, Any],
    *,
    finish_reason: str | None = None,
    logprobs: Sequence[tuple[str, float]] | None = None,
) -> dict[str, Any]:
    """One chunk of a stream."""
    choice = {"index": 0, "delta": delta, "finish_reason": finish_reason, "logprobs": logprobs_json(logprobs)}
    return _envelope(identity, model, "chat.completion.chunk", [choice])


def logprobs_json(tokens: Sequence[tuple[str, float]] | None) -> dict[str, Any] | None:
    """Log-probabilities in OpenAI's form."""
    if tokens is None:
        return None
    entries = [
        {"token": text, "logprob": logprob, "bytes": list(text.encode()), "top_logprobs": []}
        for text, logprob in tokens
    ]
    return {"content": entries, "refusal": None}


def _envelope(identity: str, model: str, kind: str, choices: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {"id": identity, "object": kind, "created": int(time.time()), "model": model, "choices": list(choices)}
