"""An environment as a run sees it: tasks, evaluation sets, demonstrations, baselines. Another environment, another file
beside this one."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from aem_jax.envs.play import Act, play
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


def texts(domain: Domain, episodes: int, max_turns: int) -> Iterator[str]:
    """What the environment and its expert say in the first training tasks: a tokenizer learns from it.

    Raises:
        ValueError: the domain has no expert.
    """
    if domain.demonstrator is None:
        raise ValueError(
            f"expected --model.path, whose tokenizer is used, with {domain.name}, got none; "
            "a tokenizer is trained on what an expert says, and this environment has none"
        )
    env = domain.make_env()
    for task in domain.training[:episodes]:
        for exchange in play(env, task.payload, domain.demonstrator(task), max_turns):
            yield exchange.observation
            yield exchange.response


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
