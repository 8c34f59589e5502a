"""One episode of a rollout: its state in a slot, the reply of its environment, and the transitions between states.

States are frozen; every change is a method of `Episode`. An episode repeats this cycle until it ends:

    environment's reply → apply_reply → prefilled → append_sampled, until the budget is 0 → environment's reply → …
"""

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from aem_jax.envs.prompt import Prompt
from aem_jax.envs.protocol import EnvError, LostError, StepResult, Task, over_at_reset
from aem_jax.rollout.config import RolloutConfig
from aem_jax.rollout.context import Chat, appended_prompt, compact_prompt, full_prompt, num_kept
from aem_jax.trajectory import Ending, Trajectory, Turn

_QUARANTINE_LOSSES = 2

Sampled = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
"""Ids i32[n], logprobs f32[n], entropies f32[n] and versions i32[n] (`Turn.versions`) of some sampled tokens."""


@dataclass(frozen=True, eq=False)
class Attempt:
    """One attempt at an episode, as the queue holds it.

    Attributes:
        task: the task.
        group: index of its rollout group in this step; with carry-over, its number in the run.
        member: index in the group.
        prng: u32[2], the episode's key data.
        retries: earlier attempts that failed by themselves, or in quarantine.
        server_losses: earlier attempts that were lost because their server failed.
    """

    task: Task
    group: int
    member: int
    prng: np.ndarray
    retries: int = 0
    server_losses: int = 0

    @property
    def quarantined(self) -> bool:
        """Whether its servers failed so often that the episode may be the cause.

        A server plays quarantined episodes one at a time. So a task that kills its server is detected, and the
        episodes lost with the server are not masked.
        """
        return self.server_losses >= _QUARANTINE_LOSSES

    def retry(self, *, count_retry: bool) -> "Attempt":
        """The next attempt at the same episode; the failed one counts as a retry, or else as a server loss."""
        if count_retry:
            return replace(self, retries=self.retries + 1)
        return replace(self, server_losses=self.server_losses + 1)


@dataclass(frozen=True)
class Observation:
    """The input of the model before a response.

    Attributes:
        text: the environment's text.
        keep: leading ids of the slot that stay.
        prefill_tokens: ids that are appended to these.
        max_tokens: most tokens of the response, below `rollout.response_tokens`; 0: that many.
    """

    text: str
    keep: int
    prefill_tokens: tuple[int, ...]
    max_tokens: int = 0


@dataclass(frozen=True)
class EnvReply:
    """The outcome of an environment call, with the ids of the next observation. It can be sent as JSON.

    Attributes:
        error: reason why the call failed; None if it succeeded. A failed call sets this and the next three fields only.
        lost: whether the call failed with its server.
        retryable: whether another attempt at a failed episode may succeed.
        restarted: whether the attempt begins again in its slot, as it was: no environment failed (`replay`).
        reward: reward of the response.
        valid_action: whether the environment understood the response.
        success: whether the task is solved.
        score: the task's own score.
        response: text of the response.
        observation: text of the observation.
        ending: how the episode ended; None while it continues.
        keep: leading ids of the slot that stay.
        prefill_tokens: ids that the model reads next, behind those.
        max_tokens: most tokens of the next response (`Observation.max_tokens`).
        received: whether anybody received the response. Otherwise it is no part of the episode.
        branches: whether the next prompt does not continue the latest response (0 or 1).
        rematched: earlier responses in the next prompt that were sent back with changes that do not matter.
        num_received: leading ids of the response that were received, if not all.
    """

    error: str | None = None
    lost: bool = False
    retryable: bool = True
    restarted: bool = False
    reward: float = 0.0
    valid_action: bool = True
    success: bool = False
    score: float = 0.0
    response: str = ""
    observation: str = ""
    ending: Ending | None = None
    keep: int = 0
    prefill_tokens: Sequence[int] = ()
    max_tokens: int = 0
    received: bool = True
    branches: int = 0
    rematched: int = 0
    num_received: int | None = None


