"""ALFWorld: tasks, evaluation sets, demonstrations, baselines."""

import dataclasses
import random
from collections.abc import Sequence
from functools import partial

from aem_jax.config.run import RunConfig
from aem_jax.envs.actions import as_action
from aem_jax.envs.alfworld.engine import start
from aem_jax.envs.alfworld.env import AlfworldEnv
from aem_jax.envs.alfworld.experts import Oracle, Searcher, random_agent
from aem_jax.envs.alfworld.tasks import eval_set, load_game, training_tasks
from aem_jax.envs.play import Act
from aem_jax.envs.protocol import StepResult
from aem_jax.launch.domains.domain import Domain, Tasks
from aem_jax.trajectory import Task


def alfworld(config: RunConfig) -> Domain:
    """ALFWorld: games of our own, or the official ones in `config.alfworld_data`."""
    official = {"data": config.alfworld_data or None, "skip_bad": config.alfworld_skip_bad}
    make_env = lambda: AlfworldEnv(config.alfworld, load_game=load_game)

    def evaluation(split: str, size: int) -> tuple[Sequence[Task], str]:
        tasks, name = eval_set(config.games, split, size, **official)
        return Tasks(tasks), name

    return Domain(
        name="alfworld",
        settings=dataclasses.asdict(config.alfworld),
        training=Tasks(training_tasks(config.games, seed=config.seed, **official)),
        evaluation=evaluation,
        make_env=make_env,
        demonstrator=partial(_careless, config.warmstart.wander),
        baselines={"oracle": _oracle, "searcher": _searcher, "random": _random},
    )


def _searcher(task: Task) -> Act:
    agent = Searcher(seed=None)
    return lambda result: as_action(agent.act(result.observation))


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
        return as_action(said)

    return act


def _oracle(task: Task) -> Act:
    """Plays along in a game of its own: the facts that it acts from are no part of what an environment says."""
    player = start(load_game(task.payload))
    agent = Oracle(player.observation)

    def act(result: StepResult) -> str:
        command = agent.act(player)
        player.step(command)
        return as_action(command)

    return act


def _random(task: Task) -> Act:
    rng = random.Random(f"random/{task.id}")
    return lambda result: as_action(random_agent(result.info["admissible"], rng))
