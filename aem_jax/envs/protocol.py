"""What every environment does, in this process or behind a socket, and the messages that carry it.

Termination and truncation are different things (the task ended; a limit was hit), and an environment that broke is a
third: `EnvError`, no fault of the policy, so its episode is retried or masked and never counted as a failure.

On the wire an environment speaks OpenEnv's WebSocket messages, JSON texts of the form `{"type": …, "data": {…}}`: one
connection is one session is one environment, and every request is answered by exactly one reply, in order.
`WireMapping` says under which names a server keeps the words that we need; its defaults are those of our own server.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

INVALID_JSON = "INVALID_JSON"
UNKNOWN_TYPE = "UNKNOWN_TYPE"
VALIDATION_ERROR = "VALIDATION_ERROR"
EXECUTION_ERROR = "EXECUTION_ERROR"
CAPACITY_REACHED = "CAPACITY_REACHED"
FACTORY_ERROR = "FACTORY_ERROR"
SESSION_ERROR = "SESSION_ERROR"

MAX_MESSAGE_BYTES = 16 * 2**20
"""Largest message that either side accepts."""


class EnvError(RuntimeError):
    """The environment (not the policy) failed: it died, missed its deadline or answered rubbish."""


class LostError(EnvError):
    """The episode was lost with its server, which failed at something that need not have been this episode's doing."""


class RefusedError(EnvError):
    """The server itself answered with an error: it is alive, this one request failed.

    Attributes:
        code: one of the protocol's error codes, as the server sent it.
    """

    def __init__(self, code: str, message: str):
        super().__init__(f"{code}: {message}")
        self.code = code


@dataclass(frozen=True)
class StepResult:
    """One answer of an environment.

    Attributes:
        observation: text shown to the policy.
        reward: reward of the transition that led here; 0.0 after a reset.
        terminated: the task said that the episode is over (solved or failed).
        truncated: a limit ended the episode.
        info: JSON-able facts; always `won: bool` and `valid_action: bool`; `score: float` in [0, 1] where the task has
            a finer measure than won or not.
    """

    observation: str
    reward: float = 0.0
    terminated: bool = False
    truncated: bool = False
    info: Mapping[str, Any] = field(default_factory=dict)

    @property
    def done(self) -> bool:
        """Whether the episode is over, for whichever reason."""
        return self.terminated or self.truncated

    @property
    def won(self) -> bool:
        """Whether the task is solved."""
        return bool(self.info.get("won", False))

    @property
    def score(self) -> float:
        """The task's own score; 1 or 0, as won, where it has none."""
        score = self.info.get("score")
        return float(score) if isinstance(score, (int, float)) and math.isfinite(score) else float(self.won)


class Environment(Protocol):
    """One episode at a time: `reset` starts one from a task, `step` answers one response of the policy."""

    def reset(self, task: Mapping[str, Any]) -> StepResult:
        """Starts an episode of `task` (a JSON mapping; its keys are the environment's own)."""
        ...

    def step(self, action_text: str) -> StepResult:
        """Answers the policy's whole response text."""
        ...

    def close(self) -> None:
        """Frees what the environment holds; calling it twice is harmless."""
        ...


@dataclass(frozen=True)
class WireMapping:
    """Where a server keeps our words. Observation fields may be dotted paths; an empty name: it has no such field."""

    action_field: str = "text"
    """Action field that takes the policy's response."""
    action_constants: str = "{}"
    """JSON mapping of further action fields, sent unchanged with every step."""
    text_field: str = "text"
    """Observation field shown to the policy; empty: the whole observation as JSON."""
    won_field: str = "won"
    """Observation field that says whether the task is solved; empty: done, not truncated and reward above zero."""
    truncated_field: str = "truncated"
    """Observation field that says whether a limit ended the episode; empty: never."""
    terminated_field: str = "terminated"
    """Observation field that says whether the task ended the episode; empty: done and not truncated."""
    valid_field: str = "valid_action"
    """Observation field that says whether the response was understood as an action; empty: always."""
    admissible_field: str = "admissible"
    """Observation field that lists the admissible actions, null where they are not sent; empty: none."""
    info_field: str = "info"
    """Observation field with a mapping of further facts; empty: none."""


def encode_reset(task: Mapping[str, Any]) -> str:
    """The request that starts an episode of `task`; its keys become the reset keywords.

    Raises:
        ValueError: the task is not JSON.
    """
    try:
        return json.dumps({"type": "reset", "data": dict(task)}, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"expected a task as a mapping of plain JSON values, got {task!r:.200}: {error}") from None


def step_encoder(mapping: WireMapping):
    """Returns the function `text -> request` of a mapping, with what never changes prepared once.

    Raises:
        ValueError: `action_constants` is not a JSON mapping.
    """
    try:
        constants = json.loads(mapping.action_constants)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"expected action_constants as a JSON mapping, got {mapping.action_constants!r}: {error}"
        ) from None
    if not isinstance(constants, dict):
        raise ValueError(f"expected action_constants as a JSON mapping, got {mapping.action_constants!r}")

    def encode(text: str) -> str:
        text = text.encode(errors="replace").decode()  # half a surrogate pair is a str, but not everybody's JSON
        return json.dumps({"type": "step", "data": {**constants, mapping.action_field: text}})

    return encode


