"""An environment as a run sees it: tasks, evaluation sets, demonstrations, baselines. Another environment, another file
beside this one."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from aem_jax.envs.play import Act, play, play_each
from aem_jax.envs.protocol import Environment
from aem_jax.trajectory import Task


@dataclass(frozen=True)
class Domain:
    """An environment and what there is to do in it.

    Attributes:
        name: in the servers' table.
        settings: of the servers' environments.
        training: tasks to train on.
        evaluation: (split, size) -> a fixed set of tasks, and its name.
        make_env: an environment in this process.
        demonstrator: a fresh expert that knows what the agent is shown, from which a policy can learn; None: there is
            none, so a run cannot begin with a warm start.
        baselines: agents to compare with, by name; fresh ones for each task.
    """

    name: str
    settings: Mapping[str, Any]
    training: Sequence[Task]
    evaluation: Callable[[str, int], tuple[Sequence[Task], str]]
    make_env: Callable[[], Environment]
    demonstrator: Callable[[Task], Act] | None
    baselines: Mapping[str, Callable[[Task], Act]]


def texts(domain: Domain, episodes: int, max_turns: int) -> Iterator[list[str]]:
    """What the environment says in the first training tasks, and an agent in them: a tokenizer learns from it.

    The agent is the expert; where there is none, the first of the baselines.

    Raises:
        ValueError: the domain has no agent at all.
        EnvError: all these tasks broke their environment; where some do, they are left out.
    """
    agent = domain.demonstrator or next(iter(domain.baselines.values()), None)
    if agent is None:
        raise ValueError(
            f"expected --model.path, whose tokenizer is used, with {domain.name}, got none; a tokenizer is trained on "
            "what is said in episodes, and nobody plays this environment (with openenv, --openenv.actions lets chance)"
        )
    env = domain.make_env()
    try:
        play_one = lambda task: play(env, task.payload, agent(task), max_turns)
        for _, exchanges in play_each(domain.training[:episodes], play_one):
            yield [text for each in exchanges or () for text in (each.observation, each.response)]
    finally:
        env.close()  # a session of a server, perhaps its only one


def check_one_set(option: str, splits: Sequence[str]) -> None:
    """Refuses to evaluate several splits where the tasks come from a file: under each name they would be the same.

    Args:
        option: what named the file.
        splits: what will be evaluated.

    Raises:
        ValueError: there are several.
    """
    if len(splits) > 1:
        raise ValueError(
            f"--evaluation.splits: expected one with {option}, whose file is one set, got {' '.join(splits)}; "
            f"say --evaluation.splits {splits[-1]}"
        )


class _Item(Protocol):
    """What an environment's own task source holds."""

    @property
    def id(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def payload(self) -> Mapping[str, Any]: ...


class Tasks(Sequence[Task]):
    """An environment's own tasks as a run's, made when they are looked at.

    Args:
        items: anything with `id`, `kind` and `payload`.
    """

    def __init__(self, items: Sequence[_Item]):
        self._items = items

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, item):
        if isinstance(item, slice):
            return Tasks(self._items[item])
        found = self._items[item]
        return Task(found.id, found.kind, found.payload)
