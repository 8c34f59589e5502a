"""An environment's tasks, evaluation sets and agents for a run (`TaskSuite`), and the object that `registry.py` uses to
find all parts of an environment (`EnvironmentSpec`)."""

import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol, overload

from aem_jax.envs.play import Act, play, play_each
from aem_jax.envs.prompt import Prompt
from aem_jax.envs.protocol import Environment, Task
from aem_jax.envs.serving.config import PoolConfig
from aem_jax.overrides import flatten, override

Files = tuple[Path, Sequence[Path]]
"""A folder or file that a setting names, and the files in it whose contents matter."""


@dataclass(frozen=True)
class TaskSuite:
    """The parts of an environment that a run uses.

    Attributes:
        name: the environment that the run's own servers serve: a name in the registry, or the path of a user-written
            environment.
        settings: JSON settings of the servers' environments.
        training: training tasks.
        evaluation: (split, size) -> a fixed set of tasks, and its name.
        make_env: makes an environment in this process.
        demonstrator: makes an expert for a task. The expert uses only the observations, so a policy can learn from it.
            None: there is no expert, and no warm start.
        baselines: factories of agents to compare with, by name. Each call makes an agent for a task.
        prompt: composes the prompts of `rollout.prompt_style = "single"`. None: the environment has no such prompt.
        text: the text of a task, for a new tokenizer. None: the tokenizer is trained on episodes.
        prepare: told of the next training step's tasks while a step is under way, and of the first step's before it
            begins. It may fetch what their resets need, in the background, and must return at once. Each call replaces
            the tasks of the last one. None: there is nothing to prepare.
    """

    name: str
    settings: Mapping[str, Any]
    training: Sequence[Task]
    evaluation: Callable[[str, int], tuple[Sequence[Task], str]]
    make_env: Callable[[], Environment]
    demonstrator: Callable[[Task], Act] | None = None
    baselines: Mapping[str, Callable[[Task], Act]] = field(default_factory=dict)
    prompt: Prompt | None = None
    text: Callable[[Task], str] | None = None
    prepare: Callable[[Sequence[Task]], None] | None = None


@dataclass(frozen=True)
class SuiteOptions:
    """Settings of a run that its task suite depends on, in addition to the environment's own settings.

    Attributes:
        seed: seed for the order or the generation of the training tasks.
        splits: evaluation splits of the run.
        expert_noise: fraction of turns in which the demonstrator makes a deliberate error.
        expert_thinks: whether the demonstrator thinks in `<think>…</think>` before it acts.
        expert_habit: fraction of its walks in which the demonstrator follows a bad habit.
        pool: the run's environment servers.
    """

    seed: int = 0
    splits: tuple[str, ...] = ()
    expert_noise: float = 0.0
    expert_thinks: bool = False
    expert_habit: float = 0.0
    pool: PoolConfig = field(default_factory=PoolConfig)


def check_no_habit(name: str, options: SuiteOptions) -> None:
    """Refuses a habit for the environment `name`, whose demonstrator has none.

    Raises:
        ValueError: the options ask for a habit.
    """
    if options.expert_habit:
        raise ValueError(
            f"--warmstart.expert-habit: expected 0 with {name}, got {options.expert_habit}; only the demonstrator of "
            "alfworld has a habit"
        )


class EnvironmentConfig(Protocol):
    """Settings of an environment: a frozen dataclass with the environment's name."""

    NAME: ClassVar[str]
    __dataclass_fields__: ClassVar[dict[str, Any]]


