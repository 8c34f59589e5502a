"""What an environment's result means for its episode: the answer that follows, and how it is recorded."""

import logging
from functools import partial

import numpy as np

from aem_jax.envs.protocol import EnvError, LostError, over_at_reset
from aem_jax.rollout.answer import Answer
from aem_jax.rollout.config import RolloutConfig
from aem_jax.rollout.episode import Chat, Episode, first_messages, windowed_ids
from aem_jax.rollout.stats import RolloutStats
from aem_jax.trajectory import Ending, Turn

log = logging.getLogger(__name__)


def listen(episode: Episode, config: RolloutConfig, chat: Chat) -> Answer:
    """Waits for the environment's answer and says what follows from it; the episode stays as it is."""
    assert episode.future is not None
    try:
        result = episode.future.result()
    except EnvError as error:
        return Answer(str(error), isinstance(error, LostError))
    heard = partial(Answer, won=result.won, score=result.score, observation=result.observation)
    if not episode.said[0]:
        if result.done:
            return Answer(over_at_reset(result), retry=False)
        ids = chat.prompt_ids(first_messages(config.instruction, result.observation))
        return heard(ids=ids, ending=Ending.TRUNCATED if len(ids) > config.prompt_tokens else None)
    said = np.concatenate(episode.said[0]).tolist()
    valid = bool(result.info.get("valid_action", True))
    heard = partial(heard, reward=float(result.reward), valid_action=valid, response=chat.decode(said))
    if result.terminated:
        return heard(ending=Ending.TERMINATED)
    if result.truncated or len(episode.turns) + 1 >= config.max_turns:
        return heard(ending=Ending.TRUNCATED)
    if config.context == "append":
        closed = said[-1] in chat.stop_ids
        keep, ids = len(episode.ids) + len(said), chat.delta_ids(result.observation, closed=closed)
    else:
        turns = [(turn.observation, turn.response) for turn in episode.turns]
        turns.append((episode.heard[1], heard.keywords["response"]))
        keep, ids = windowed_ids(
            chat,
            [*episode.ids, *said],
            turns,
            result.observation,
            config.instruction,
            config.window_turns,
            thoughts=config.thoughts == "keep",
        )
    if not ids:
        raise ValueError(
            f"expected the chat template to make ids of an observation, got none of {result.observation!r}; "
            "a response could not begin"
        )
    full = keep + len(ids) >= config.context_tokens
    return heard(keep=keep, ids=ids, ending=Ending.TRUNCATED if full else None)


def record(episode: Episode, answer: Answer, config: RolloutConfig, stats: RolloutStats) -> None:
    """Writes down the turn that was answered, and what is to be computed next."""
    if episode.said[0]:
        ids, logprobs, entropies = episode.take_response()
        heard_ids, heard_text = episode.heard
        turn = Turn(
            np.asarray(heard_ids, np.int32),
            ids,
            logprobs,
            entropies,
            answer.reward,
            answer.valid_action,
            heard_text,
            answer.response,
        )
        episode.turns.append(turn)
        episode.ids.extend(ids.tolist())
    elif answer.ending is not None:
        why = (
            f"expected a first prompt of at most rollout.prompt_tokens = {config.prompt_tokens} tokens, got "
            f"{len(answer.ids)}; raise rollout.prompt_tokens"
        )
        log.warning("task %s is left out: %s", episode.task.id, why)
        stats.first_error = stats.first_error or f"task {episode.task.id}: {why}"
        stats.overlong_prompts += 1
    if answer.ending is None:
        ids = list(answer.ids)
        heard = ids if config.context == "append" else [*episode.ids[: answer.keep], *ids]
        episode.keep, episode.pending, episode.heard = answer.keep, ids, (heard, answer.observation)
