"""Warm start: supervised learning on an expert's demonstrations, before reinforcement learning."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
from jax.sharding import Mesh

from aem_jax.batch import BatchLayout, collate, place
from aem_jax.envs.play import Act, play, play_each
from aem_jax.envs.prompt import Prompt
from aem_jax.envs.protocol import Environment, StepResult, Task
from aem_jax.rollout.config import RolloutConfig
from aem_jax.rollout.context import compact_prompt, full_prompt
from aem_jax.trajectory import Ending, Trajectory, Turn

log = logging.getLogger(__name__)

Item = TypeVar("Item")


@dataclass(frozen=True)
class WarmstartConfig:
    """The warm start: supervised learning on demonstrations, before reinforcement learning."""

    episodes: int = 0
    """Number of demonstrations; 0 disables the warm start."""
    steps: int = 200
    """Optimizer steps."""
    batch_episodes: int = 64
    """Demonstrations in the batch of one step."""
    learning_rate: float = 1e-3
    """Peak learning rate; linear warm-up over the first tenth, then cosine decay."""
    expert_noise: float = 0.0
    """Share of turns in which the demonstrator errs on purpose (a random place, a hasty purchase, no test), so that the
    policy can still learn from reward."""
    expert_thinks: bool = False
    """Whether the demonstrator (of ALFWorld or WebShop) thinks before it acts, in <think>…</think>, in varied words
    that follow from its knowledge."""
    expert_habit: float = 0.0
    """Share of walks in which ALFWorld's demonstrator goes to the next place in the room's list, whatever it looks for:
    an error that the policy learns with little entropy."""
    only_successful: bool = True
    """Use successful demonstrations only."""
    init_from: str = ""
    """Folder of another run to start from in place of demonstrations: its parameters at step 0 and its tokenizer. The
    settings of model, LoRA and tokenizer must be equal. With LoRA only with --model.path."""

    def __post_init__(self) -> None:
        for name in ("expert_noise", "expert_habit"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"expected warmstart.{name} in [0, 1], got {getattr(self, name)}")
        if self.episodes < 0:
            raise ValueError(f"expected warmstart.episodes >= 0, got {self.episodes}; 0 disables the warm start")
        for name in ("steps", "batch_episodes"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected warmstart.{name} >= 1, got {getattr(self, name)}")


def demonstrate(
    env: Environment, act: Act, task: Task, chat: Any, config: RolloutConfig, compose: Prompt | None = None
) -> Trajectory:
    """One expert episode as a trajectory in the rollout's context, with the ids of a policy's episode.

    Logprobs and entropies are zero, since the responses were not sampled. `compose` is the environment's
    `TaskSuite.prompt`.
    """
    results: list[StepResult] = []

    def recorded(result: StepResult) -> str:
        results.append(result)
        return act(result)

    exchanges = play(env, task.payload, recorded, config.max_turns)
    turns: list[Turn] = []
    for result, exchange in zip(results, exchanges, strict=True):
        if turns and config.context == "append":
            observation_ids = chat.delta_ids(exchange.observation, closed=True)
        elif turns and config.context == "compact":
            past = [(turn.observation, turn.response_ids.tolist()) for turn in turns]
            shown = [*turns[-1].observation_ids.tolist(), *turns[-1].response_ids.tolist()]
            first = turns[0].observation_ids.tolist()
            observation_ids = compact_prompt(chat, first, past, shown, exchange.observation, config)
        else:
            shown = [(turn.observation, turn.response) for turn in turns]
            observation_ids = full_prompt(chat, shown, result, config, compose)
        response_ids = np.asarray(chat.response_ids(exchange.response), np.int32)
        zeros = np.zeros(len(response_ids), np.float32)
        turns.append(
            Turn(
                observation_ids=np.asarray(observation_ids, np.int32),
                response_ids=response_ids,
                logprobs=zeros,
                entropies=zeros,
                reward=exchange.result.reward,
                valid_action=bool(exchange.result.info.get("valid_action", True)),
                observation=exchange.observation,
                response=exchange.response,
            )
        )
    last = exchanges[-1].result if exchanges else None
    ending = Ending.TERMINATED if last is not None and last.terminated else Ending.TRUNCATED
    success, score = (last.won, last.score) if last is not None else (False, 0.0)
    return Trajectory(task, 0, 0, tuple(turns), ending, success, score=score, context=config.context)


def demonstrations(
    env: Environment,
    make_act: Callable[[Task], Act],
    tasks: Sequence[Task],
    chat: Any,
    config: RolloutConfig,
    compose: Prompt | None = None,
) -> Iterator[Trajectory | None]:
    """An expert's episode of each task (`demonstrate`); None where the environment broke.

    Raises:
        EnvError: the environment broke in all tasks; with the first error.
    """
    play_task = lambda task: demonstrate(env, make_act(task), task, chat, config, compose)
    return (episode for _, episode in play_each(tasks, play_task))


def fitting(episodes: Sequence[Trajectory], limit: int) -> list[Trajectory]:
    """The episodes whose sequences have at most `limit` tokens: the episode, or each turn of a windowed context. Where
    there are none, the leading turns of each within the limit."""
    longest = lambda episode: max(map(_num_tokens, _sequences(episode.turns, episode.context)))
    short = [episode for episode in episodes if longest(episode) <= limit]
    if short or not episodes:
        return short
    log.warning(
        "all %d demonstrations are longer than rollout.context_tokens = %d (the shortest has %d tokens), so only their "
        "first turns are learnt from; raise rollout.context_tokens",
        len(episodes),
        limit,
        min(map(longest, episodes)),
    )
    cut = [replace(e, turns=_first_turns(e, limit), ending=Ending.TRUNCATED) for e in episodes]
    return [episode for episode in cut if episode.turns]


def warn_of_long_responses(episodes: Sequence[Trajectory], limit: int) -> None:
    """Warns if responses have more than `limit` tokens: a policy that learns them cannot finish them."""
    lengths = [len(turn.response_ids) for episode in episodes for turn in episode.turns]
    if long := sum(length > limit for length in lengths):
        log.warning(
            "%d of the %d demonstrated responses are longer than rollout.response_tokens = %d (the longest has %d "
            "tokens), so the policy learns responses that it cannot finish; raise rollout.response_tokens",
            long,
            len(lengths),
            limit,
            max(lengths),
        )


def _num_tokens(turns: Sequence[Turn]) -> int:
    return sum(len(turn.observation_ids) + len(turn.response_ids) for turn in turns)


def _sequences(turns: tuple[Turn, ...], context: str) -> list[tuple[Turn, ...]]:
    """The turns of each sequence that the learner sees."""
    return [turns] if context == "append" else [(turn,) for turn in turns]


def _first_turns(episode: Trajectory, limit: int) -> tuple[Turn, ...]:
    """As many leading turns as have sequences of at most `limit` tokens."""
    turns, count = episode.turns, 0
    while count < len(turns) and _num_tokens(_sequences(turns[: count + 1], episode.context)[-1]) <= limit:
        count += 1
    return turns[:count]


def shuffled_batches(items: Sequence[Item], size: int, seed: int) -> Iterator[list[Item]]:
    """Infinite batches of `size`: each pass is a permutation of the items that depends on seed and pass alone."""
    if not items:
        raise ValueError(
            "expected at least one demonstration, got none; the expert solved no task, or warmstart.episodes is 0"
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
    layout: BatchLayout,
    mesh: Mesh,
    config: WarmstartConfig,
    seed: int,
    report: Callable[[int, dict[str, Any]], None],
) -> Any:
    """Fits the policy to demonstrations.

    Args:
        state: the learner's state; donated.
        demonstrations: expert episodes.
        update: supervised update, `(state, batch) -> (state, metrics)`.
        layout: sizes of a batch of `config.batch_episodes` episodes.
        mesh: the device mesh.
        config: steps and batch size.
        seed: of the order of the demonstrations.
        report: called with (step, metrics) after each step.

    Returns:
        The fitted state.
    """
    batches = shuffled_batches(demonstrations, config.batch_episodes, seed)
    for step in range(config.steps):
        state, metrics = update(state, place(collate(next(batches), layout), mesh))
        report(step, metrics)
    return state
