"""The environment protocol: `Environment`, `StepResult`, `Task`, its errors, and the constants of its messages.

An episode ends in one of three ways: it is terminated (the task ended), truncated (a limit was reached), or broken
(`EnvError`). A broken episode is retried or masked, and never counts as a failure of the policy.

Servers use OpenEnv's WebSocket messages, JSON texts of the form `{"type": …, "data": {…}}`. One connection is one
session with one environment, and every request gets exactly one reply, in order. Field names differ between servers;
`serving/field_mapping.py` maps them. `serving/session.py` answers the requests.
"""

import contextlib
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping
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

STATE_REQUEST = '{"type": "state"}'
CLOSE_REQUEST = '{"type": "close"}'
WAITING_MESSAGE = '{"type": "waiting"}'
"""Sent before the reply while a request waits for room (`waiting`), to clients that connect with `WAITING_HEADER`."""
WAITING_HEADER = "Accept-Waiting"
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
        if isinstance(score, (int, float)) and abs(score) <= sys.float_info.max:  # an integer may be larger
            return float(score)
        return float(self.won)


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


_waiting_threads: set[int] = set()


@contextlib.contextmanager
def waiting() -> Iterator[None]:
    """Marks a part of `reset` or `step` in which an environment waits for room on its host, which other episodes hold.

    This package's servers tell the pool, whose deadlines do not run meanwhile. The environment must be a blocking one.
    """
    thread = threading.get_ident()
    _waiting_threads.add(thread)
    try:
        yield
    finally:
        _waiting_threads.discard(thread)


def is_waiting(thread: int) -> bool:
    """Whether a thread is inside `waiting`."""
    return thread in _waiting_threads


def over_at_reset(result: StepResult) -> str:
    """Returns the reason to skip a task whose reset ends the episode: no action is possible in it."""
    how = "terminated" if result.terminated else "truncated"
    return f"the episode ended at its reset ({how}, {'won' if result.won else 'not won'}): there is nothing to act in"


def describe(error: BaseException) -> str:
    """Formats an error in one line of at most about 2000 characters: its type, and its text if it has one."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}{': ' if text else ''}{text[:2000]}{'…' if len(text) > 2000 else ''}"


def describe_raised(error: BaseException) -> str:
    """Formats an error of a user's code in one line, with the file and line that raised it."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{describe(error)} (line {frame.lineno} of {frame.filename})"
