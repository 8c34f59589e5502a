"""An environment with scripted episodes: settings determine the number of turns, text lengths and step latency.

It benchmarks the code that plays episodes. A task is `{"seed": int}`; the task, the settings and the responses
determine the episode. The number of turns N depends on the task and the settings, with few long episodes among many
short ones:

    P(N >= n) = (1/n - 1/(b + 1)) / (1/a - 1/(b + 1)),    n = a … b    (bounded Pareto of shape 1)

The latency of each step is uniform in 0 … `latency_ms` and depends on task, turn and text, so that the results of a
group's episodes arrive at different times. The last turn wins if the response has an even number of characters.
"""

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from aem_jax.envs.protocol import StepResult
from aem_jax.envs.suite import EnvironmentSpec


@dataclass(frozen=True)
class ScriptedConfig:
    """Settings of the scripted environment."""

    min_turns: int = 3
    """Minimum number of turns of an episode."""
    max_turns: int = 30
    """Maximum number of turns of an episode; if equal to min_turns, all episodes have the same length."""
    prompt_chars: int = 64
    """Characters of the first observation, which differs from task to task."""
    observation_chars: int = 16
    """Characters of each later observation."""
    latency_ms: float = 0.0
    """Maximum duration of a step (sleep, no computation), milliseconds."""
    seed: int = 0
    """Different seeds give different episodes of the same tasks."""

    def __post_init__(self) -> None:
        if not 1 <= self.min_turns <= self.max_turns:
            raise ValueError(f"expected 1 <= min_turns <= max_turns, got {self.min_turns} and {self.max_turns}")
        if self.prompt_chars < 1 or self.observation_chars < 1:
            raise ValueError(
                "expected prompt_chars and observation_chars of at least 1, "
                f"got {self.prompt_chars} and {self.observation_chars}"
            )
        if not self.latency_ms >= 0:
            raise ValueError(f"expected latency_ms >= 0, got {self.latency_ms}")


def num_turns(config: ScriptedConfig, task: Mapping[str, Any]) -> int:
    """Returns the number of turns of a task's episodes."""
    return pareto(config.min_turns, config.max_turns, _random(config, task, "turns").random())


def pareto(least: int, most: int, uniform: float) -> int:
    """Returns the quantile `uniform` (0 <= uniform < 1) of the distribution above, over least … most."""
    tail = 1 / (most + 1)
    return min(int(1 / (1 / least - uniform * (1 / least - tail))), most)


class ScriptedEnv:
    """See the module's docstring."""

    def __init__(self, config: ScriptedConfig = ScriptedConfig()):
        self._config = config
        self._task: Mapping[str, Any] = {}
        self._turns = self._left = 0

    def reset(self, task: Mapping[str, Any]) -> StepResult:
        """Starts an episode, without latency.

        Raises:
            ValueError: the task's seed is not an integer.
        """
        if type(task.get("seed")) is not int:
            raise ValueError(f"expected a task with an integer as its seed, got {dict(task)!r:.100}")
        self._task, self._turns, self._left = task, 0, num_turns(self._config, task)
        text = _letters(_random(self._config, task, "prompt"), self._config.prompt_chars)
        return StepResult(text, info={"won": False, "valid_action": True})

    def step(self, action_text: str) -> StepResult:
        """Returns after the scripted latency; every response is valid."""
        draw = _random(self._config, self._task, f"{self._turns} {action_text}")
        if self._config.latency_ms:
            time.sleep(draw.random() * self._config.latency_ms / 1e3)
        self._turns, self._left = self._turns + 1, self._left - 1
        won = self._left == 0 and len(action_text) % 2 == 0
        text = _letters(draw, self._config.observation_chars)
        return StepResult(text, float(won), self._left == 0, info={"won": won, "valid_action": True})

    def close(self) -> None:
        """Does nothing; there are no resources."""


def _make(config: ScriptedConfig) -> Callable[[], ScriptedEnv]:
    return lambda: ScriptedEnv(config)


def _random(config: ScriptedConfig, task: Mapping[str, Any], what: str) -> random.Random:
    # Bytes give the same numbers in every process; unpaired surrogates are replaced because they cannot be encoded.
    return random.Random(f"{config.seed} {task['seed']} {what}".encode(errors="replace"))


def _letters(draw: random.Random, count: int) -> str:
    return "".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=count))


SCRIPTED = EnvironmentSpec(_make, "episodes of scripted length and latency", config=ScriptedConfig)
