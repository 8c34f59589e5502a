"""Host types of a rollout: turns, trajectories. Plain numpy; sampled ids are never tokenized again."""

import math
from dataclasses import dataclass
from enum import Enum

import numpy as np

from aem_jax.envs.protocol import Task


class Ending(Enum):
    """How an episode ended."""

    TERMINATED = "terminated"
    """The environment reached a terminal state."""
    TRUNCATED = "truncated"
    """A limit (turns, tokens) was reached."""
    ENV_ERROR = "env_error"
    """The environment broke: masked from the loss and group statistics, and not counted as a failure."""


@dataclass(frozen=True)
class Turn:
    """One observation and the response to it.

    Attributes:
        observation_ids: i32[n], the ids appended since the previous response, chat markup included; in the contexts
            "window", "compact" and "tree", the whole prompt.
        response_ids: i32[m], the sampled ids, stop id included.
        logprobs: f32[m], log-probability of each sampled id at the sampling temperature, nats.
        entropies: f32[m], entropy of the distribution that each id was sampled from, nats.
        reward: reward of the response.
        valid_action: whether the environment understood the response as an action.
        observation: text of the observation.
        response: text of the response.
        versions: i32[m], the training step whose parameters sampled each id (0 outside of training); None if no
            parameters did.
        experts: integers [n + m, layers · experts per token], the experts that the sampler routed each id of the
            observation and of the response to, layer by layer (uint8, or int16 with more than 256 experts); None if
            they are not recorded.
    """

    observation_ids: np.ndarray
    response_ids: np.ndarray
    logprobs: np.ndarray
    entropies: np.ndarray
    reward: float
    valid_action: bool
    observation: str = ""
    response: str = ""
    versions: np.ndarray | None = None
    experts: np.ndarray | None = None


@dataclass(frozen=True)
class Trajectory:
    """One episode.

    Attributes:
        task: its task.
        group: index of its rollout group in the step; with carry-over, its number in the run until it is selected.
        member: index in the group.
        turns: in order.
        ending: how it ended.
        success: whether the task was solved.
        retries: number of restarts after an environment error.
        score: the task's own score in [0, 1]; 1 or 0, as `success`, where it has none.
        context: "append" (turns share one growing sequence), "window" (each turn has its own prompt), "compact" or
            "tree" (each turn has its own prompt, and shares the sequence of the turn that it continues).
        in_loss: whether its tokens are in the loss; otherwise it only counts in the statistics of its group.
    """

    task: Task
    group: int
    member: int
    turns: tuple[Turn, ...]
    ending: Ending
    success: bool
    retries: int = 0
    context: str = "append"
    score: float = 0.0
    in_loss: bool = True

    @property
    def is_left_out(self) -> bool:
        """Whether statistics leave it out: its environment broke it, or its first prompt was too long."""
        return self.ending is Ending.ENV_ERROR or (self.ending is Ending.TRUNCATED and not self.turns)

    @property
    def total_reward(self) -> float:
        """Undiscounted sum of the turns' rewards, rounded once, so that it does not depend on the version of Python."""
        return math.fsum(turn.reward for turn in self.turns)
