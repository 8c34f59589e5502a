"""Harbor's task suite and its server factory."""

import dataclasses
import hashlib
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from aem_jax.envs.harbor.config import HarborConfig
from aem_jax.envs.harbor.env import HarborEnv
from aem_jax.envs.harbor.files import digest, files_of
from aem_jax.envs.harbor.sandbox import Sandboxes
from aem_jax.envs.harbor.task import HarborTask, read_task, read_tasks
from aem_jax.envs.play import Act
from aem_jax.envs.protocol import Task
from aem_jax.envs.suite import EnvironmentSpec, Files, SuiteOptions, TaskSuite, check_no_habit, check_one_set, set_name
from aem_jax.envs.swe.sandbox.pool import Prefetch
from aem_jax.envs.swe.sandbox.workspace import SandboxError

FINISH = "<function=finish>\n</function>"


def harbor(config: HarborConfig, options: SuiteOptions) -> TaskSuite:
    """Tasks of a folder, and an evaluation set: another folder, or a part of the first that is held out.

    Raises:
        ValueError: tasks are refused, there are none, or deadlines of `env` are shorter than a task's time limits.
    """
    check_no_habit(config.NAME, options)
    if not config.tasks:
        raise ValueError(
            "--harbor.tasks: expected a folder of Harbor tasks (each with task.toml, instruction.md and "
            "tests/test.sh), got none"
        )
    sources = _read(config)
    every = [task for tasks in sources.values() for task in tasks]
    _check_deadlines(config, options, every)
    if "evaluation" in sources:
        check_one_set("--harbor.evaluation", options.splits)
        names = {task.name for task in sources["tasks"]}
        if both := [task.name for task in sources["evaluation"] if task.name in names]:
            raise ValueError(
                f"--harbor.evaluation: expected no task of --harbor.tasks, got {len(both)} ({', '.join(both[:3])}"
                f"{', …' if len(both) > 3 else ''}); leave them out of one of the folders"
            )
        parts = dict.fromkeys(options.splits, sources["evaluation"]) | {"train": sources["tasks"]}
    else:
        parts = split_tasks(sources["tasks"], config.held_out)
        for name in options.splits:
            _check_split(name, parts, config)
    training = _as_tasks(parts["train"])
    random.Random(f"training order/{options.seed}").shuffle(training)

    def evaluation(split: str, size: int) -> tuple[Sequence[Task], str]:
        if size < 1:
            raise ValueError(f"expected size >= 1, got {size}")
        _check_split(split, parts, config)
        tasks = parts[split]
        count = min(size, len(tasks))
        chosen = [tasks[i * len(tasks) // count] for i in range(count)]
        return _as_tasks(chosen), set_name(split, count, (digest(task.folder).encode() for task in chosen))

    return TaskSuite(
        name=config.NAME,
        settings=dataclasses.asdict(config),
        training=training,
        evaluation=evaluation,
        make_env=lambda: make_harbor(config)(),
        baselines={"empty": _finish},
        prepare=None if options.pool.urls or options.pool.command else _prefetch(config),
    )


def _prefetch(config: HarborConfig) -> Callable[[Sequence[Task]], None]:
    """Returns a function that fetches and builds the images of tasks on this host, where the run's servers are."""
    sandboxes = Sandboxes(config)

    def fetch(task: Task, since: float) -> bool:
        return sandboxes.fetch(read_task(task.payload["folder"]), since)

    return Prefetch(fetch)


def make_harbor(config: HarborConfig) -> Callable[[], HarborEnv]:
    """Returns a factory of environments that share their runtimes.

    Raises:
        OSError: no sandbox that the tasks of the config need works on this machine.
        ValueError: the settings do not allow a task.
    """
    sandboxes = Sandboxes(config)
    try:
        for tasks in _read(config).values():
            for task in tasks:
                sandboxes.check(task)
    except SandboxError as error:
        raise OSError(str(error)) from None  # a server reports an OSError as missing on this machine
    return lambda: HarborEnv(config, sandboxes)


def split_tasks(tasks: Sequence[HarborTask], held_out: float) -> dict[str, list[HarborTask]]:
    """Divides tasks into train, valid and test, by a hash of their names.

    Args:
        tasks: the tasks.
        held_out: fraction of valid and test together. Each gets at least one task if it is above 0 and there are three.
    """
    ordered = sorted(tasks, key=lambda task: hashlib.sha256(task.name.encode()).digest())
    count = max(round(len(ordered) * held_out / 2), 1) if held_out and len(ordered) >= 3 else 0
    chosen = {"valid": ordered[:count], "test": ordered[count : 2 * count], "train": ordered[2 * count :]}
    return {split: sorted(part, key=lambda task: task.name) for split, part in chosen.items()}


def _read(config: HarborConfig) -> dict[str, list[HarborTask]]:
    """Returns the tasks of each setting that names a folder.

    Raises:
        ValueError: tasks are refused; the message begins with the setting.
    """
    tasks = {}
    for name, path in (("tasks", config.tasks), ("evaluation", config.evaluation)):
        if path:
            try:
                tasks[name] = read_tasks(path, config.exclude)
            except ValueError as error:
                text = str(error).replace("leave them out with exclude ", "leave them out with --harbor.exclude ")
                raise ValueError(f"--harbor.{name}: {text}") from None
    return tasks


def _check_split(split: str, parts: Mapping[str, Sequence[HarborTask]], config: HarborConfig) -> None:
    if split not in parts:
        raise ValueError(f"expected split to be one of {', '.join(parts)}, got {split!r}")
    if not parts[split]:
        count = sum(map(len, parts.values()))
        raise ValueError(
            f"--harbor.held-out: expected tasks for the split {split!r}, got none of {count} with {config.held_out:g}; "
            "name a folder with --harbor.evaluation, or say --evaluation.splits without a value to evaluate nothing"
        )


def _check_deadlines(config: HarborConfig, options: SuiteOptions, tasks: Sequence[HarborTask]) -> None:
    """Refuses deadlines of the servers that a task's own time limits exceed: its episodes would be lost, not graded."""
    slowest = max(tasks, key=lambda task: config.seconds(task)[1])
    agent_s, verify_s, _ = config.seconds(slowest)
    needed = min(config.command_s, agent_s) + verify_s + 60
    if options.pool.step_deadline_s < needed:
        raise ValueError(
            f"--env.step-deadline-s: expected at least {needed:g}, for a command ({min(config.command_s, agent_s):g} "
            f"s) and the verifier of {slowest.name} ({verify_s:g} s), got {options.pool.step_deadline_s:g}; raise it, "
            "or lower --harbor.command-s and --harbor.verify-s"
        )
    builds = [
        sum(config.seconds(one)[2] for one in (task, task.verifier) if one and one.dockerfile and not one.image)
        for task in tasks
    ]
    needed = 0 if config.ignore_images or not any(builds) else max(builds) + 60
    if options.pool.reset_deadline_s < needed:
        raise ValueError(
            f"--env.reset-deadline-s: expected at least {needed:g}, for the build of an image, got "
            f"{options.pool.reset_deadline_s:g}; raise it, or lower --harbor.build-s (python -m "
            "aem_jax.envs.harbor.check builds all images beforehand)"
        )


def _as_tasks(tasks: Sequence[HarborTask]) -> list[Task]:
    return [Task(task.name, task.task_type, {"folder": str(task.folder)}) for task in tasks]


def _finish(task: Task) -> Act:
    """Finishes at once: a verifier that gives it a reward does not measure the agent."""
    return lambda result: FINISH


def _inputs(config: HarborConfig) -> Mapping[str, Files]:
    sources = {"tasks": config.tasks, "evaluation": config.evaluation}
    roots = {name: Path(path).expanduser() for name, path in sources.items() if path}
    return {name: (root, [path for path in files_of(root) if path.is_file()]) for name, root in roots.items()}


HARBOR = EnvironmentSpec(
    make_harbor,
    "folders of Harbor tasks (terminal-bench 2, DeepSWE, SkillsBench), in a sandbox",
    config=HarborConfig,
    suite=harbor,
    paths=lambda config: ["tasks", "evaluation"],
    inputs=_inputs,
)
