"""Supervised learning on an expert's demonstrations, so that reinforcement learning starts above zero."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np

from aem_jax.batch import BatchLayout, collate
from aem_jax.envs.play import Act, play, play_each
from aem_jax.envs.protocol import Environment
from aem_jax.rollout.episode import first_messages
from aem_jax.trajectory import Ending, Task, Trajectory, Turn

log = logging.getLogger(__name__)

Item = TypeVar("Item")


@dataclass(frozen=True)
class WarmstartConfig:
    """How much is learnt from demonstrations."""

    episodes: int = 0
    """Demonstrations; 0 leaves the warm start out."""
    steps: int = 200
    """Optimizer steps over them."""
    batch_episodes: int = 64
    """Demonstrations of one step."""
    learning_rate: float = 1e-3
    """Peak learning rate; rises over the first tenth, then falls along half a cosine."""
    expert_noise: float = 0.0
    """Share of turns in which the demonstrator errs on purpose (goes to a random place, buys without comparing,
    finishes untested), so that the policy has something left to learn from reward."""
    only_won: bool = True
    """Leave out episodes that the expert lost."""
    begin_from: str = ""
    """Folder of another run, in place of demonstrations: training begins with its parameters at step 0 and with its
    tokenizer. Model and tokenizer settings must be the same; no LoRA."""


def demonstrate(env: Environment, act: Act, task: Task, chat: Any, *, instruction: str, max_turns: int) -> Trajectory:
    """One expert episode as a trajectory in the append context: the ids that a policy would have heard and said.

    Logprobs and entropies are zero: nobody sampled these responses.
    """
    exchanges = play(env, task.payload, act, max_turns)
    turns: list[Turn] = []
    stop = np.asarray([chat.stop_ids[0]], np.int32)
    for exchange in exchanges:
        if turns:
            heard = chat.delta_ids(exchange.observation, closed=True)
        else:
            heard = chat.prompt_ids(first_messages(instruction, exchange.observation))
        said = np.concatenate([np.asarray(chat.encode(exchange.response), np.int32), stop])
        blank = np.zeros(len(said), np.float32)
        valid = bool(exchange.result.info.get("valid_action", True))
        turns.append(
            Turn(
                np.asarray(heard, np.int32),
                said,
                blank,
                blank,
                exchange.result.reward,
                valid,
                exchange.observation,
                exchange.response,
            )
        )
    last = exchanges[-1].result if exchanges else None
    ending = Ending.TERMINATED if last is not None and last.terminated else Ending.TRUNCATED
    won, score = (last.won, last.score) if last is not None else (False, 0.0)
    return Trajectory(task, 0, 0, tuple(turns), ending, won, score=score)


def demonstrations(
    env: Environment,
    make_act: Callable[[Task], Act],
    tasks: Sequence[Task],
    chat: Any,
    *,
    instruction: str,
    max_turns: int,
) -> Iterator[Trajectory | None]:
    """An expert's episode of each task (`demonstrate`); None where the task broke its environment.

    Raises:
        EnvError: all tasks did; with the first error.
    """
    show = lambda task: demonstrate(  # noqa: E731
        env, make_act(task), task, chat, instruction=instruction, max_turns=max_turns
    )
    return (episode for _, episode in play_each(tasks, show))


def fitting(episodes: Sequence[Trajectory], limit: int) -> list[Trajectory]:
    """The episodes of at most `limit` tokens; where there are none, of each the first turns that have no more."""
    whole = [episode for episode in episodes if _num_tokens(episode.turns) <= limit]
    if whole or not episodes:
        return whole
    log.warning(
        "all %d demonstrations are longer than rollout.context_tokens = %d (the shortest has %d tokens), so only their "
        "first turns are learnt from; raise rollout.context_tokens",
        len(episodes),
        limit,
        min(_num_tokens(episode.turns) for episode in episodes),
    )
    cuts = (_first_turns(episode.turns, limit) for episode in episodes)
    cut = [replace(each, turns=turns, ending=Ending.TRUNCATED) for each, turns in zip(episodes, cuts, strict=True)]
    return [episode for episode in cut if episode.turns]


def _num_tokens(turns: Sequence[Turn]) -> int:
    return sum(len(turn.observation_ids) + len(turn.response_ids) for turn in turns)


def _first_turns(turns: tuple[Turn, ...], limit: int) -> tuple[Turn, ...]:
    """As many leading turns as have at most `limit` tokens."""
    count = 0
    while count < len(turns) and _num_tokens(turns[: count + 1]) <= limit:
        count += 1
    return turns[:count]


def shuffled_batches(items: Sequence[Item], size: int, seed: int) -> Iterator[list[Item]]:
    """Batches of `size` without end: each pass over the items in a new order, which seed and pass alone decide."""
    if not items:
        raise ValueError(
            "expected at least one demonstration, got none; the expert won no episode, or warmstart.episodes is 0"
        )
    order: list[int] = []
    epoch = 0
    while True:
        while len(order) < size:
            order.extend(np.random.default_rng((seed, epoch)).permutation(len(items)).tolist())
            epoch += 1
        yield [items[i] for i in order[:size]]
        del order[:size]


def warmstart(
    state: Any,
    demonstrations: Sequence[Trajectory],
    *,
    update: Callable[[Any, Any], tuple[Any, dict[str, Any]]],
    place: Callable[[Any], Any],
    layout: BatchLayout,
    config: WarmstartConfig,
    seed: int,
    report: Callable[[int, dict[str, Any]], None],
) -> Any:
    """Fits the policy to demonstrations.

    Args:
        state: the learner's state; donated.
        demonstrations: expert episodes.
        update: supervised update, `(state, batch) -> (state, stats)`.
        place: puts a batch on the mesh.
        layout: sizes of a batch of `config.batch_episodes` episodes.
        config: how long.
        seed: order of the demonstrations.
        report: called with (step, stats) after each step.

    Returns:
        The fitted state.
    """
    batches = shuffled_batches(demonstrations, config.batch_episodes, seed)
    for step in range(config.steps):
        state, stats = update(state, place(collate(next(batches), layout)))
        report(step, stats)
    return state
