"""Bug-fixing tasks: generated ones, or a file of SWE-bench instances; one interface for both.

A task's payload is a small JSON mapping, `{"bug": "<package>-<number>"}`, or `{"instances": "<file>",
"id": "<instance_id>", "repos": "<folder of mirrors>"}`; `whole_payload` makes of it the one that `SweEnv` reads.
"""

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from aem_jax.envs.protocol import Task
from aem_jax.envs.swe.generate import tasks as generated
from aem_jax.envs.swe.instance import Instance, read_instances, to_row
from aem_jax.envs.swe.payload import load_task as payload_task
from aem_jax.envs.swe.payload import make_payload
from aem_jax.envs.swe.sandbox.workspace import Checkout

GENERATED = "generated"
"""In place of a file: generated tasks, beside a file of the others."""


@dataclass(frozen=True)
class TasksConfig:
    """Which bug-fixing tasks a run has: generated ones, or those of two files that share no instance."""

    train: str = ""
    """File of SWE-bench instances (.jsonl, .json, .parquet) to train on; generated, or empty without a file to evaluate
    on: generated tasks."""
    evaluation: str = ""
    """File of instances to evaluate on: one set, named as the one split of evaluation.splits; generated, or empty
    without a file to train on: generated tasks."""
    repos: str = ""
    """Folder of git mirrors named <owner>__<name>; empty: repositories come out of the instances' images."""
    difficulties: tuple[str, ...] = generated.DIFFICULTIES
    """Difficulties of generated tasks: easy, medium, hard."""

    def __post_init__(self) -> None:
        generated.check_difficulties(self.difficulties)


def load_task(payload: Mapping[str, Any]) -> tuple[Instance, Checkout]:
    """Instance and checkout of a task's payload.

    Raises:
        ValueError: it names neither a generated bug nor an instance of a file.
    """
    return payload_task(whole_payload(payload))


def whole_payload(payload: Mapping[str, Any]) -> dict[str, Any]:
    """The payload that `SweEnv` reads: instance and repository themselves, in place of their names.

    Raises:
        ValueError: it names neither a generated bug nor an instance of a file.
    """
    if "bug" in payload:
        bug = generated.bug(payload)
        return make_payload(generated.instance(bug.id), files=generated.base_files(bug))
    if not isinstance(payload.get("instances"), str) or not isinstance(payload.get("id"), str):
        raise ValueError(f"expected 'bug', or 'instances' and 'id', in the payload, got {sorted(payload)}")
    by_id = _instances(payload["instances"])
    if payload["id"] not in by_id:
        raise ValueError(f"expected an instance of {payload['instances']}, got {payload['id']!r}")
    return make_payload(by_id[payload["id"]], repos=payload.get("repos", ""))


def check_sources(config: TasksConfig, splits: Sequence[str]) -> None:
    """Refuses sources of training and evaluation tasks that contradict each other.

    Args:
        config: which tasks.
        splits: evaluation splits of the run.

    Raises:
        ValueError: a file for one of the two alone, so that the other would silently be generated; files that cannot be
            read; files that share an instance.
    """
    if is_file(config.train) and not config.evaluation and splits:
        raise ValueError(
            "expected --swe.tasks.evaluation with --swe.tasks.train, got none; give a file, --evaluation.splits "
            f"without a value to evaluate nothing, or --swe.tasks.evaluation {GENERATED}"
        )
    if is_file(config.evaluation) and not config.train:
        raise ValueError(
            "expected --swe.tasks.train with --swe.tasks.evaluation, got none; give a file, or "
            f"--swe.tasks.train {GENERATED}"
        )
    if not (is_file(config.train) and is_file(config.evaluation)):
        return
    trained = {task.id for task in file_tasks("--swe.tasks.train", config.train, config.repos)}
    both = [
        task.id for task in file_tasks("--swe.tasks.evaluation", config.evaluation, config.repos) if task.id in trained
    ]
    if both:
        raise ValueError(
            f"--swe.tasks.evaluation: expected no instance of --swe.tasks.train, got {len(both)} ({', '.join(both[:3])}"
            f"{', …' if len(both) > 3 else ''}); take them out of {config.train} or {config.evaluation}"
        )


