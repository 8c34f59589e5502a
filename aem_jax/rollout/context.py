"""The input of the model before a response: a first prompt, an appended observation, or a rebuilt prompt.

The setting `rollout.context` chooses. append: one growing sequence per episode, whose KV cache is never rewound.
compact: the same, until there is no room for a response; then older observations are cut to their heads.
window: each prompt holds the first observation (or the task in it) and the last turns; the slot keeps the prefix that
it shares with the previous prompt, or copies a longer one (`sharing.py`).
"""

from collections.abc import Sequence
from typing import Protocol

from aem_jax.envs.prompt import Prompt, Situation
from aem_jax.envs.protocol import EnvError, StepResult
from aem_jax.rollout.config import RolloutConfig

_CUT = " […]"


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


def compact_prompt(
    chat: Chat,
    first: Sequence[int],
    turns: Sequence[tuple[str, Sequence[int]]],
    shown: Sequence[int],
    observation: str,
    config: RolloutConfig,
) -> list[int]:
    """The whole prompt: all that was shown and the observation; older observations are cut where there is no room.

    Responses keep the ids that were sampled. Once observations are cut, the prompt grows from there.

    Args:
        chat: the tokenizer.
        first: ids of the first prompt, which stays whole.
        turns: observation and response ids of each turn so far; the first observation is in `first`.
        shown: ids of the previous prompt and its response.
        observation: the environment's last reply.
        config: `window_turns` observations stay whole, fewer where the prompt would still leave no room for a response.
    """
    delta = lambda text, response: chat.delta_ids(text, closed=response[-1] in chat.stop_ids)
    ids = [*shown, *delta(observation, turns[-1][1])]
    observations = [*(text for text, _ in turns[1:]), observation]
    for whole in range(min(config.window_turns, len(observations)), -1, -1):
        if len(ids) + config.response_tokens <= config.context_tokens:
            break
        cut, ids = len(observations) - whole, list(first)
        for index, ((_, response), text) in enumerate(zip(turns, observations, strict=True)):
            ids += [*response, *delta(head(text, config.compact_chars) if index < cut else text, response)]
    return ids


def head(text: str, chars: int) -> str:
    """The first characters of a text and a sign that there were more; all of it if that is not longer."""
    return text if len(text) <= chars + len(_CUT) else text[:chars] + _CUT


def full_prompt(
    chat: Chat,
    turns: Sequence[tuple[str, str]],
    result: StepResult,
    config: RolloutConfig,
    compose: Prompt | None = None,
) -> list[int]:
    """A complete prompt: the first one of any episode, and all of a windowed context.

    `rollout.prompt_style` chooses its form: the conversation (`windowed_messages`), or one message that the environment
    composes. Such a message shows fewer turns where a response could otherwise not have all of its tokens.

    Args:
        chat: the tokenizer.
        turns: observation and response of each turn so far.
        result: the environment's last reply.
        config: settings.
        compose: the environment's `TaskSuite.prompt`.

    Raises:
        EnvError: the reply lists no admissible actions, and the message needs them.
    """
    if config.prompt_style == "chat":
        return chat.prompt_ids(windowed_messages(turns, result.observation, config))
    assert compose is not None, "Rollout and config.environments refuse a single message without a function for it"
    admissible = result.info.get("admissible")
    if not isinstance(admissible, list | tuple):
        raise EnvError(
            "expected the environment's admissible actions, a list, with rollout.prompt_style 'single', got "
            f"{admissible!r:.60}; start servers of --env.urls with --send-admissible, or name the field in "
            "--env.field-mapping.admissible-field"
        )
    first = turns[0][0] if turns else result.observation
    for count in range(min(config.window_turns, len(turns)), -1, -1):
        past = turns[len(turns) - count :]
        situation = Situation(first, past, len(turns) + 1, result.observation, admissible)
        ids = chat.prompt_ids(first_messages(config.instruction, compose(situation)))
        if len(ids) <= config.context_tokens - config.response_tokens:
            break
    return ids


def windowed_messages(
    turns: Sequence[tuple[str, str]], observation: str, config: RolloutConfig
) -> list[dict[str, str]]:
    """The conversation of the first observation, the last `window_turns` turns, and the new observation.

    Once the window slides, two messages of the user follow each other. `ChatTokenizer` joins them for a template that
    refuses this.
    """
    if not turns:
        return first_messages(config.instruction, observation)
    messages = first_messages(config.instruction, turns[0][0])
    recent = turns[-config.window_turns :] if config.window_turns else []
    for index, (earlier_observation, response) in enumerate(recent):
        if index or len(recent) < len(turns):
            messages.append({"role": "user", "content": earlier_observation})
        content = response if config.thinking == "keep" else without_thinking(response)
        messages.append({"role": "assistant", "content": content})
    return [*messages, {"role": "user", "content": observation}]


def num_kept(ids: Sequence[int], cached_ids: Sequence[int]) -> int:
    """Number of leading ids of a prompt that a slot with `cached_ids` keeps; at least one id is computed."""
    limit = min(len(ids) - 1, len(cached_ids))
    return next((i for i in range(limit) if ids[i] != cached_ids[i]), limit)
