"""Bug-fixing: with an agent's tools, for a language model; and choosing among edits, for a small policy."""

import dataclasses
import random
from collections.abc import Sequence
from functools import partial

from aem_jax.config.run import RunConfig
from aem_jax.envs.actions import as_action
from aem_jax.envs.play import Act
from aem_jax.envs.protocol import StepResult
from aem_jax.envs.swe.choices import ALL_PASS, SEVERAL, ChoicesEnv, make_failing
from aem_jax.envs.swe.env import SweEnv
from aem_jax.envs.swe.payload import load_task
from aem_jax.envs.swe.tasks import BugTask, check_sources, eval_set, is_file, training_tasks, whole_payload
from aem_jax.launch.domains.domain import Domain, Tasks, check_one_set
from aem_jax.trajectory import Task

_DRAWS = 100


def swe(config: RunConfig) -> Domain:
    """Repositories to work in with tools: generated tasks, or instances of SWE-bench in `config.bugs`.

    Raises:
        ValueError: files that cannot be read, or that leave open what is evaluated.
    """
    check_sources(config.bugs, config.evaluation.splits)
    if is_file(config.bugs.evaluation):
        check_one_set("--bugs.evaluation", config.evaluation.splits)

    def evaluation(split: str, size: int) -> tuple[Sequence[Task], str]:
        tasks, name = eval_set(config.bugs, split, size)
        return _Whole(tasks), name

    def make_env() -> SweEnv:
        return SweEnv(config.swe, load_task)

    return Domain(
        name="swe",
        settings=dataclasses.asdict(config.swe),
        training=_Whole(training_tasks(config.bugs, seed=config.seed)),
        evaluation=evaluation,
        make_env=make_env,
        demonstrator=None,
        baselines={},
    )


class _Whole(Tasks):
    """Tasks whose payloads hold all that a server needs: it may run where neither files nor catalogue are the same."""

    def __getitem__(self, item):
        if isinstance(item, slice):
            return _Whole(self._items[item])
        found = self._items[item]
        return Task(found.id, found.kind, whole_payload(found.payload))


def swe_choices(config: RunConfig) -> Domain:
    """Generated tasks as choices among edits.

    Raises:
        ValueError: files of tasks, or no such tasks.
    """
    for option, source in {"--bugs.train": config.bugs.train, "--bugs.evaluation": config.bugs.evaluation}.items():
        if is_file(source):
            raise ValueError(
                f"{option}: expected none with swe-choices, which has generated tasks only, got {source!r}; "
                "--preset swe-qwen3-32b takes files"
            )

    def evaluation(split: str, size: int) -> tuple[Sequence[Task], str]:
        tasks, name = eval_set(config.bugs, split, size)
        return Tasks(tasks), name

    def make_env() -> ChoicesEnv:
        return ChoicesEnv(config.choices, make_failing(config.choices))

    # each bug again and again, its edits in another order
    tasks = training_tasks(config.bugs, seed=config.seed)
    drawn = [
        BugTask(f"{task.id}/{draw}", task.kind, {**task.payload, "draw": draw})
        for draw in range(_DRAWS)
        for task in tasks
    ]
    return Domain(
        name="swe-choices",
        settings=dataclasses.asdict(config.choices),
        training=Tasks(drawn),
        evaluation=evaluation,
        make_env=make_env,
        demonstrator=partial(_tester, config.warmstart.wander),
        baselines={"tester": partial(_tester, 0.0), "random": _random},
    )


def _tester(wander: float, task: Task) -> Act:
    """Tries one edit after the other, and keeps those after which fewer tests fail. With probability `wander` it
    finishes after an edit without having run the tests: a careless teacher."""
    rng, last, tried, fewest = random.Random(f"tester/{task.id}"), "", 0, 1

    def choose(result: StepResult) -> str:
        nonlocal tried, fewest
        text, admissible = result.observation, result.info["admissible"]
        if not last and SEVERAL in text:
            return "run"
        if last.startswith("apply"):
            return "finish" if rng.random() < wander else "run"
        if last == "run":
            failing = 0 if text == ALL_PASS else int(text.split()[0])
            if failing == 0:
                return "finish"
            if tried and failing >= fewest:
                return "undo"
            fewest = failing
        following = [each for each in admissible if each.startswith("apply") and int(each.split()[1]) > tried]
        if not following:
            return "finish"
        tried = int(following[0].split()[1])
        return following[0]

    def act(result: StepResult) -> str:
        nonlocal last
        last = choose(result)
        return as_action(last)

    return act


def _random(task: Task) -> Act:
    rng = random.Random(f"random/{task.id}")
    return lambda result: as_action(rng.choice(result.info["admissible"]))
