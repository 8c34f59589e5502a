"""The input of the model before a response: a first prompt, an appended observation, or a rebuilt prompt.

The setting `rollout.context` chooses. append: one growing sequence per episode, whose KV cache is never rewound.
window: each prompt holds the first observation and the last turns; the slot keeps the prefix that it shares with the
previous prompt, or copies a longer one (`sharing.py`).
"""

from collections.abc import Sequence
from typing import Protocol


class Chat(Protocol):
    """The part of a tokenizer that a rollout needs."""

    @property
    def stop_ids(self) -> Sequence[int]:
        """Ids that end a response."""
        ...

    def prompt_ids(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Ids of a conversation, up to the start of the next response."""
        ...

    def delta_ids(self, observation: str, *, closed: bool = True) -> list[int]:
        """Ids between two responses: the end of the first, unless `closed`, and the observation's turn."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens left out."""
        ...


def first_messages(instruction: str, observation: str) -> list[dict[str, str]]:
    """The conversation before the first response."""
    system = [{"role": "system", "content": instruction}] if instruction else []
    return [*system, {"role": "user", "content": observation}]


def without_thinking(response: str) -> str:
    """The text after the last `</think>` of a response, as Qwen3's chat template shows earlier responses."""
    return response.rpartition("</think>")[2].lstrip("\n")


def appended_prompt(chat: Chat, cached: int, response: Sequence[int], observation: str) -> tuple[int, list[int]]:
    """The observation's ids, behind all that the slot holds.

    Args:
        chat: the tokenizer.
        cached: number of ids before the response.
        response: ids of the response.
        observation: the environment's reply to it.

    Returns:
        Number of leading ids that stay, and the ids to append.
    """
    return cached + len(response), chat.delta_ids(observation, closed=response[-1] in chat.stop_ids)


def windowed_prompt(
    chat: Chat,
    cached_ids: Sequence[int],
    turns: Sequence[tuple[str, str]],
    observation: str,
    instruction: str,
    count: int,
    *,
    thinking: bool = True,
) -> tuple[int, list[int]]:
    """A prompt of the first observation, the last `count` turns, and the new observation.

    Args:
        chat: the tokenizer.
        cached_ids: ids that the slot holds.
        turns: observation and response of each turn so far.
        observation: the environment's last reply.
        instruction: system message.
        count: number of recent turns in the prompt.
        thinking: whether earlier responses keep their thinking.

    Returns:
        Number of leading ids that stay (the common prefix), and the ids to append.
    """
    messages = first_messages(instruction, turns[0][0])
    recent = turns[-count:] if count else []
    for index, (earlier_observation, response) in enumerate(recent):
        if index or len(recent) < len(turns):
            messages.append({"role": "user", "content": earlier_observation})
        messages.append({"role": "assistant", "content": response if thinking else without_thinking(response)})
    ids = chat.prompt_ids([*messages, {"role": "user", "content": observation}])
    limit = min(len(ids) - 1, len(cached_ids))
    keep = next((i for i in range(limit) if ids[i] != cached_ids[i]), limit)
    return keep, ids[keep:]
