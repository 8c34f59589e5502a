"""States of trajectories: what the policy had before it when it said a response, and what became of that response."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from aem_jax.trajectory import Ending, Trajectory


@dataclass(frozen=True)
class State:
    """One turn.

    Attributes:
        response: its number in the batch, as `collate` counts.
        trajectory: number of its trajectory.
        turn: from 0.
        group: its rollout group.
        context: i32[n], all ids that the response was said after.
        tokens: length of the response.
        budget: most tokens that it could have had.
        surprisal: S(a|s) of the response, nats.
        predictable: Σ_t H_t over its tokens, nats: what of S is not sampling noise (METHOD §3).
        said: text of the response.
    """

    response: int
    trajectory: int
    turn: int
    group: int
    context: np.ndarray
    tokens: int
    budget: int
    surprisal: float
    predictable: float
    said: str


def states_of(trajectories: Sequence[Trajectory], response_tokens: int, context_tokens: int) -> list[State]:
    """All turns with a response, in the order in which `collate` numbers responses.

    Args:
        trajectories: as played.
        response_tokens: most tokens of a response.
        context_tokens: most tokens of an episode (append), or of a prompt and its response (window).
    """
    found, number = [], 0
    for n, trajectory in enumerate(trajectories):
        if trajectory.ending is Ending.ENV_ERROR:
            continue
        heard: list[np.ndarray] = []
        for k, turn in enumerate(trajectory.turns):
            if trajectory.context == "window":
                heard = []
            heard.append(turn.observation_ids)
            context = np.concatenate(heard).astype(np.int32)
            if len(turn.response_ids):
                found.append(
                    State(
                        response=number,
                        trajectory=n,
                        turn=k,
                        group=trajectory.group,
                        context=context,
                        tokens=len(turn.response_ids),
                        budget=min(response_tokens, context_tokens - len(context)),
                        surprisal=float(-np.sum(turn.logprobs, dtype=np.float64)),
                        predictable=float(np.sum(turn.entropies, dtype=np.float64)),
                        said=turn.response,
                    )
                )
            heard.append(turn.response_ids)
            number += 1
    return found
