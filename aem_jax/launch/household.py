"""ALFWorld as a run sees it: tasks, evaluation sets, demonstrations, baselines. Another environment, another file."""

import dataclasses
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from aem_jax.envs.alfworld.engine import start
from aem_jax.envs.alfworld.env import AlfworldEnv
from aem_jax.envs.alfworld.experts import Oracle, Searcher, random_agent
from aem_jax.envs.alfworld.tasks import GameTask, eval_set, load_game, training_tasks
from aem_jax.envs.play import Act, play
from aem_jax.envs.protocol import Environment, StepResult
from aem_jax.launch.config import RunConfig
from aem_jax.trajectory import Task


@dataclass(frozen=True)
class Domain:
    """An environment and what there is to do in it.

    Attributes:
        name: in the servers' table.
        settings: of the servers' environments.
        training: tasks to train on.
        evaluation: (split, size) -> a fixed set of tasks, and its name.
        make_env: an environment in this process.
        demonstrator: a fresh expert that knows what the agent is shown, from which a policy can learn.
        baselines: agents to compare with, by name; fresh ones for each task.
    """

    name: str
    settings: Mapping[str, Any]
    training: Sequence[Task]
    evaluation: Callable[[str, int], tuple[Sequence[Task], str]]
    make_env: Callable[[], Environment]
    demonstrator: Callable[[Task], Act]
    baselines: Mapping[str, Callable[[Task], Act]]


def household(config: RunConfig) -> Domain:
    """ALFWorld: games of our own, or the official ones in `config.alfworld_data`."""
    data = config.alfworld_data or None
    make_env = lambda: AlfworldEnv(config.alfworld, load_game=load_game)  # noqa: E731

    def evaluation(split: str, size: int) -> tuple[Sequence[Task], str]:
        tasks, name = eval_set(config.games, split, size, data=data)
        return _Tasks(tasks), name

    return Domain(
        name="alfworld",
        settings=dataclasses.asdict(config.alfworld),
        training=_Tasks(training_tasks(config.games, seed=config.seed, data=data)),
        evaluation=evaluation,
        make_env=make_env,
        demonstrator=partial(_careless, config.warmstart.wander),
        baselines={"oracle": _oracle, "searcher": _searcher, "random": _random},
    )


def texts(domain: Domain, episodes: int, max_turns: int) -> Iterator[str]:
    """What the environment and its expert say in the first training tasks: a tokenizer learns from it."""
    env = domain.make_env()
    for task in domain.training[:episodes]:
        for exchange in play(env, task.payload, domain.demonstrator(task), max_turns):
            yield exchange.observation
            yield exchange.response


class _Tasks(Sequence[Task]):
    """Games as tasks, made when they are looked at."""

    def __init__(self, games: Sequence[GameTask]):
        self._games = games

    def __len__(self) -> int:
        return len(self._games)

    def __getitem__(self, item):
        if isinstance(item, slice):
            return _Tasks(self._games[item])
        game = self._games[item]
        return Task(game.id, game.kind, game.payload)


def _say(command: str) -> str:
    return f"<action>{command}</action>"


def _searcher(task: Task) -> Act:
    agent = Searcher(seed=None)
    return lambda result: _say(agent.act(result.observation))


def _careless(wander: float, task: Task) -> Act:
    """A searcher that now and then goes somewhere at random, and then goes on from there."""
    agent, rng, said = Searcher(seed=None), random.Random(f"careless/{task.id}"), None

    def act(result: StepResult) -> str:
        nonlocal said
        agent.observe(result.observation, said)
        said = agent.command()
        places = [each for each in result.info["admissible"] if each.startswith("go to ")]
        if places and rng.random() < wander:
            said = rng.choice(places)
        return _say(said)

    return act


def _oracle(task: Task) -> Act:
    """Plays along in a game of its own: the facts that it acts from are no part of what an environment says."""
    player = start(load_game(task.payload))
    agent = Oracle(player.observation)

    def act(result: StepResult) -> str:
        command = agent.act(player)
        player.step(command)
        return _say(command)

    return act


def _random(task: Task) -> Act:
    rng = random.Random(f"random/{task.id}")
    return lambda result: _say(random_agent(result.info["admissible"], rng))
