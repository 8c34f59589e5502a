"""The environment protocol: `Environment`, `StepResult`, `Task`, and the messages that carry them.

An episode ends in one of three ways. It is terminated (the task ended), truncated (a limit was hit), or broken
(`EnvError`): then it is retried or masked, and never counted as a failure of the policy.

Servers speak OpenEnv's WebSocket messages, JSON texts of the form `{"type": …, "data": {…}}`. One connection is one
session with one environment, and every request gets exactly one reply, in order. Servers name their fields
differently: `serving/field_mapping.py` reads them.
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
    """The server replied with an error: it is alive, and this one request failed.

    Attributes:
        code: one of the protocol's error codes, as the server sent it.
        message: the server's message, with the findings of its validation.
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
        info: facts that JSON can hold, after conversion of numpy's scalars and the like (`plain`). It always has
            `won: bool` and `valid_action: bool`, and `score: float` in [0, 1] where the task measures more than won.
    """

    observation: str
    reward: float = 0.0
    terminated: bool = False
    truncated: bool = False
    info: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.observation, str):  # half a surrogate pair would end the run later, wherever it is encoded
            object.__setattr__(self, "observation", valid_text(self.observation))

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
    """Plays one episode at a time: `reset` starts it from a task, `step` answers a response of the policy."""

    def reset(self, task: Mapping[str, Any]) -> StepResult:
        """Starts an episode of `task` (a JSON mapping; its keys are the environment's own)."""
        ...

    def step(self, action_text: str) -> StepResult:
        """Answers the whole text of the policy's response."""
        ...

    def close(self) -> None:
        """Frees resources. A second call does nothing."""
        ...


def over_at_reset(result: StepResult) -> str:
    """The reason to leave out a task whose reset ends the episode: no action is possible in it."""
    how = "terminated" if result.terminated else "truncated"
    return f"the episode ended at its reset ({how}, {'won' if result.won else 'not won'}): there is nothing to act in"


def encode_reset(task: Mapping[str, Any]) -> str:
    """The request that starts an episode of `task`; its keys become the reset keywords.

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

    Numbers of numpy, torch and jax become Python numbers. In `info`, values are converted to what JSON can hold
    (`plain.plain`), and NaN becomes null.

    Args:
        env: the environment.
        call: reset or step.
        result: the returned object.

    Raises:
        ValueError: it is no `StepResult` with a text observation, a finite reward, true or false as flags, and a
            mapping of JSON values as info; the message names the wrong part.
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
"""Facts of `info` that training reads: the converter, which returns None for a value of another type, and the type in
words. A fact that is null is left out."""


def encode_result(result: StepResult, *, send_admissible: bool) -> str:
    """The reply that carries a `checked_result`, in the observation fields of our servers.

    Raises:
        ValueError: the result holds other values than finite JSON, or exceeds the size of a message.
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
    """An error in one line of at most about 2000 characters: its type, and its text if any."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}{': ' if text else ''}{text[:2000]}{'…' if len(text) > 2000 else ''}"


def describe_raised(error: BaseException) -> str:
    """An error of a user's code in one line, with the place that raised it."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{describe(error)} (line {frame.lineno} of {frame.filename})"


def encode_error(code: str, message: str, **details: Any) -> str:
    """The reply to a request that failed, with the reason."""
    return json.dumps({"type": "error", "data": {"message": message, "code": code, **details}})


def decode_data(raw: str | bytes, expected_type: str) -> Mapping[str, Any]:
    """The `data` of a reply of the expected type.

    Raises:
        RefusedError: the server answered with an error.
        EnvError: the reply is rubbish.
    """
    try:
        message = json.loads(raw)
        if b"\\u" in raw if isinstance(raw, bytes) else "\\u" in raw:  # else no text in it has half a surrogate pair
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
    """An error's message, followed by the findings of OpenEnv's validation, which stand in a field of their own."""
    errors = data.get("errors")
    findings = [entry for entry in errors if isinstance(entry, dict)] if isinstance(errors, list) else []
    where = [f"{'.'.join(map(str, entry.get('loc', ())))}: {entry.get('msg', '')}" for entry in findings[:3]]
    return "; ".join([str(data.get("message", "no message")), *where])
