"""Bug-fixing task suites and server factories: `swe` with tools, `swe_choices` as choices among edits.

A language model uses tools; a small policy chooses among edits.
"""

import dataclasses
import random
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path

from aem_jax.envs.actions import as_action
from aem_jax.envs.play import Act, random_agent
from aem_jax.envs.protocol import StepResult, Task
from aem_jax.envs.suite import EnvironmentSpec, Files, SuiteOptions, TaskSuite, check_no_habit, check_one_set
from aem_jax.envs.swe.choices import ALL_PASS, SEVERAL, ChoicesConfig, ChoicesEnv, make_counter
from aem_jax.envs.swe.env import SweConfig, SweEnv
from aem_jax.envs.swe.sandbox.containers import Containers
from aem_jax.envs.swe.sandbox.pool import Prefetch
from aem_jax.envs.swe.sandbox.workspace import SandboxError
from aem_jax.envs.swe.tasks import (
    TasksConfig,
    check_sources,
    eval_set,
    full_payload,
    is_file,
    load_task,
    training_tasks,
)

_DRAWS = 100


def swe(config: SweConfig, options: SuiteOptions) -> TaskSuite:
    """Bug-fixing with tools in a repository: generated tasks, or SWE-bench instances from files.

    Raises:
        ValueError: files cannot be read, or do not determine the evaluation tasks.
    """
    check_sources(config.tasks, options.splits)
    if is_file(config.tasks.evaluation):
        check_one_set("--swe.tasks.evaluation", options.splits)

    def evaluation(split: str, size: int) -> tuple[Sequence[Task], str]:
        tasks, name = eval_set(config.tasks, split, size)
        return _FullTasks(tasks), name

    return TaskSuite(
        name=config.NAME,
        settings=dataclasses.asdict(config),
        training=_FullTasks(training_tasks(config.tasks, seed=options.seed)),
        evaluation=evaluation,
        make_env=lambda: make_swe(config)(),
        prepare=None
        if options.pool.urls or options.pool.command or config.runtime == "kubernetes"
        else _prefetch(config),
    )


def _prefetch(config: SweConfig) -> Callable[[Sequence[Task]], None]:
    """Returns a function that fetches and prepares the images of tasks on this host, where the run's servers are."""

    runtime = lru_cache(maxsize=1)(config.make_runtime)

    def fetch(task: Task, since: float) -> bool:
        chosen = runtime()
        if not isinstance(chosen, Containers):
            return False
        instance, checkout = load_task(task.payload)
        limits = instance.resources.of_command(config.command_limits)
        return chosen.fetch(instance, checkout, limits=limits, since=since)

    return Prefetch(fetch)


def make_swe(config: SweConfig) -> Callable[[], SweEnv]:
    """Returns a factory of environments that share one runtime.

    Raises:
        OSError: no sandbox works on this machine.
    """
    try:
        runtime = config.make_runtime()
    except SandboxError as error:
        raise OSError(str(error)) from None  # a server reports an OSError as missing on this machine
    return lambda: SweEnv(config, runtime)


class _FullTasks(Sequence[Task]):
    """Tasks with full payloads, which are built on access."""

    def __init__(self, tasks: Sequence[Task]):
        self._tasks = tasks

    def __len__(self) -> int:
        return len(self._tasks)

    def __getitem__(self, item):
        if isinstance(item, slice):
            return _FullTasks(self._tasks[item])
        task = self._tasks[item]
        return dataclasses.replace(task, payload=full_payload(task.payload))


def swe_choices(config: ChoicesConfig, options: SuiteOptions) -> TaskSuite:
    """Generated tasks as choices among edits.

    Raises:
        ValueError: the demonstrator shall think or have a habit, which it cannot.
    """
    check_no_habit(config.NAME, options)
    if options.expert_thinks:
        raise ValueError(
            f"--warmstart.expert-thinks: expected False with {config.NAME}, got True; its demonstrator gives commands "
            "only"
        )
    tasks = TasksConfig(difficulties=config.difficulties)
    named = training_tasks(tasks, seed=options.seed)
    # Each bug appears many times, with its edits in a different order.
    drawn = [
        dataclasses.replace(task, id=f"{task.id}/{draw}", payload={**task.payload, "draw": draw})
        for draw in range(_DRAWS)
        for task in named
    ]
    return TaskSuite(
        name=config.NAME,
        settings=dataclasses.asdict(config),
        training=drawn,
        evaluation=partial(eval_set, tasks),
        make_env=lambda: make_choices(config)(),
        demonstrator=partial(_tester, options.expert_noise),
        baselines={"tester": partial(_tester, 0.0), "random": random_agent},
    )


def make_choices(config: ChoicesConfig) -> Callable[[], ChoicesEnv]:
    """Returns a factory of environments that share their test results.

    Raises:
        OSError: no sandbox works on this machine.
    """
    count_failing = make_counter(config)
    return lambda: ChoicesEnv(config, count_failing)


def _tester(noise: float, task: Task) -> Act:
    """Tries one edit after the other, and keeps an edit if fewer tests fail after it.

    With probability `noise` it finishes after an edit without running the tests.
    """
    rng, last, tried, fewest = random.Random(f"tester/{task.id}"), "", 0, 1

    def choose(result: StepResult) -> str:
        nonlocal tried, fewest
        text, admissible = result.observation, result.info["admissible"]
        if not last and SEVERAL in text:
            return "run"
        if last.startswith("apply"):
            return "finish" if rng.random() < noise else "run"
        if last == "run":
            failing = 0 if text == ALL_PASS else int(text.split()[0])
            if failing == 0:
                return "finish"
            if tried and failing >= fewest:
                return "undo"
            fewest = failing
        following = [edit for edit in admissible if edit.startswith("apply") and int(edit.split()[1]) > tried]
        if not following:
            return "finish"
        tried = int(following[0].split()[1])
        return following[0]

    def act(result: StepResult) -> str:
        nonlocal last
        last = choose(result)
        return as_action(last)

    return act


def _inputs(config: SweConfig) -> Mapping[str, Files]:
    sources = {"tasks.train": config.tasks.train, "tasks.evaluation": config.tasks.evaluation}
    paths = {name: Path(source).expanduser() for name, source in sources.items() if is_file(source)}
    return {name: (path, [path]) for name, path in paths.items()}


SWE = EnvironmentSpec(
    make_swe,
    "repository bugs to fix, in a sandbox (SWE-bench style)",
    config=SweConfig,
    suite=swe,
    paths=lambda config: [*_inputs(config), "tasks.repos", "kubernetes.pod_template"],
    inputs=_inputs,
)
SWE_CHOICES = EnvironmentSpec(
    make_choices, "fixing bugs by choosing among edits", config=ChoicesConfig, suite=swe_choices
)
