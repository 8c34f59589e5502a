"""Requests to a server and its replies, with the names of the server's fields.

OpenEnv defines the messages, but each environment names the fields of its actions and observations. `FieldMapping`
contains these names. The defaults are the fields of this package's servers. In the preset `openenv-tiny`, most fields
are optional.

A path is dotted and may contain list indices: `messages.-1.content`. `|` separates alternatives; the first one that
exists and is not null is used. A path that ends with `|` is optional. Without the field `question|`, the text is empty.
Without the field `won|`, the rule for an empty name applies.
"""

import copy
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from aem_jax.envs.protocol import EnvError, RefusedError, StepResult
from aem_jax.envs.serving.plain import number
from aem_jax.files import parse_mapping, valid_json, valid_text


@dataclass(frozen=True)
class FieldMapping:
    """Names of a server's fields. An empty name: the server has no such field."""

    action_field: str = "text"
    """Action field that takes the policy's response; dotted: a field inside a field."""
    action_constants: str = "{}"
    """JSON mapping of further action fields, sent unchanged with every step."""
    text_field: str = "text"
    """Observation field shown to the policy; empty: the complete observation as JSON."""
    won_field: str = "won"
    """Observation field: whether the task is solved; empty: terminated and reward above won_above."""
    truncated_field: str = "truncated"
    """Observation field: whether a limit ended the episode; empty: never."""
    terminated_field: str = "terminated"
    """Observation field: whether the task ended the episode; empty: done and not truncated."""
    valid_field: str = "valid_action"
    """Observation field: whether the response was understood as an action; empty: always."""
    admissible_field: str = "admissible"
    """Observation field that lists the admissible actions, or null if they are not sent; empty: no such field."""
    info_field: str = "info"
    """Observation field with a mapping of further facts; empty: no such field."""
    score_field: str = ""
    """Observation field with the task's own score, 0 to 1, or null if there is none yet; empty: no such field."""
    won_above: float = 0.0
    """A terminated episode is won if its last reward is above this value. Used if there is no won_field."""
    action_pattern: str = ""
    """Regular expression. The first group of its last match in the response is sent. Without a match, or if empty, the
    full response is sent. As in Python, `.` matches a line break only in a pattern that begins with (?s)."""
    invalid_codes: tuple[str, ...] = ()
    """Error codes that count as invalid actions: the observation is the server's message, and the episode continues.
    Any other error ends the episode as an environment error."""

    def __post_init__(self) -> None:
        try:
            groups = re.compile(self.action_pattern).groups
        except re.error as error:
            raise ValueError(
                f"expected action_pattern as a regular expression, got {self.action_pattern!r}: {error}"
            ) from None
        if self.action_pattern and not groups:
            raise ValueError(f"expected action_pattern with a group (…), got {self.action_pattern!r}")


def encode_reset(task: Mapping[str, Any]) -> str:
    """Encodes the request that starts an episode of `task`. Its keys become the reset keywords.

    Raises:
        ValueError: the task is not JSON.
    """
    try:
        return json.dumps({"type": "reset", "data": dict(task)}, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"expected a task as a mapping of plain JSON values, got {task!r:.200}: {error}") from None


def step_encoder(mapping: FieldMapping) -> Callable[[str], str]:
    """Returns the function `text -> request` of a mapping.

    Raises:
        ValueError: `action_constants` is not a JSON mapping, or the path `action_field` goes through another value.
    """
    inner = constants = parse_mapping(mapping.action_constants, "action_constants")
    *outer, last = mapping.action_field.split(".")
    for name in outer:
        inner = inner.setdefault(name, {})
        if not isinstance(inner, dict):
            raise ValueError(
                f"expected action_constants with a mapping in {name!r}, for action_field {mapping.action_field!r}, "
                f"got {mapping.action_constants!r}"
            )
    pattern = re.compile(mapping.action_pattern) if mapping.action_pattern else None

    def encode(text: str) -> str:
        if pattern:
            *_, text = text, *(match[1] for match in pattern.finditer(text) if match[1] is not None)
        action = inner = copy.deepcopy(constants)
        for name in outer:
            inner = inner[name]
        inner[last] = valid_text(text)  # other JSON readers refuse half a surrogate pair
        return json.dumps({"type": "step", "data": action})

    return encode


def decode_data(raw: str | bytes, expected_type: str) -> Mapping[str, Any]:
    """Returns the `data` of a reply of the expected type.

    Raises:
        RefusedError: the server replied with an error.
        EnvError: the reply is invalid.
    """
    try:
        message = json.loads(raw)
        if b"\\u" in raw if isinstance(raw, bytes) else "\\u" in raw:  # else no text has half a surrogate pair
            message = valid_json(message)
        kind, data = message["type"], message.get("data", {})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise EnvError(f"invalid reply: expected a JSON message with type and data, got {raw[:200]!r}") from None
    if not isinstance(data, dict):
        raise EnvError(f"invalid reply: expected data as a mapping, got {raw[:200]!r}")
    if kind == "error":
        raise RefusedError(str(data.get("code", "UNKNOWN")), _message(data))
    if kind != expected_type:
        raise EnvError(f"invalid reply: expected a message of type {expected_type!r}, got {kind!r}")
    return data


