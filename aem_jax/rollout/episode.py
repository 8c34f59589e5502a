"""One episode's side of the conversation: what it has heard and said, as ids and as text."""

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from aem_jax.trajectory import Ending, Task, Trajectory, Turn

_SUSPICIOUS_LOSSES = 2


class Chat(Protocol):
    """What a rollout needs of a tokenizer."""

    @property
    def stop_ids(self) -> Sequence[int]:
        """Ids that end a response."""
        ...

    def prompt_ids(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Ids of a conversation, up to where the next response begins."""
        ...

    def delta_ids(self, observation: str, *, closed: bool = True) -> list[int]:
        """Ids between a response and the next: closing it if it was cut, then the observation's turn."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens left out."""
        ...


@dataclass(eq=False)
class Episode:
    """An episode while it is alive (mutable; becomes a frozen `Trajectory` at its end).

    Attributes:
        task: what is to be done.
        group: index of its rollout group in this step.
        member: index in the group.
        prng: u32[2], the episode's key data.
        retries: how often it was begun again after a failure of its own, or as a suspect.
        losses: how often it was begun again because its server failed.
        turns: finished turns.
        ids: every id that its slot holds.
        pending: ids heard and not yet computed.
        keep: leading ids of the slot that `pending` continues.
        heard: ids and text of the observation being answered.
        budget: tokens that the response under way may still have; 0 while nothing is to be said.
        unread: calls that decode this response and were not read yet.
        future: the environment's answer being awaited.
    """

    task: Task
    group: int
    member: int
    prng: np.ndarray
    retries: int = 0
    losses: int = 0
    turns: list[Turn] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    pending: list[int] = field(default_factory=list)
    keep: int = 0
    heard: tuple[list[int], str] = ((), "")  # pyright: ignore[reportAssignmentType]
    said: tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray]] = field(default_factory=lambda: ([], [], []))
    budget: int = 0
    unread: int = 0
    future: Future[Any] | None = None

    @property
    def is_suspect(self) -> bool:
        """Whether its servers failed so often that it may be what kills them. On one server, suspects play one by one;
        so a task that kills its server is found, and the episodes that were lost with it are not taken for it."""
        return self.losses >= _SUSPICIOUS_LOSSES

    def again(self, *, charged: bool) -> "Episode":
        """The same episode, from its task; `charged` to its retries, or counted as a loss."""
        retries, losses = (self.retries + 1, self.losses) if charged else (self.retries, self.losses + 1)
        return Episode(self.task, self.group, self.member, self.prng, retries, losses)

    @property
    def said_count(self) -> int:
        """Tokens of the response so far."""
        return sum(len(part) for part in self.said[0])

    def take_response(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ids, logprobs and entropies of the response that has ended; clears them."""
        ids, logprobs, entropies = (np.concatenate(parts) for parts in self.said)
        self.said = ([], [], [])
        return ids, logprobs, entropies

    def trajectory(self, ending: Ending, context: str, won: bool = False, score: float = 0.0) -> Trajectory:
        """The finished record."""
        return Trajectory(
            self.task,
            self.group,
            self.member,
            tuple(self.turns),
            ending,
            won,
            retries=self.retries + self.losses,
            context=context,
            score=score,
        )


def first_messages(instruction: str, observation: str) -> list[dict[str, str]]:
    """The conversation before the first response."""
    system = [{"role": "system", "content": instruction}] if instruction else []
    return [*system, {"role": "user", "content": observation}]


def without_thoughts(response: str) -> str:
    """What follows the last `</think>` of a response, as Qwen3's chat template shows earlier responses."""
    return response.rpartition("</think>")[2].lstrip("\n")


def windowed_ids(
    chat: Chat,
    held: Sequence[int],
    turns: Sequence[tuple[str, str]],
    observation: str,
    instruction: str,
    count: int,
    *,
    thoughts: bool = True,
) -> tuple[int, list[int]]:
    """Window: first observation, last `count` turns, observation.

    Args:
        chat: the tokenizer.
        held: ids that the slot holds.
        turns: observation and response of each turn so far.
        observation: what was heard now.
        instruction: system message.
        count: turns that the prompt looks back on.
        thoughts: whether earlier responses are shown with what was thought.

    Returns:
        ids kept (the common prefix) and new ids.
    """
    messages = first_messages(instruction, turns[0][0])
    recent = turns[-count:] if count else []
    for place, (heard, said) in enumerate(recent):
        if place or len(recent) < len(turns):
            messages.append({"role": "user", "content": heard})
        messages.append({"role": "assistant", "content": said if thoughts else without_thoughts(said)})
    ids = chat.prompt_ids([*messages, {"role": "user", "content": observation}])
    limit = min(len(ids) - 1, len(held))
    keep = next((i for i in range(limit) if ids[i] != held[i]), limit)
    return keep, ids[keep:]
