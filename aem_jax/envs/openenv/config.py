"""Settings of environments behind OpenEnv's messages."""

from dataclasses import dataclass


@dataclass(frozen=True)
class OpenEnvConfig:
    """Any environment behind OpenEnv's messages: its tasks, and where they come from.

    It runs on the servers of env.urls, on those that env.command starts, or on ours around serve.
    """

    serve: str = ""
    """An environment of your own for our servers, as file.py:attribute or module:attribute."""
    settings: str = "{}"
    """What serve is called with: a JSON mapping of keywords."""
    seeds: int = 1000
    """Tasks to train on: the reset keyword seed from 0 to seeds - 1. Evaluation takes others."""
    tasks: str = ""
    """File of tasks to train on, in place of seeds: JSON lines, each a mapping of reset keywords."""
    evaluation_tasks: str = ""
    """The same for evaluation, which takes the first evaluation.size of them: one set, named as the one split of
    evaluation.splits. None of them may be trained on."""
    reset: str = "{}"
    """JSON mapping of reset keywords that all tasks have."""
    actions: tuple[str, ...] = ()
    """Responses among which a random agent chooses, where the environment lists no admissible ones: a baseline, and
    what a tokenizer is trained on where there is no model.path."""

    def __post_init__(self):
        if not 1 <= self.seeds <= 10**9:
            raise ValueError(f"expected seeds from 1 to 1000000000, got {self.seeds}")