@dataclass(frozen=True, eq=False)
class Episode:
    """The state of an episode in a slot.

    Attributes:
        attempt: the attempt that is played.
        turns: finished turns.
        cached_ids: ids that the slot holds, without the response being sampled.
        observation: the observation to respond to; None until the environment is reset.
        needs_prefill: whether the observation's ids are not in the slot yet.
        response: the response being sampled, in chunks.
        budget: tokens that the response may still have; 0 while none is being sampled.
        num_prompts: observations so far, those of responses that nobody received included.
        has_surplus: whether the slot may hold ids behind `cached_ids`, of a response that was not received in full.
        experts: integers [T, layers · experts per token], the experts of the slot's tokens with the response that
            waits for its reply; None before its end, and if they are not recorded.
    """

    attempt: Attempt
    turns: tuple[Turn, ...] = ()
    cached_ids: tuple[int, ...] = ()
    observation: Observation | None = None
    needs_prefill: bool = False
    response: tuple[Sampled, ...] = ()
    budget: int = 0
    num_prompts: int = 0
    has_surplus: bool = False
    experts: Any = None

    @property
    def num_tokens(self) -> int:
        """Tokens of the slot, the response being sampled included."""
        return len(self.cached_ids) + sum(len(ids) for ids, *_ in self.response)

    @property
    def context_ids(self) -> tuple[int, ...]:
        """All ids that the model sees before the next token, from the first on."""
        assert self.observation is not None
        if self.needs_prefill:
            return (*self.cached_ids[: self.observation.keep], *self.observation.prefill_tokens)
        return (*self.cached_ids, *(self.response_ids if self.response else ()))

    @property
    def num_kept(self) -> int:
        """Leading ids of these that the slot holds, unless it is out of date."""
        assert self.observation is not None
        return self.observation.keep if self.needs_prefill else self.num_tokens

    @property
    def num_sampled(self) -> int:
        """Tokens sampled so far, of all responses."""
        return sum(len(turn.response_ids) for turn in self.turns) + sum(len(ids) for ids, *_ in self.response)

    def next_index(self, response_tokens: int) -> int:
        """Index in the key's sequence of the next token, where responses may have been cut short (context "tree").

        How many tokens were sampled behind a stop text depends on the clock. Nobody received them, so their indices
        are used again. A cancelled response takes all the indices that it may have used: its client has seen it.

        Args:
            response_tokens: most tokens of a response.
        """
        cancelled = self.num_prompts - 1 - len(self.turns)
        return self.num_sampled + cancelled * response_tokens

    @property
    def response_ids(self) -> list[int]:
        """Ids of the response being sampled."""
        return np.concatenate([ids for ids, *_ in self.response]).tolist()

    def apply_reply(self, reply: EnvReply, context: str) -> "Episode":
        """Finishes the turn that was replied to, and sets the next observation unless the episode ended.

        Args:
            reply: a reply without an error.
            context: `rollout.context`.
        """
        if not reply.received:
            episode = replace(self._with_reward(reply.reward), response=(), budget=0, has_surplus=True, experts=None)
        else:
            episode = self._finish_turn(reply, context) if self.response else self
        if reply.ending is not None:
            return episode
        observation = Observation(reply.observation, reply.keep, tuple(reply.prefill_tokens), reply.max_tokens)
        return replace(episode, observation=observation, needs_prefill=True, num_prompts=self.num_prompts + 1)

    def _with_reward(self, reward: float) -> "Episode":
        """Adds a reward to the last turn."""
        if not reward:
            return self
        last = self.turns[-1]
        return replace(self, turns=(*self.turns[:-1], replace(last, reward=last.reward + reward)))

    def _finish_turn(self, reply: EnvReply, context: str) -> "Episode":
        assert self.observation is not None
        received = slice(reply.num_received)
        ids, logprobs, entropies, versions = (
            np.concatenate(chunks)[received] for chunks in zip(*self.response, strict=True)
        )
        turn = Turn(
            np.asarray(self.observation.prefill_tokens if context == "append" else self.cached_ids, np.int32),
            ids,
            logprobs,
            entropies,
            reply.reward,
            reply.valid_action,
            self.observation.text,
            reply.response,
            versions,
            None if self.experts is None else np.asarray(self.experts)[: len(self.cached_ids) + len(ids)].copy(),
        )
        cached_ids = (*self.cached_ids, *ids.tolist())
        has_surplus = reply.num_received is not None
        turns = (*self.turns, turn)
        if context == "append" and turn.experts is not None:
            turns = _split_experts(turns, turn.experts)
        changes = {"turns": turns, "cached_ids": cached_ids, "has_surplus": has_surplus}
        return replace(self, **changes, response=(), budget=0, experts=None)

    def forked(self, count: int) -> "Episode":
        """Marks the first `count` ids of the first prompt as held by the slot."""
        assert self.observation is not None
        ids = self.observation.prefill_tokens
        observation = replace(self.observation, keep=count, prefill_tokens=ids[count:])
        return replace(self, cached_ids=ids[:count], observation=observation)

    def prefilled(self, config: RolloutConfig) -> "Episode":
        """Marks the observation as prefilled, and sets the budget of the response."""
        assert self.observation is not None
        cached_ids = (*self.cached_ids[: self.observation.keep], *self.observation.prefill_tokens)
        budget = min(
            self.observation.max_tokens or config.response_tokens,
            config.response_tokens,
            config.context_tokens - len(cached_ids),
        )
        return replace(self, cached_ids=cached_ids, needs_prefill=False, budget=budget, has_surplus=False)

    def append_sampled(self, sampled: Sampled, *, finished: bool) -> "Episode":
        """Appends tokens to the response; `finished`: the last token ends it."""
        budget = 0 if finished else self.budget - len(sampled[0])
        return replace(self, response=(*self.response, sampled), budget=budget)

    def trajectory(self, ending: Ending, context: str, success: bool = False, score: float = 0.0) -> Trajectory:
        """The trajectory of an episode that ended."""
        attempt = self.attempt
        return Trajectory(
            attempt.task,
            attempt.group,
            attempt.member,
            self.turns,
            ending,
            success,
            retries=attempt.retries + attempt.server_losses,
            context=context,
            score=score,
        )


