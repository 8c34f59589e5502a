"""The task suite of external and user-written environments. Tasks are reset keywords, and there is no expert.

The environments run on servers that already run (`--env.urls`), on servers that a command starts (`--env.command`), or
on aem_jax's own servers with a user-written environment (`--openenv.serve my_env.py:MyEnv`).
"""

import dataclasses
import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NoReturn

from aem_jax.envs.play import Act
from aem_jax.envs.protocol import StepResult, Task
from aem_jax.envs.serving.config import PoolConfig
from aem_jax.envs.serving.pool import EnvPool
from aem_jax.envs.suite import EnvironmentSpec, Files, SuiteOptions, TaskSuite, check_one_set
from aem_jax.files import parse_mapping, read_json_lines

SEEDS: Mapping[str, int] = {"valid": 1_000_000_000, "test": 2_000_000_000}
"""Split -> its first seed. Training seeds are below all of them, and all seeds fit 32 bits."""


@dataclass(frozen=True)
class OpenEnvConfig:
    """Any environment that speaks OpenEnv's messages, and the source of its tasks.

    The environment runs on the servers of env.urls, on servers that env.command starts, or, with serve, on our own
    servers.
    """

    NAME: ClassVar[str] = "openenv"

    serve: str = ""
    """User-written environment that our servers run, as file.py:attribute or module:attribute."""
    settings: str = "{}"
    """Keyword arguments of serve: a JSON mapping."""
    seeds: int = 1000
    """Number of training tasks. They use the reset keyword seed from 0 to seeds - 1; evaluation uses other seeds."""
    tasks: str = ""
    """File of training tasks, instead of seeds: JSON lines, each a mapping of reset keywords."""
    evaluation_tasks: str = ""
    """File of evaluation tasks in the same format. Evaluation uses the first evaluation.size of them as one set, under
    the name of the only split in evaluation.splits. No training task may be among them."""
    reset: str = "{}"
    """JSON mapping of reset keywords that all tasks share."""
    actions: tuple[str, ...] = ()
    """Responses of a random agent, for environments that list no admissible ones. The agent is a baseline. Without
    model.path, the tokenizer is trained on its episodes."""

    def __post_init__(self):
        if not 1 <= self.seeds <= 10**9:
            raise ValueError(f"expected seeds from 1 to 1000000000, got {self.seeds}")


def task_suite(config: OpenEnvConfig, options: SuiteOptions) -> TaskSuite:
    """Builds the task suite of an environment that speaks OpenEnv's messages.

    Raises:
        ValueError: not exactly one setting names the environment, its tasks cannot be read, or an evaluation task is
            also a training task.
    """
    sources = {
        "--env.urls": options.pool.urls,
        "--env.command": options.pool.command,
        "--openenv.serve": config.serve,
    }
    given = [name for name, value in sources.items() if value]
    if len(given) != 1:
        raise ValueError(f"expected one of {', '.join(sources)} with openenv, got {' and '.join(given) or 'none'}")
    common = parse_mapping(config.reset, "--openenv.reset")
    settings = parse_mapping(config.settings, "--openenv.settings")
    if settings and not config.serve:
        raise ValueError(f"expected --openenv.settings with --openenv.serve alone, got {settings} with {given[0]}")
    if config.tasks:
        training = _read(config.tasks, common)
    else:
        training = Seeds(range(config.seeds), common)
    if config.tasks and options.splits and not config.evaluation_tasks:
        raise ValueError(
            "expected --openenv.evaluation-tasks with --openenv.tasks, got none; "
            "give a file, or --evaluation.splits without a value to evaluate nothing"
        )

    held_out = _held_out(config.evaluation_tasks, common, training) if config.evaluation_tasks else []
    if held_out:
        check_one_set("--openenv.evaluation-tasks", options.splits)

    def evaluation(split: str, size: int) -> tuple[Sequence[Task], str]:
        if held_out:
            tasks = held_out[:size]
        elif split in SEEDS:
            tasks = Seeds(range(SEEDS[split], SEEDS[split] + size), common)
        else:
            raise ValueError(f"--evaluation.splits: expected {' or '.join(SEEDS)} with openenv, got {split!r}")
        digest = hashlib.sha256(json.dumps([dict(task.payload) for task in tasks], sort_keys=True).encode())
        return tasks, f"{split}-{len(tasks)}-{digest.hexdigest()[:6]}"

    return TaskSuite(
        name=config.serve or config.NAME,
        settings=settings,
        training=training,
        evaluation=evaluation,
        make_env=partial(_OnePoolSession, options.pool, config.serve, settings),
        baselines={"random": partial(_random, config.actions)} if config.actions else {},
    )


class Seeds(Sequence[Task]):
    """Tasks that differ in the reset keyword `seed`. They are made on access.

    Args:
        seeds: one seed per task.
        common: the other reset keywords.
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
        """Returns the tasks whose seed is in `seeds`. Values in `seeds` that are not integers are ignored."""
        return Seeds([seed for seed in seeds if type(seed) is int and seed in self._seeds], self._common)


def _read(file: str, common: Mapping[str, Any]) -> list[Task]:
    """Reads tasks from a file of JSON lines. Each task also gets the common keywords that it does not override."""
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
    """Reads the evaluation tasks of a file, and verifies that none of them is a training task."""
    tasks = _read(file, common)
    if isinstance(training, Seeds):  # it may have a billion tasks
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


class _OnePoolSession:
    """A plain environment on top of its own pool with a single session.

    It uses servers as the run does, so an environment that prints, exits or hangs does so in another process.
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


def _paths(config: OpenEnvConfig) -> tuple[str, ...]:
    return ("tasks", "evaluation_tasks", "serve")


def _inputs(config: OpenEnvConfig) -> Mapping[str, Files]:
    code = config.serve.rpartition(":")[0]
    named = {
        "tasks": config.tasks,
        "evaluation_tasks": config.evaluation_tasks,
        "serve": code if code.endswith(".py") else "",
    }
    paths = {name: Path(value).expanduser() for name, value in named.items() if value}
    return {name: (path, [path]) for name, path in paths.items()}


def _not_served(settings: Any) -> NoReturn:
    raise ValueError("expected an environment to serve, got openenv, which names the servers of others")


OPENENV = EnvironmentSpec(
    _not_served,
    "other people's environments, and your own, behind OpenEnv's messages",
    config=OpenEnvConfig,
    suite=task_suite,
    paths=_paths,
    inputs=_inputs,
)
