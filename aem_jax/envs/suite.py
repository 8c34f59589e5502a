"""What a run needs of an environment: its tasks, evaluation sets and agents (`TaskSuite`), and the one object by which
`registry.py` finds all that belongs to it (`EnvironmentSpec`)."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

from aem_jax.envs.play import Act, play, play_each
from aem_jax.envs.protocol import Environment, Task
from aem_jax.envs.serving.config import PoolConfig
from aem_jax.overrides import flatten, override

Files = tuple[Path, Sequence[Path]]
"""A folder or file that a setting names, and the files below it whose contents matter."""


@dataclass(frozen=True)
class TaskSuite:
    """An environment as a run sees it.

    Attributes:
        name: what the run's own servers serve: a name of the registry, or the path of somebody's own environment.
        settings: JSON settings of the servers' environments.
        training: tasks to train on.
        evaluation: (split, size) -> a fixed set of tasks, and its name.
        make_env: makes an environment in this process.
        demonstrator: makes an expert for a task. It acts from the observations alone, so a policy can learn from it.
            None: there is no expert, and no warm start.
        baselines: agents to compare with, by name; each call makes one for a task.
    """

    name: str
    settings: Mapping[str, Any]
    training: Sequence[Task]
    evaluation: Callable[[str, int], tuple[Sequence[Task], str]]
    make_env: Callable[[], Environment]
    demonstrator: Callable[[Task], Act] | None = None
    baselines: Mapping[str, Callable[[Task], Act]] = field(default_factory=dict)


@dataclass(frozen=True)
class SuiteOptions:
    """Settings of a run that its task suite depends on, beside the environment's own.

    Attributes:
        seed: orders or draws the training tasks.
        splits: evaluation splits of the run.
        expert_noise: share of turns in which the demonstrator errs on purpose.
        pool: the run's environment servers.
    """

    seed: int = 0
    splits: tuple[str, ...] = ()
    expert_noise: float = 0.0
    pool: PoolConfig = field(default_factory=PoolConfig)


class EnvironmentConfig(Protocol):
    """Settings of an environment: a frozen dataclass that knows the environment's name."""

    NAME: ClassVar[str]
    __dataclass_fields__: ClassVar[dict[str, Any]]


@dataclass(frozen=True)
class EnvironmentSpec:
    """All that belongs to an environment.

    Attributes:
        make: settings -> factory of environments. Called once in each server process; what sessions share is made here.
        config: class of the settings; None: `make` takes the JSON mapping as it is.
        blocking: whether calls take long or wait, so that each session gets a thread. Else they run in the server's
            event loop, which is faster.
        description: one line.
        suite: what a run needs; None: the environment is served, not trained on.
        site: settings -> an ASGI application, for a person with a browser.
        paths: config -> names of the settings that hold paths, which a run stores as absolute paths.
        inputs: config -> files by the setting that names them, of those that decide what a run computes.
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
        """The config of these JSON settings; the settings themselves where there is no config.

        Raises:
            ValueError: settings that the environment does not have, or values that it refuses.
        """
        if self.config is None:
            return settings
        try:
            return override(self.config(), flatten(settings))
        except ValueError as error:
            raise ValueError(f"expected settings of {self.config.__name__}: {error}") from None

    def factory(self, settings: Mapping[str, Any]) -> Callable[[], Environment]:
        """A factory of environments with these JSON settings.

        Raises:
            ValueError: settings that the environment does not have, or values that it refuses.
            OSError: this machine lacks something that the environment needs.
        """
        return self.make(self.configured(settings))


def tokenizer_corpus(suite: TaskSuite, episodes: int, max_turns: int) -> Iterator[list[str]]:
    """Texts to train a tokenizer on: observations and responses of the first training tasks, a list for each episode.

    The demonstrator plays; where there is none, the first of the baselines.

    Raises:
        ValueError: the suite has no agent at all.
        EnvError: all these tasks broke their environment; where some do, they are left out.
    """
    agent = suite.demonstrator or next(iter(suite.baselines.values()), None)
    if agent is None:
        raise ValueError(
            f"expected --model.path, whose tokenizer is used, with {suite.name}, got none; a tokenizer is trained on "
            "episodes, and no agent plays this environment (with openenv, --openenv.actions gives a random agent)"
        )
    env = suite.make_env()
    try:
        play_one = lambda task: play(env, task.payload, agent(task), max_turns)
        for _, exchanges in play_each(suite.training[:episodes], play_one):
            yield [text for exchange in exchanges or () for text in (exchange.observation, exchange.response)]
    finally:
        env.close()  # a session of a server, perhaps its only one


def check_one_set(option: str, splits: Sequence[str]) -> None:
    """Refuses to evaluate several splits where the tasks come from a file: under each name they would be the same.

    Args:
        option: the option that names the file.
        splits: evaluation splits of the run.

    Raises:
        ValueError: there are several.
    """
    if len(splits) > 1:
        raise ValueError(
            f"--evaluation.splits: expected one with {option}, whose file is one set, got {' '.join(splits)}; "
            f"say --evaluation.splits {splits[-1]}"
        )