def _split_experts(turns: Sequence[Turn], experts: np.ndarray) -> tuple[Turn, ...]:
    """Turns that share one sequence, each with its part of the sequence's experts.

    Earlier turns get theirs again: with carry-over, the sequence may have been computed again since.
    """
    lengths = [len(turn.observation_ids) + len(turn.response_ids) for turn in turns]
    parts = np.split(experts, np.cumsum(lengths)[:-1])
    return tuple(replace(turn, experts=part) for turn, part in zip(turns, parts, strict=True))


def observe(
    episode: Episode, call: Future[StepResult], config: RolloutConfig, chat: Chat, compose: Prompt | None = None
) -> EnvReply:
    """Waits for an environment call of an episode, and derives its ending or the ids of its next observation.

    Args:
        episode: the episode, whose response is complete.
        call: the call that was made for it.
        config: settings.
        chat: the tokenizer.
        compose: the environment's `TaskSuite.prompt`.

    Raises:
        ValueError: the chat template makes no ids of an observation.
        EnvError: the reply has no admissible actions, and the prompt needs them.
    """
    try:
        result = call.result()
    except EnvError as error:
        return EnvReply(str(error), isinstance(error, LostError))
    reply = partial(EnvReply, success=result.won, score=result.score, observation=result.observation)
    if episode.observation is None:
        if result.done:
            return EnvReply(over_at_reset(result), retryable=False)
        if config.context == "tree":
            return reply(prefill_tokens=list(result.info["prompt_ids"]), max_tokens=result.info["max_tokens"])
        ids = full_prompt(chat, (), result, config, compose)
        return reply(prefill_tokens=ids, ending=Ending.TRUNCATED if len(ids) > config.prompt_tokens else None)
    if config.context == "tree":
        return _observe_prompt(episode, result, chat)
    response_ids = episode.response_ids
    response = chat.decode(response_ids)
    valid_action = bool(result.info.get("valid_action", True))
    reply = partial(reply, reward=float(result.reward), valid_action=valid_action, response=response)
    if result.terminated:
        return reply(ending=Ending.TERMINATED)
    if result.truncated or len(episode.turns) + 1 >= config.max_turns:
        return reply(ending=Ending.TRUNCATED)
    if config.context == "append":
        keep, ids = appended_prompt(chat, len(episode.cached_ids), response_ids, result.observation)
    else:
        shown = [*episode.cached_ids, *response_ids]
        if config.context == "compact":
            first = episode.turns[0].observation_ids.tolist() if episode.turns else episode.cached_ids
            past = [(turn.observation, turn.response_ids.tolist()) for turn in episode.turns]
            past.append((episode.observation.text, response_ids))
            ids = compact_prompt(chat, first, past, shown, result.observation, config)
        else:
            turns = [(turn.observation, turn.response) for turn in episode.turns]
            ids = full_prompt(chat, [*turns, (episode.observation.text, response)], result, config, compose)
        keep = num_kept(ids, shown)
        ids = ids[keep:]
    if not ids:
        raise ValueError(
            f"expected the chat template to make ids of an observation, got none of {result.observation!r}; "
            "a response could not begin"
        )
    full = keep + len(ids) >= config.context_tokens
    return reply(keep=keep, prefill_tokens=ids, ending=Ending.TRUNCATED if full else None)


def _observe_prompt(episode: Episode, result: StepResult, chat: Chat) -> EnvReply:
    """The reply that is an agent's next prompt, or its end."""
    info, sampled = result.info, episode.response_ids if episode.response else []
    received, count = bool(info["received"]), info["num_received"]
    sampled = sampled[:count] if received else []
    reply = partial(
        EnvReply,
        reward=float(result.reward),
        valid_action=bool(info.get("valid_action", True)),
        success=result.won,
        score=result.score,
        response=chat.decode(sampled),
        observation=result.observation,
        received=received,
        num_received=count,
    )
    if result.done:
        return reply(ending=Ending.TERMINATED if result.terminated else Ending.TRUNCATED)
    ids = list(info["prompt_ids"])
    keep = num_kept(ids, [*episode.cached_ids, *sampled])
    counts = {"branches": info["branches"], "rematched": info["rematched"]}
    return reply(keep=keep, prefill_tokens=ids[keep:], max_tokens=info["max_tokens"], **counts)