def is_file(source: str) -> bool:
    """Whether a config's source of tasks names a file."""
    return source not in ("", GENERATED)


def training_tasks(config: TasksConfig, *, seed: int = 0) -> Sequence[Task]:
    """The tasks to train on, in an order of which every prefix is a fair sample.

    Raises:
        ValueError: there are none, or they cannot be read.
    """
    if is_file(config.train):
        tasks = file_tasks("--swe.tasks.train", config.train, config.repos)
    else:
        tasks = generated_tasks("train", config.difficulties)
    random.Random(f"training order/{seed}").shuffle(tasks)
    return tasks


def eval_set(config: TasksConfig, split: str, size: int) -> tuple[Sequence[Task], str]:
    """A fixed set of tasks, and a name that changes when anything in one of them changes.

    Args:
        config: which tasks.
        split: of generated tasks `train`, `valid` (packages of training, other bugs) or `test` (other packages); of a
            file, which is one set, whatever it should be called.
        size: number of tasks; at most all there are.

    Returns:
        The tasks, spread over all there are, and `<split>-<size>-<first 6 hex digits of the SHA-256 over their rows>`.

    Raises:
        ValueError: no such split, no task in it, or a file that cannot be read.
    """
    if size < 1:
        raise ValueError(f"expected size >= 1, got {size}")
    if is_file(config.evaluation):
        tasks = file_tasks("--swe.tasks.evaluation", config.evaluation, config.repos)
    else:
        tasks = generated_tasks(split, config.difficulties)
    count = min(size, len(tasks))
    tasks = [tasks[i * len(tasks) // count] for i in range(count)]
    digest = hashlib.sha256()
    for task in tasks:
        digest.update(json.dumps(to_row(load_task(task.payload)[0]), sort_keys=True).encode())
    return tasks, f"{split}-{count}-{digest.hexdigest()[:6]}"


def generated_tasks(split: str, difficulties: Sequence[str] = generated.DIFFICULTIES) -> list[Task]:
    """Generated tasks of a split.

    Raises:
        ValueError: no such split, or no such task in it.
    """
    if split not in generated.SPLITS:
        raise ValueError(f"expected split to be one of {', '.join(generated.SPLITS)}, got {split!r}")
    bugs = [bug for bug in generated.bugs() if bug.split == split and bug.difficulty in difficulties]
    if not bugs:
        raise ValueError(f"expected {' or '.join(difficulties)} tasks in {split}, found none")
    return [Task(bug.id, bug.difficulty, {"bug": bug.id}) for bug in bugs]


def file_tasks(option: str, path: str, repos: str) -> list[Task]:
    """The instances of a file as tasks.

    Args:
        option: what named the file; begins the error.
        path: of the file.
        repos: folder of git mirrors; empty: repositories come out of the instances' images.

    Raises:
        ValueError: it cannot be read, or holds no instances.
    """
    # the path travels to servers that may run elsewhere
    absolute = {"instances": str(Path(path).resolve())} | ({"repos": str(Path(repos).resolve())} if repos else {})
    try:
        instances = _instances(absolute["instances"])
    except (OSError, ValueError, ModuleNotFoundError) as error:  # pyarrow may not be installed
        raise ValueError(f"{option}: expected a file of SWE-bench instances, got {path!r}: {error}") from error
    return [Task(one.instance_id, one.repo, absolute | {"id": one.instance_id}) for one in instances.values()]


@lru_cache(maxsize=8)
def _instances(path: str) -> Mapping[str, Instance]:
    return {instance.instance_id: instance for instance in read_instances(path)}
