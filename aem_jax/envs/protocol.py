"""The environment protocol: `Environment`, `StepResult`, `Task`, and the messages that carry them.

An episode ends in one of three ways: it is terminated (the task ended), truncated (a limit was reached), or broken
(`EnvError`). A broken episode is retried or masked, and never counts as a failure of the policy.

Servers use OpenEnv's WebSocket messages, JSON texts of the form `{"type": …, "data": {…}}`. One connection is one
session with one environment, and every request gets exactly one reply, in order. Field names differ between servers;
`serving/field_mapping.py` maps them.
"""

import json
import math
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from aem_jax.envs.serving.plain import described, flag, number, plain
from aem_jax.files import valid_json, valid_text

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
    """The environment (not the policy) failed: it died, missed its deadline or sent an invalid reply."""


class LostError(EnvError):
    """The episode was lost with its server. Another episode of that server may have caused the failure."""


class RefusedError(EnvError):
    """The server replied with an error. The server is alive, and only this request failed.

    Attributes:
        code: one of the protocol's error codes, as the server sent it.
        message: the server's message, with its validation errors.
    """

    def __init__(self, code: str, message: str):
        super().__init__(f"{code}: {message}")
        self.code: str = code
        self.message: str = message


@dataclass(frozen=True)
class Task:
    """A task of an environment.

    Attributes:
        id: stable name, unique in its split.
        task_type: label for metrics by task type.
        payload: JSON mapping for the environment's reset.
    """

    id: str
    task_type: str
    payload: Mapping[str, Any]


@dataclass(frozen=True)
class StepResult:
    """The result of a reset or a step.

    Attributes:
        observation: text shown to the policy.
        reward: reward of the transition that led here; 0.0 after a reset.
        terminated: the task ended the episode (solved or failed).
        truncated: a limit ended the episode.
        info: JSON-compatible facts; scalars of numpy and similar libraries are converted (`plain`). It always has
            `won: bool` and `valid_action: bool`. It has `score: float` in [0, 1] if the task has a finer measure.
    """

    observation: str
    reward: float = 0.0
    terminated: bool = False
    truncated: bool = False
    info: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.observation, str):  # half a surrogate pair would fail later, when it is encoded
            object.__setattr__(self, "observation", valid_text(self.observation))

    @property
    def done(self) -> bool:
        """Whether the episode is over, for any reason."""
        return self.terminated or self.truncated

    @property
    def won(self) -> bool:
        """Whether the task is solved."""
        return bool(self.info.get("won", False))

    @property
    def score(self) -> float:
        """The task's own score. A task without one has the score 1 if it is won, else 0."""
        score = self.info.get("score")
        return float(score) if isinstance(score, (int, float)) and math.isfinite(score) else float(self.won)


class Environment(Protocol):
    """Plays one episode at a time: `reset` starts it from a task, `step` executes a response of the policy."""

    def reset(self, task: Mapping[str, Any]) -> StepResult:
        """Starts an episode of `task`, a JSON mapping whose keys the environment defines."""
        ...

    def step(self, action_text: str) -> StepResult:
        """Executes a response of the policy, given as its full text."""
        ...

    def close(self) -> None:
        """Frees resources. A second call does nothing."""
        ...


def over_at_reset(result: StepResult) -> str:
    """Returns the reason to skip a task whose reset ends the episode: no action is possible in it."""
    how = "terminated" if result.terminated else "truncated"
    return f"the episode ended at its reset ({how}, {'won' if result.won else 'not won'}): there is nothing to act in"


def encode_reset(task: Mapping[str, Any]) -> str:
    """Encodes the request that starts an episode of `task`. Its keys become the reset keywords.

    Raises:
        ValueError: the task is not JSON.
    """
    try:
        return json.dumps({"type": "reset", "data": dict(task)}, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"expected a task as a mapping of plain JSON values, got {task!r:.200}: {error}") from None


STATE_REQUEST = '{"type": "state"}'
CLOSE_REQUEST = '{"type": "close"}'


def checked_result(env: Environment, call: str, result: Any) -> StepResult:
    """Validates the result of an environment, and converts it to plain values.

    Numbers of numpy, torch and jax become Python numbers. Values in `info` are converted to JSON values
    (`plain.plain`), and NaN becomes null.

    Args:
        env: the environment.
        call: reset or step.
        result: the returned object.

    Raises:
        ValueError: the object is not a `StepResult` with a text observation, a finite reward, true or false as flags,
            and a mapping of JSON values as info; the message names the wrong part.
    """
    where = f"{type(env).__qualname__}.{call}"
    if not isinstance(result, StepResult):
        raise _no_result(where, described(result))
    if not isinstance(result.observation, str):
        raise _no_result(where, f"{described(result.observation)} as observation")
    if not isinstance(result.info, Mapping):
        raise _no_result(where, f"{described(result.info)} as info")
    reward = number(result.reward)
    if reward is None:
        raise ValueError(
            f"expected a number, finite in float32, as reward from {where}, got {described(result.reward)}"
        )
    info = plain(result.info, f"{where}'s info")
    for name, (read, what) in _FACTS.items():
        if (value := info.pop(name, None)) is not None:
            info[name] = _read(read, value, what, f"info[{name!r}] from {where}")
    return StepResult(
        plain(result.observation, "observation"),
        reward,
        _read(flag, result.terminated, "true or false", f"terminated from {where}"),
        _read(flag, result.truncated, "true or false", f"truncated from {where}"),
        info,
    )


