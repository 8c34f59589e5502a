"""Host types of a rollout: what was asked, what was said, how it ended. Plain numpy; ids as sampled are the truth."""

import math
from dataclasses import dataclass
from enum import Enum

import numpy as np

from aem_jax.envs.protocol import Task


class Ending(Enum):
    """How an episode ended. Three words, never one."""

    TERMINATED = "terminated"
    """The task said so."""
    TRUNCATED = "truncated"
    """A limit (turns, tokens) was hit."""
    ENV_ERROR = "env_error"
    """The environment broke: masked from loss and group statistics, never counted as failure."""


@dataclass(frozen=True)
class Turn:
    """One observation and the response to it.

    Attributes:
        observation_ids: i32[n], the ids that the model saw since the previous response, chat markup included.
        response_ids: i32[m], the ids that it sampled, stop id included.
        logprobs: f32[m], log-probability of each sampled id at the sampling temperature, nats.
        entropies: f32[m], entropy of the distribution that each id was drawn from, nats.
        reward: reward that the response earned.
        valid_action: whether the environment understood the response as an action.
        observation: text of the observation.
        response: text of the response.
    """

    observation_ids: np.ndarray
    response_ids: np.ndarray
    logprobs: np.ndarray
    entropies: np.ndarray
    reward: float
    valid_action: bool
    observation: str = ""
    response: str = ""


@dataclass(frozen=True)
class Trajectory:
    """One episode.

    Attributes:
        task: what was to be done.
        group: index of its rollout group inside the step.
        member: index inside the group.
        turns: in order.
        ending: how it ended.
        won: whether the task was solved.
        retries: how often the episode was begun again after an environment error.
        score: the task's own score in [0, 1]; as `won` where it has none.
        context: "append" (turns share one growing sequence) or "window" (each turn's prompt stands alone).
        in_loss: whether its tokens are learnt from; else it counts in the statistics of its group alone.
    """

    task: Task
    group: int
    member: int
    turns: tuple[Turn, ...]
    ending: Ending
    won: bool
    retries: int = 0
    context: str = "append"
    score: float = 0.0
    in_loss: bool = True

    @property
    def total_reward(self) -> float:
        """Undiscounted sum of the turns' rewards, rounded once: their order and the version of Python do not matter."""
        return math.fsum(turn.reward for turn in self.turns)
