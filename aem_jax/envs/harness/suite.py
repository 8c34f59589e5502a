"""The task suite of agents with a loop of their own. `aem_jax.gateway` starts them and answers their requests."""

import hashlib
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NoReturn

from aem_jax.envs.protocol import Environment, Task
from aem_jax.envs.suite import (
    EnvironmentSpec,
    Files,
    NumberedTasks,
    SuiteOptions,
    TaskSuite,
    check_no_habit,
    check_one_set,
)
from aem_jax.files import read_json_lines

SEEDS: Mapping[str, int] = {"valid": 1_000_000_000, "test": 2_000_000_000}
"""Split -> its first seed. Training seeds are below all of them, and all seeds fit 32 bits."""


@dataclass(frozen=True)
class HarnessConfig:
    """An agent with a loop of its own, in a process for each episode. It reads the task and calls an endpoint.

    The endpoint speaks OpenAI's chat completions. Its URL and key are in OPENAI_BASE_URL and OPENAI_API_KEY.
    """

    NAME: ClassVar[str] = "harness"

    command: str = ""
    """Command that plays one episode; words as in a shell, run without a shell. It gets the task as JSON on standard
    input. The last line of its output may be the reward: a number, or {"reward", "success", "score"}."""
    agent: str = ""
    """Python function instead of a command, as file.py:function or module:function. It gets the task and may return the
    reward. Its module is imported once; each episode is a fork."""
    seeds: int = 1000
    """Number of training tasks, {"seed": 0} and so on. Evaluation uses other seeds."""
    tasks: str = ""
    """File of training tasks, instead of seeds: JSON lines. A mapping may have an id and a task_type."""
    evaluation_tasks: str = ""
    """File of evaluation tasks. Evaluation uses the first evaluation.size of them as one set, under the name of the
    only split in evaluation.splits. No training task may be among them."""
    reward: str = ""
    """Python function (task, transcript) -> reward, as file.py:function, called when an agent has ended. It replaces
    the agent's own reward."""
    timeout_s: float = 600.0
    """Longest episode, seconds. An agent that takes longer is killed, and its episode masked."""
    host: str = "127.0.0.1"
    """Address that the endpoint listens on. Agents on other machines need one that they reach."""
    port: int = 0
    """Port of the endpoint; 0: any free one."""
    lenient: bool = False
    """Whether requests that ask for other sampling (temperature, top_p, tool_choice, …) are answered as the run
    samples, instead of refused."""

    def __post_init__(self) -> None:
        if not 1 <= self.seeds <= 10**9:
            raise ValueError(f"expected seeds from 1 to 1000000000, got {self.seeds}")
        if not self.timeout_s > 0:
            raise ValueError(f"expected timeout_s above 0 seconds, got {self.timeout_s}")
        if not 0 <= self.port < 65536:
            raise ValueError(f"expected port from 0 to 65535, got {self.port}")


def task_suite(config: HarnessConfig, options: SuiteOptions) -> TaskSuite:
    """Builds the task suite of an agent.

    Raises:
        ValueError: not exactly one setting names the agent, its tasks cannot be read, or an evaluation task is also a
            training task.
    """
    check_no_habit("harness", options)
    if bool(config.command) == bool(config.agent):
        got = "both" if config.command else "none"
        raise ValueError(f"expected one of --harness.command and --harness.agent, got {got}")
    training = _read(config.tasks) if config.tasks else NumberedTasks(range(config.seeds), _seeded)
    if config.tasks and options.splits and not config.evaluation_tasks:
        raise ValueError(
            "expected --harness.evaluation-tasks with --harness.tasks, got none; give a file, or --evaluation.splits "
            "without a value to evaluate nothing"
        )
    held_out = _read(config.evaluation_tasks) if config.evaluation_tasks else []
    if held_out:
        check_one_set("--harness.evaluation-tasks", options.splits)
    trained = {_digest([task]) for task in training} if held_out else set()
    if both := [task for task in held_out if _digest([task]) in trained]:
        raise ValueError(
            f"--harness.evaluation-tasks: expected no task that is trained on, got {len(both)}, "
            f"{json.dumps(dict(both[0].payload))[:200]} for one"
        )

    def evaluation(split: str, size: int) -> tuple[Sequence[Task], str]:
        if held_out:
            tasks: Sequence[Task] = held_out[:size]
        elif split in SEEDS:
            tasks = NumberedTasks(range(SEEDS[split], SEEDS[split] + size), _seeded)
        else:
            raise ValueError(f"--evaluation.splits: expected {' or '.join(SEEDS)} with harness, got {split!r}")
        return tasks, f"{split}-{len(tasks)}-{_digest(tasks)[:6]}"

    return TaskSuite(
        name=config.NAME,
        settings={},
        training=training,
        evaluation=evaluation,
        make_env=_no_environment,
        text=lambda task: json.dumps(task.payload["task"]),
    )


def _seeded(seed: int) -> Task:
    return Task(f"seed-{seed}", "harness", {"task": {"seed": seed}})


def _read(file: str) -> list[Task]:
    tasks = []
    try:
        for line, task in read_json_lines(file):
            named = task if isinstance(task, Mapping) else {}
            identity, kind = named.get("id", f"{Path(file).stem}-{line}"), named.get("task_type", "harness")
            for name, value in (("id", identity), ("task_type", kind)):
                if not isinstance(value, str) or not value:
                    raise ValueError(f"{file} line {line}: expected a text as {name}, got {value!r:.80}")
            tasks.append(Task(identity, kind, {"task": task}))
    except OSError as error:
        raise ValueError(f"expected a file of tasks, got {file!r}: {error}") from None
    if not tasks:
        raise ValueError(f"expected at least one task in {file}, got none")
    known: set[str] = set()
    if twice := next((task.id for task in tasks if task.id in known or known.add(task.id)), None):
        raise ValueError(f"{file}: expected different ids, got {twice!r} twice")
    return tasks


def _digest(tasks: Sequence[Task]) -> str:
    return hashlib.sha256(json.dumps([task.payload["task"] for task in tasks], sort_keys=True).encode()).hexdigest()


def _no_environment() -> Environment:
    raise ValueError("expected --model.path with --environment harness, whose agents need a policy that can be asked")


def _paths(config: HarnessConfig) -> tuple[str, ...]:
    return ("tasks", "evaluation_tasks", *(name for name in ("agent", "reward") if ".py:" in getattr(config, name)))


def _inputs(config: HarnessConfig) -> Mapping[str, Files]:
    named = {"tasks": config.tasks, "evaluation_tasks": config.evaluation_tasks}
    for name in ("agent", "reward"):
        if (code := getattr(config, name).rpartition(":")[0]).endswith(".py"):
            named[name] = code
    words = [word for word in shlex.split(config.command) if word.endswith(".py") and Path(word).is_file()]
    if words:
        named["command"] = words[0]
    paths = {name: Path(value).expanduser() for name, value in named.items() if value}
    return {name: (path, [path]) for name, path in paths.items()}


def _not_served(settings: Any) -> NoReturn:
    raise ValueError("expected an environment to serve, got harness, whose agents are started by a run")


HARNESS = EnvironmentSpec(
    _not_served,
    "agents with a loop of their own, behind an OpenAI-compatible endpoint",
    config=HarnessConfig,
    suite=task_suite,
    paths=_paths,
    inputs=_inputs,
)
