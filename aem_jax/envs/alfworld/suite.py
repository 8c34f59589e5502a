"""The ALFWorld task suite for runs and servers: tasks, evaluation sets, the demonstrator and the baselines."""

import dataclasses
import os
import random
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from aem_jax.envs.actions import as_action, as_thought
from aem_jax.envs.alfworld.engine import Player
from aem_jax.envs.alfworld.env import AlfworldConfig, AlfworldEnv
from aem_jax.envs.alfworld.experts import Oracle, Searcher, next_on_round
from aem_jax.envs.alfworld.prompt import prompt
from aem_jax.envs.alfworld.tasks import eval_set, load_game, training_tasks
from aem_jax.envs.alfworld.thoughts import thought
from aem_jax.envs.play import Act, random_agent
from aem_jax.envs.protocol import StepResult, Task
from aem_jax.envs.suite import EnvironmentSpec, Files, SuiteOptions, TaskSuite


def task_suite(config: AlfworldConfig, options: SuiteOptions) -> TaskSuite:
    """Builds the task suite from generated games, or from the official games in `config.data`."""
    official = {"data": config.data or None, "skip_bad": config.skip_bad}

    def evaluation(split: str, size: int) -> tuple[Sequence[Task], str]:
        return eval_set(config.games, split, size, **official)

    return TaskSuite(
        name=config.NAME,
        settings=dataclasses.asdict(config),
        training=training_tasks(config.games, seed=options.seed, **official),
        evaluation=evaluation,
        prompt=prompt,
        make_env=make(config),
        demonstrator=partial(_imperfect_searcher, options),
        baselines={"oracle": _oracle, "searcher": _searcher, "random": random_agent},
    )


def make(config: AlfworldConfig) -> Callable[[], AlfworldEnv]:
    """Returns a factory of environments that play generated and official games."""
    return lambda: AlfworldEnv(config)


def _searcher(task: Task) -> Act:
    agent = Searcher(seed=None)
    return lambda result: as_action(agent.act(result.observation))


def _imperfect_searcher(options: SuiteOptions, task: Task) -> Act:
    """Makes a searcher that errs, and continues from there.

    In a fraction `expert_noise` of its turns it goes to a random place. In a fraction `expert_habit` of its walks it
    goes to the next place of the room's list, and so arrives later. If it thinks, it says before each command why it
    gives it, also for an error.
    """
    agent, rng, command = Searcher(seed=None), random.Random(f"careless/{task.id}"), None
    # Separate generators: the other draws are those of a silent searcher, and of one without a habit.
    wording, rounds = random.Random(f"thoughts/{task.id}"), random.Random(f"habit/{task.id}")

    def act(result: StepResult) -> str:
        nonlocal command
        agent.observe(result.observation, command)
        command = agent.command()
        on_round = command.startswith("go to ") and rounds.random() < options.expert_habit
        if on_round:
            walk = f"go to {next_on_round(agent.known)}"
            on_round = walk in result.info["admissible"]  # it is not where that receptacle is within reach already
            command = walk if on_round else command
        places = [action for action in result.info["admissible"] if action.startswith("go to ")]
        if places and rng.random() < options.expert_noise:
            command, on_round = rng.choice(places), False
        if not options.expert_thinks:
            return as_action(command)
        return as_thought(thought(agent.goal, agent.known, command, wording, on_round), command)

    return act


def _oracle(task: Task) -> Act:
    """Makes an oracle. It plays the game in its own engine, because the environment does not send its facts."""
    player = Player(load_game(task.payload))
    agent = Oracle(player.observation)

    def act(result: StepResult) -> str:
        command = agent.act(player)
        player.step(command)
        return as_action(command)

    return act


def _inputs(config: AlfworldConfig) -> Mapping[str, Files]:
    if not config.data:
        return {}
    root = Path(config.data).expanduser()
    names = ("game.tw-pddl", "traj_data.json")
    files = [path for games in root.glob("json_*") for name in names for path in games.rglob(name)]
    return {"data": (root, sorted(files) if root.is_dir() else [root])}


def _from_environ(config: AlfworldConfig) -> AlfworldConfig:
    """Reads ALFWORLD_DATA. No other code reads the variable, so the run's folder records the games of the run."""
    return dataclasses.replace(config, data=config.data or os.environ.get("ALFWORLD_DATA", ""))


ALFWORLD = EnvironmentSpec(
    make,
    "household tasks in text (ALFWorld)",
    config=AlfworldConfig,
    blocking=False,
    suite=task_suite,
    paths=lambda config: ("data",),
    inputs=_inputs,
    from_environ=_from_environ,
)