@dataclass(frozen=True)
class EnvironmentSpec:
    """All parts of an environment.

    Attributes:
        make: settings -> factory of environments. Called once per server process. It creates the data that sessions
            share.
        config: class of the settings; None: `make` takes the JSON mapping unchanged.
        blocking: whether calls take long or wait, so that each session gets a thread. Otherwise they run in the
            server's event loop, which is faster.
        description: one line.
        suite: builds the task suite of a run; None: the environment is served but not trained on.
        site: settings -> an ASGI application, for a person with a browser.
        paths: config -> names of the settings that are paths. A run stores them as absolute paths.
        inputs: config -> input files that the results of a run depend on, by the setting that names them.
        from_environ: completes the settings of a new run from environment variables.
    """

    make: Callable[[Any], Callable[[], Environment]]
    description: str
    config: type | None = None
    blocking: bool = True
    suite: Callable[[Any, SuiteOptions], TaskSuite] | None = None
    site: Callable[[Any], Any] | None = None
    paths: Callable[[Any], Collection[str]] = lambda config: ()
    inputs: Callable[[Any], Mapping[str, Files]] = lambda config: {}
    from_environ: Callable[[Any], Any] = lambda config: config

    def configured(self, settings: Mapping[str, Any]) -> Any:
        """Returns the config for JSON settings, or the settings themselves if the environment has no config class.

        Raises:
            ValueError: a setting does not exist, or its value is refused.
        """
        if self.config is None:
            return settings
        try:
            return override(self.config(), flatten(settings))
        except ValueError as error:
            raise ValueError(f"expected settings of {self.config.__name__}: {error}") from None

    def factory(self, settings: Mapping[str, Any]) -> Callable[[], Environment]:
        """Returns a factory of environments with these JSON settings.

        Raises:
            ValueError: a setting does not exist, or its value is refused.
            OSError: this machine lacks something that the environment needs.
        """
        return self.make(self.configured(settings))


def tokenizer_corpus(suite: TaskSuite, episodes: int, max_turns: int) -> Iterator[list[str]]:
    """Yields texts to train a tokenizer on: observations and responses of the first training tasks, a list per episode.

    The demonstrator plays the episodes. Without a demonstrator, the first baseline plays them. Tasks that break their
    environment are skipped. A suite with texts of tasks yields these instead.

    Raises:
        ValueError: the suite has no agent.
        EnvError: all these tasks broke their environment.
    """
    if suite.text:
        yield from ([suite.text(task)] for task in suite.training[:episodes])
        return
    agent = suite.demonstrator or next(iter(suite.baselines.values()), None)
    if agent is None:
        raise ValueError(
            f"expected --model.path, whose tokenizer is used, with {suite.name}, got none; a new tokenizer is trained "
            "on episodes of an agent, and this environment has no demonstrator or baseline (for an environment of your "
            "own, --openenv.actions makes a random agent; --warmstart.init-from takes another run's tokenizer)"
        )
    env = suite.make_env()
    try:
        play_one = lambda task: play(env, task.payload, agent(task), max_turns)
        for _, exchanges in play_each(suite.training[:episodes], play_one):
            yield [text for exchange in exchanges or () for text in (exchange.observation, exchange.response)]
    finally:
        env.close()  # it may hold the only session of a server


class NumberedTasks(Sequence[Task]):
    """Tasks that are made on access from their numbers. A slice is made on access too.

    Args:
        numbers: one number per task.
        make: number -> task.
    """

    def __init__(self, numbers: Sequence[int], make: Callable[[int], Task]):
        self.numbers, self.make = numbers, make

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, item: int) -> Task: ...
    @overload
    def __getitem__(self, item: slice) -> "NumberedTasks": ...
    def __getitem__(self, item: int | slice) -> "Task | NumberedTasks":
        if isinstance(item, slice):
            return NumberedTasks(self.numbers[item], self.make)
        return self.make(self.numbers[item])


def set_name(split: str, size: int, contents: Iterable[bytes]) -> str:
    """Returns the name of an evaluation set: `<split>-<size>-<first 6 hex digits of the SHA-256 over contents>`."""
    digest = hashlib.sha256()
    for content in contents:
        digest.update(content)
    return f"{split}-{size}-{digest.hexdigest()[:6]}"


def check_one_set(option: str, splits: Sequence[str]) -> None:
    """Refuses several evaluation splits if the tasks come from a file, because every split would be the same set.

    Args:
        option: the option that names the file.
        splits: evaluation splits of the run.

    Raises:
        ValueError: there is more than one split.
    """
    if len(splits) > 1:
        raise ValueError(
            f"--evaluation.splits: expected one with {option}, whose file is one set, got {' '.join(splits)}; "
            f"say --evaluation.splits {splits[-1]}"
        )