def _no_result(where: str, got: str) -> ValueError:
    return ValueError(
        f"expected a StepResult with a text observation and a mapping as info from {where}, "
        f"got {got}; return aem_jax.envs.protocol.StepResult(observation, reward, terminated, truncated, info)"
    )


def _read(read: Callable[[Any], Any], value: Any, what: str, name: str) -> Any:
    converted = read(value)
    if converted is None:
        raise ValueError(f"expected {what} as {name}, got {described(value)}")
    return converted


def _texts(value: Any) -> list[str] | None:
    return value if isinstance(value, list) and all(isinstance(item, str) for item in value) else None


_FACTS: Mapping[str, tuple[Callable[[Any], Any], str]] = {
    "won": (flag, "true or false"),
    "valid_action": (flag, "true or false"),
    "score": (number, "a finite number"),
    "admissible": (_texts, "a list of texts"),
}
"""Facts of `info` that training reads -> (converter, name of the type for errors). The converter returns None for a
value of another type. Null facts are omitted."""


def encode_result(result: StepResult, *, send_admissible: bool) -> str:
    """Encodes a `checked_result` as a reply, in the observation fields of our servers.

    Raises:
        ValueError: the result contains values that are not finite JSON, or exceeds the maximum message size.
    """
    info = dict(result.info)
    observation = {
        "text": result.observation,
        "won": bool(info.pop("won", False)),
        "terminated": result.terminated,
        "truncated": result.truncated,
        "valid_action": bool(info.pop("valid_action", True)),
        "admissible": None,
        "info": info,
    }
    admissible = info.pop("admissible", None)
    if send_admissible and admissible is not None:
        observation["admissible"] = list(admissible)
    data = {"observation": observation, "reward": result.reward, "done": result.done}
    try:
        reply = json.dumps({"type": "observation", "data": data}, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"expected plain finite JSON values from the environment, got {data!r:.200}: {error}"
        ) from None
    if len(reply) > MAX_MESSAGE_BYTES:
        parts = {"the observation": result.observation} | {f"info[{name!r}]": value for name, value in info.items()}
        sizes = {name: len(json.dumps(value)) for name, value in parts.items()}
        largest = max(sizes, key=lambda name: sizes[name])
        raise ValueError(
            f"expected an answer of at most {MAX_MESSAGE_BYTES >> 20} MiB from the environment, got "
            f"{len(reply) / 2**20:.1f} MiB, {sizes[largest] / 2**20:.1f} MiB of it in {largest}"
        )
    return reply


def describe(error: BaseException) -> str:
    """Formats an error in one line of at most about 2000 characters: its type, and its text if it has one."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}{': ' if text else ''}{text[:2000]}{'…' if len(text) > 2000 else ''}"


def describe_raised(error: BaseException) -> str:
    """Formats an error of a user's code in one line, with the file and line that raised it."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{describe(error)} (line {frame.lineno} of {frame.filename})"


def encode_error(code: str, message: str, **details: Any) -> str:
    """Encodes the reply to a failed request, with the reason."""
    return json.dumps({"type": "error", "data": {"message": message, "code": code, **details}})


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
        raise EnvError(f"rubbish: expected a JSON message with type and data, got {raw[:200]!r}") from None
    if not isinstance(data, dict):
        raise EnvError(f"rubbish: expected data as a mapping, got {raw[:200]!r}")
    if kind == "error":
        raise RefusedError(str(data.get("code", "UNKNOWN")), _message(data))
    if kind != expected_type:
        raise EnvError(f"rubbish: expected a message of type {expected_type!r}, got {kind!r}")
    return data


def _message(data: Mapping[str, Any]) -> str:
    """Returns an error's message, followed by OpenEnv's validation errors, which are in a separate field."""
    errors = data.get("errors")
    findings = [entry for entry in errors if isinstance(entry, dict)] if isinstance(errors, list) else []
    where = [f"{'.'.join(map(str, entry.get('loc', ())))}: {entry.get('msg', '')}" for entry in findings[:3]]
    return "; ".join([str(data.get("message", "no message")), *where])
