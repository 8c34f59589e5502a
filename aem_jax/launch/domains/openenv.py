"""Other people's environments, and your own: tasks are reset keywords, and nobody knows how to solve them.

The environments run on servers that are there (`--env.urls`), on servers that a command starts (`--env.command`), or on
our own servers around an environment of yours (`--openenv.serve my_env.py:MyEnv`).
"""

import dataclasses
import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from aem_jax.config.run import RunConfig
from aem_jax.envs.play import Act
from aem_jax.envs.protocol import StepResult
from aem_jax.envs.serving.config import PoolConfig
from aem_jax.envs.serving.pool import EnvPool
from aem_jax.files import parse_json, read_json_lines
from aem_jax.launch.domains.domain import Domain, check_one_set
from aem_jax.trajectory import Task

SEEDS: Mapping[str, int] = {"valid": 1_000_000_000, "test": 2_000_000_000}
"""Split -> its first seed; training's are below all of them, and all fit 32 bits."""


def openenv(config: RunConfig) -> Domain:
    """An environment behind OpenEnv's messages.

    Raises:
        ValueError: nothing says where the environment is, its tasks cannot be read, or it would be evaluated on what it
            is trained on.
    """
    asked = config.openenv
    sources = {"--env.urls": config.env.urls, "--env.command": config.env.command, "--openenv.serve": asked.serve}
    given = [name for name, value in sources.items() if value]
    if len(given) != 1:
        raise ValueError(f"expected one of {', '.join(sources)} with openenv, got {' and '.join(given) or 'none'}")
    if config.warmstart.episodes and not config.warmstart.init_from:
        raise ValueError(
            f"--warmstart.episodes: expected 0 with openenv, got {config.warmstart.episodes}; nobody is known who "
            "could demonstrate these tasks"
        )
    common, settings = _mapping(asked.reset, "--openenv.reset"), _mapping(asked.settings, "--openenv.settings")
    if settings and not asked.serve:
        raise ValueError(f"expected --openenv.settings with --openenv.serve alone, got {settings} with {given[0]}")
    if asked.tasks:
        training = _read(asked.tasks, common)
    else:
        training = Seeds(range(asked.seeds), common)
    if asked.tasks and config.evaluation.splits and not asked.evaluation_tasks:
        raise ValueError(
            "expected --openenv.evaluation-tasks with --openenv.tasks, got none; "
            "give a file, or --evaluation.splits without a value to evaluate nothing"
        )

    held_out = _held_out(asked.evaluation_tasks, common, training) if asked.evaluation_tasks else []
    if held_out:
        check_one_set("--openenv.evaluation-tasks", config.evaluation.splits)

    def evaluation(split: str, size: int) -> tuple[Sequence[Task], str]:
        if held_out:
            tasks = held_out[:size]
        elif split in SEEDS:
            tasks = Seeds(range(SEEDS[split], SEEDS[split] + size), common)
        else:
            raise ValueError(f"--evaluation.splits: expected {' or '.join(SEEDS)} with openenv, got {split!r}")
        digest = hashlib.sha256(json.dumps([dict(task.payload) for task in tasks], sort_keys=True).encode())
        return tasks, f"{split}-{len(tasks)}-{digest.hexdigest()[:6]}"

    return Domain(
        name=asked.serve or "openenv",
        settings=settings,
        training=training,
        evaluation=evaluation,
        make_env=partial(_OfPool, config.env, asked.serve, settings),
        demonstrator=None,
        baselines={"random": partial(_random, asked.actions)} if asked.actions else {},
    )


class Seeds(Sequence[Task]):
    """Tasks that differ in the reset keyword `seed`, made when they are looked at.

    Args:
        seeds: one for each task.
        common: the other keywords.
    """

    def __init__(self, seeds: Sequence[int], common: Mapping[str, Any]):
        self._seeds, self._common = seeds, common

    def __len__(self) -> int:
        return len(self._seeds)

    def __getitem__(self, item):
        if isinstance(item, slice):
            return Seeds(self._seeds[item], self._common)
        seed = self._seeds[item]
        return Task(f"seed-{seed}", "openenv", {**self._common, "seed": seed})

    def of(self, seeds: Sequence[Any]) -> "Seeds":
        """Those of the tasks whose seed is among `seeds`, which may hold anything."""
        return Seeds([seed for seed in seeds if type(seed) is int and seed in self._seeds], self._common)


def _mapping(text: str, name: str) -> dict[str, Any]:
    found = parse_json(text, name)
    if not isinstance(found, dict):
        raise ValueError(f"{name}: expected a JSON mapping, got {text!r}")
    return found


def _read(file: str, common: Mapping[str, Any]) -> list[Task]:
    """The tasks of a file of JSON lines, each with the common keywords where it does not say otherwise."""
    tasks = []
    try:
        for line, task in read_json_lines(file):
            if not isinstance(task, dict):
                raise ValueError(f"{file} line {line}: expected a JSON mapping of reset keywords, got {task!r:.100}")
            tasks.append(task)
    except OSError as error:
        raise ValueError(f"expected a file of tasks, got {file!r}: {error}") from None
    if not tasks:
        raise ValueError(f"expected at least one task in {file}, got none")
    return [Task(f"{Path(file).stem}-{number}", "openenv", {**common, **task}) for number, task in enumerate(tasks)]


def _held_out(file: str, common: Mapping[str, Any], training: Sequence[Task]) -> list[Task]:
    """The tasks of a file, none of which is trained on."""
    tasks = _read(file, common)
    if isinstance(training, Seeds):  # there may be a billion
        training = training.of([task.payload.get("seed") for task in tasks])
    trained = {_json(task) for task in training}
    both = [task for task in tasks if _json(task) in trained]
    if both:
        raise ValueError(
            f"--openenv.evaluation-tasks: expected no task that is trained on, got {len(both)} in {file}, "
            f"{_json(both[0])} for one; take them out, or out of --openenv.tasks or --openenv.seeds"
        )
    return tasks


def _json(task: Task) -> str:
    return json.dumps(dict(task.payload), sort_keys=True)


class _OfPool:
    """The one session of a pool of its own, as a plain environment.

    What serves the run serves here too, so an environment of yours that prints, exits or hangs does it in a process of
    its own.
    """

    def __init__(self, pool: PoolConfig, serve: str, settings: Mapping[str, Any]):
        one = {"num_servers": 1, "sessions_per_server": 1, "send_admissible": True}
        self._pool = EnvPool(dataclasses.replace(pool, urls=pool.urls[:1], **one), (serve, settings))

    def reset(self, task: Mapping[str, Any]) -> StepResult:
        return self._pool.reset(0, task).result()

    def step(self, action_text: str) -> StepResult:
        return self._pool.step(0, action_text).result()

    def close(self) -> None:
        self._pool.close()


def _random(actions: Sequence[str], task: Task) -> Act:
    rng = random.Random(f"random/{task.id}")
    return lambda result: rng.choice(result.info.get("admissible") or actions)