STATE_REQUEST = '{"type": "state"}'
CLOSE_REQUEST = '{"type": "close"}'


def encode_result(result: StepResult, *, send_admissible: bool) -> str:
    """The reply that carries `result`, in our own server's observation fields.

    Raises:
        ValueError: the environment returned something else than a `StepResult` of plain JSON values.
    """
    if not isinstance(result, StepResult) or not isinstance(result.observation, str):
        raise ValueError(f"expected a StepResult with a text observation from the environment, got {result!r:.200}")
    info = dict(result.info)
    observation = {
        "text": result.observation,
        "won": bool(info.pop("won", False)),
        "terminated": bool(result.terminated),
        "truncated": bool(result.truncated),
        "valid_action": bool(info.pop("valid_action", True)),
        "admissible": None,
        "info": info,
    }
    admissible = info.pop("admissible", None)
    if send_admissible and admissible is not None:
        observation["admissible"] = list(admissible)
    data = {"observation": observation, "reward": float(result.reward), "done": bool(result.done)}
    try:
        return json.dumps({"type": "observation", "data": data}, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"expected plain finite JSON values from the environment, got {data!r:.200}: {error}"
        ) from None


def encode_error(code: str, message: str, **details: Any) -> str:
    """The reply that says why a request failed."""
    return json.dumps({"type": "error", "data": {"message": message, "code": code, **details}})


def decode_data(raw: str | bytes, expected_type: str) -> Mapping[str, Any]:
    """The `data` of a reply of the expected type.

    Raises:
        RefusedError: the server answered with an error.
        EnvError: the reply is rubbish.
    """
    try:
        message = json.loads(raw)
        kind, data = message["type"], message.get("data", {})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise EnvError(f"rubbish: expected a JSON message with type and data, got {raw[:200]!r}") from None
    if not isinstance(data, dict):
        raise EnvError(f"rubbish: expected data as a mapping, got {raw[:200]!r}")
    if kind == "error":
        raise RefusedError(str(data.get("code", "UNKNOWN")), str(data.get("message", "no message")))
    if kind != expected_type:
        raise EnvError(f"rubbish: expected a message of type {expected_type!r}, got {kind!r}")
    return data


def _find(observation: Mapping[str, Any], path: str) -> Any:
    value: Any = observation
    for name in path.split("."):
        if not isinstance(value, dict) or name not in value:
            raise EnvError(f"rubbish: expected the observation field {path!r}, got fields {sorted(observation)}")
        value = value[name]
    return value


def _flag(observation: Mapping[str, Any], path: str, default: bool) -> bool:
    if not path:
        return default
    value = _find(observation, path)
    if not isinstance(value, bool):
        raise EnvError(f"rubbish: expected true or false in {path!r}, got {value!r:.100}")
    return value


def decode_result(raw: str | bytes, mapping: WireMapping) -> StepResult:
    """Reads an observation message.

    Args:
        raw: the reply as received.
        mapping: the names under which this server keeps our words.

    Returns:
        The result. `info["admissible"]` is there only if the server sent it.

    Raises:
        RefusedError: the server answered with an error.
        EnvError: the reply is rubbish: not JSON, fields missing, a reward that is not finite, …
    """
    data = decode_data(raw, "observation")
    observation, reward, done = data.get("observation"), data.get("reward"), data.get("done")
    if not isinstance(observation, dict) or not isinstance(done, bool):
        raise EnvError(f"rubbish: expected an observation mapping and a done flag, got {raw[:200]!r}")
    reward = 0.0 if reward is None else reward
    if not isinstance(reward, (int, float)) or not math.isfinite(reward):
        raise EnvError(f"rubbish: expected a finite reward, got {reward!r:.100}")
    text = _find(observation, mapping.text_field) if mapping.text_field else json.dumps(observation, ensure_ascii=False)
    if not isinstance(text, str):
        raise EnvError(f"rubbish: expected text in {mapping.text_field!r}, got {text!r:.100}")
    truncated = done and _flag(observation, mapping.truncated_field, False)
    terminated = done and _flag(observation, mapping.terminated_field, not truncated)
    if done and not (terminated or truncated):
        raise EnvError("rubbish: expected a done episode to be terminated or truncated, got neither")
    info = _find(observation, mapping.info_field) if mapping.info_field else {}
    if not isinstance(info, dict):
        raise EnvError(f"rubbish: expected a mapping in {mapping.info_field!r}, got {info!r:.100}")
    won = _flag(observation, mapping.won_field, terminated and reward > 0)
    info = {**info, "won": won, "valid_action": _flag(observation, mapping.valid_field, True)}
    admissible = _find(observation, mapping.admissible_field) if mapping.admissible_field else None
    if admissible is not None:
        info["admissible"] = admissible
    return StepResult(text, float(reward), terminated, truncated, info)
