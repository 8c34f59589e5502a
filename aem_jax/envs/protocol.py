"""What every environment does, in this process or behind a socket, and the messages that carry it.

Termination and truncation are different things (the task ended; a limit was hit), and an environment that broke is a
third: `EnvError`, no fault of the policy, so its episode is retried or masked and never counted as a failure.

On the wire an environment speaks OpenEnv's WebSocket messages, JSON texts of the form `{"type": …, "data": {…}}`: one
connection is one session is one environment, and every request is answered by exactly one reply, in order.
What a server calls its fields is its own matter: `wire.py` finds them.
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
    """The environment (not the policy) failed: it died, missed its deadline or answered rubbish."""


class LostError(EnvError):
    """The episode was lost with its server, which failed at something that need not have been this episode's doing."""


class RefusedError(EnvError):
    """The server itself answered with an error: it is alive, this one request failed.

    Attributes:
        code: one of the protocol's error codes, as the server sent it.
        message: what the server said, with what its validation found.
    """

    def __init__(self, code: str, message: str):
        super().__init__(f"{code}: {message}")
        self.code, self.message = code, message


@dataclass(frozen=True)
class Task:
    """One thing to do.

    Attributes:
        id: stable name, unique inside its split.
        kind: task type, for metrics by type.
        payload: JSON mapping that the environment server understands: the argument of `Environment.reset`.
    """

    id: str
    kind: str
    payload: Mapping[str, Any]


@dataclass(frozen=True)
class StepResult:
    """One answer of an environment.

    Attributes:
        observation: text shown to the policy.
        reward: reward of the transition that led here; 0.0 after a reset.
        terminated: the task said that the episode is over (solved or failed).
        truncated: a limit ended the episode.
        info: facts that JSON can hold once numpy's scalars and the like are converted (`plain`); always `won: bool` and
            `valid_action: bool`; `score: float` in [0, 1] where the task has a finer measure than won or not.
    """

    observation: str
    reward: float = 0.0
    terminated: bool = False
    truncated: bool = False
    info: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self):
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


def over_at_reset(result: StepResult) -> str:
    """Why a task is left out whose reset has ended the episode: nobody can act in it."""
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
    """What an environment answered, in plain values, if it is an answer.

    Numbers of numpy, torch and jax count as the numbers that they are; in `info` all that JSON can hold is converted
    (`plain.plain`), and NaN is null.

    Args:
        env: the environment.
        call: reset or step.
        result: what came.

    Raises:
        ValueError: it is no `StepResult` with a text observation, a finite reward, true or false as flags, and a
            mapping of what JSON can hold as info; names what is wrong.
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
    found = read(value)
    if found is None:
        raise ValueError(f"expected {what} as {name}, got {described(value)}")
    return found


def _texts(value: Any) -> list[str] | None:
    return value if isinstance(value, list) and all(isinstance(each, str) for each in value) else None


_FACTS: Mapping[str, tuple[Callable[[Any], Any], str]] = {
    "won": (flag, "true or false"),
    "valid_action": (flag, "true or false"),
    "score": (number, "a finite number"),
    "admissible": (_texts, "a list of texts"),
}
"""What training reads of `info`: each fact's reader, which gives None for what is none, and its type in words. One that
is null is left out."""


def encode_result(result: StepResult, *, send_admissible: bool) -> str:
    """The reply that carries a `checked_result`, in our own server's observation fields.

    Raises:
        ValueError: the result holds something else than plain finite JSON values, or is larger than a message may be.
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
    """An error in one line of at most some 2000 characters: its type, and its text where it has one."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}{': ' if text else ''}{text[:2000]}{'…' if len(text) > 2000 else ''}"


def describe_raised(error: BaseException) -> str:
    """An error of somebody's code in one line, with the place that raised it."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{describe(error)} (line {frame.lineno} of {frame.filename})"


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
    """An error's message. OpenEnv's own says only that something is invalid; what and where stands beside it."""
    errors = data.get("errors")
    found = [each for each in errors if isinstance(each, dict)] if isinstance(errors, list) else []
    where = [f"{'.'.join(map(str, each.get('loc', ())))}: {each.get('msg', '')}" for each in found[:3]]
    return "; ".join([str(data.get("message", "no message")), *where])
