"""What every environment does, in this process or behind a socket.

Termination and truncation are different things (the task ended; a limit was hit), and an environment that broke is a
third: `EnvError`, no fault of the policy, so its episode is retried or masked and never counted as a failure.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol


class EnvError(RuntimeError):
    """The environment (not the policy) failed: it died, missed its deadline or answered rubbish."""


@dataclass(frozen=True)
class StepResult:
    """One answer of an environment.

    Attributes:
        observation: text shown to the policy.
        reward: reward of the transition that led here; 0.0 after a reset.
        terminated: the task said that the episode is over (solved or failed).
        truncated: a limit ended the episode.
        info: JSON-able facts; always `won: bool` and `valid_action: bool`.
    """

    observation: str
    reward: float = 0.0
    terminated: bool = False
    truncated: bool = False
    info: Mapping[str, Any] = field(default_factory=dict)


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