def _message(data: Mapping[str, Any]) -> str:
    """Returns an error's message, followed by OpenEnv's validation errors, which are in a separate field."""
    errors = data.get("errors")
    findings = [entry for entry in errors if isinstance(entry, dict)] if isinstance(errors, list) else []
    place = lambda loc: ".".join(map(str, loc)) if isinstance(loc, list) else str(loc or "")
    where = [f"{place(entry.get('loc'))}: {entry.get('msg', '')}" for entry in findings[:3]]
    return "; ".join([str(data.get("message", "no message")), *where])


def decode_result(raw: str | bytes, mapping: FieldMapping) -> StepResult:
    """Reads an observation message.

    Args:
        raw: the reply as received.
        mapping: names of the server's fields.

    Returns:
        The result. `info["admissible"]` and `info["score"]` exist only if the server sent them.

    Raises:
        RefusedError: the server replied with an error.
        EnvError: the reply is invalid: it is not JSON, a field is missing, the reward is not finite, …
    """
    data = decode_data(raw, "observation")
    observation, reward, done = data.get("observation"), data.get("reward"), data.get("done")
    if not isinstance(observation, dict) or not isinstance(done, bool):
        raise EnvError(f"invalid reply: expected an observation mapping and a done flag, got {raw[:200]!r}")
    reward = _number(0.0 if reward is None else reward, "a finite reward")
    truncated = done and _flag(observation, mapping.truncated_field, False)
    terminated = done and _flag(observation, mapping.terminated_field, not truncated)
    if done and not (terminated or truncated):
        raise EnvError("invalid reply: expected a done episode to be terminated or truncated, got neither")
    info = _find(observation, mapping.info_field) if mapping.info_field else {}
    if info is None and _optional(mapping.info_field):
        info = {}
    if not isinstance(info, dict):
        raise EnvError(f"invalid reply: expected a mapping in {mapping.info_field!r}, got {info!r:.100}")
    won = _flag(observation, mapping.won_field, terminated and reward > mapping.won_above)
    info = {**info, "won": won, "valid_action": _flag(observation, mapping.valid_field, True)}
    admissible = _find(observation, mapping.admissible_field) if mapping.admissible_field else None
    if admissible is not None:
        info["admissible"] = admissible
    score = _find(observation, mapping.score_field) if mapping.score_field else None
    if score is not None:
        info["score"] = _number(score, f"a finite score in {mapping.score_field!r}")
    return StepResult(_text(observation, mapping.text_field), reward, terminated, truncated, info)


def decode_step(raw: str | bytes, mapping: FieldMapping) -> StepResult:
    """Reads the reply to a step, as `decode_result` does. An error in `mapping.invalid_codes` is an invalid action that
    changed nothing."""
    try:
        return decode_result(raw, mapping)
    except RefusedError as error:
        if error.code not in mapping.invalid_codes:
            raise
        return StepResult(error.message, info={"won": False, "valid_action": False})


def _optional(path: str) -> bool:
    return path.endswith("|")


def _find(observation: Mapping[str, Any], path: str) -> Any:
    """Returns the first alternative of the path that exists and is not null; None if null is accepted."""
    accepted = _optional(path)
    for alternative in filter(None, path.split("|")):
        exists, value = _look_up(observation, alternative)
        if exists and value is not None:
            return value
        accepted |= exists
    if not accepted:
        raise EnvError(f"invalid reply: expected the observation field {path!r}, got fields {sorted(observation)}")
    return None


def _look_up(value: Any, path: str) -> tuple[bool, Any]:
    """Returns whether the path exists, and its value."""
    for name in path.split("."):
        if isinstance(value, dict) and name in value:
            value = value[name]
        elif isinstance(value, list) and re.fullmatch(r"-?\d+", name) and -len(value) <= int(name) < len(value):
            value = value[int(name)]
        else:
            return False, None
    return True, value


def _text(observation: Mapping[str, Any], path: str) -> str:
    if not path:
        return json.dumps(observation, ensure_ascii=False)
    text = _find(observation, path)
    if text is None:
        if _optional(path):
            return ""
        raise EnvError(f"invalid reply: expected text in {path!r}, got null; {path + '|'!r} takes null for no text")
    if not isinstance(text, str):
        raise EnvError(f"invalid reply: expected text in {path!r}, got {text!r:.100}")
    return text


def _flag(observation: Mapping[str, Any], path: str, default: bool) -> bool:
    value = _find(observation, path) if path else None
    if value is None and (not path or _optional(path)):
        return default
    if not isinstance(value, bool):
        raise EnvError(f"invalid reply: expected true or false in {path!r}, got {value!r:.100}")
    return value


def _number(value: Any, what: str) -> float:
    finite = number(value)
    if finite is None:
        raise EnvError(f"invalid reply: expected {what}, got {value!r:.100}")
    return finite
