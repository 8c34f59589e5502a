"""What every environment does, in this process or behind a socket, and the messages that carry it.

Termination and truncation are different things (the task ended; a limit was hit), and an environment that broke is a
third: `EnvError`, no fault of the policy, so its episode is retried or masked and never counted as a failure.

On the wire an environment speaks OpenEnv's WebSocket messages, JSON texts of the form `{"type": …, "data": {…}}`: one
connection is one session is one environment, and every request is answered by exactly one reply, in order.
What a server calls its fields is its own matter: `wire.py` finds them.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from aem_jax.files import valid_text

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
    """What an environment answered, if it is an answer.

    Args:
        env: the environment.
        call: reset or step.
        result: what came.

    Raises:
        ValueError: it is no `StepResult` with a text observation and a mapping as info.
    """
    if not isinstance(result, StepResult):
        got = f"{type(result).__name__} {result!r:.200}"
    elif not isinstance(result.observation, str):
        got = f"{type(result.observation).__name__} {result.observation!r:.200} as observation"
    elif not isinstance(result.info, Mapping):
        got = f"{type(result.info).__name__} {result.info!r:.200} as info"
    else:
        return result
    raise ValueError(
        f"expected a StepResult with a text observation and a mapping as info from {type(env).__qualname__}.{call}, "
        f"got {got}; return aem_jax.envs.protocol.StepResult(observation, reward, terminated, truncated, info)"
    )


def encode_result(result: StepResult, *, send_admissible: bool) -> str:
    """The reply that carries `result`, in our own server's observation fields.

    Raises:
        ValueError: the result holds something else than plain finite JSON values.
    """
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
