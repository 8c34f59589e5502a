"""Bring your own environment: gymnasium's FrozenLake and Blackjack as text, in one file.

    pip install gymnasium
    python -m aem_jax.launch serve examples/gymnasium_text.py:frozen_lake
    python -m aem_jax.launch --preset openenv-tiny --openenv.serve examples/gymnasium_text.py:frozen_lake

An environment is a class with `reset`, `step` and `close`; the first two return a `StepResult`. `serve` takes any
callable that returns an environment when it is called with the settings as keywords. docs/environments.md explains it
step by step.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import gymnasium
from gymnasium.envs.toy_text.frozen_lake import generate_random_map

from aem_jax.envs import StepResult


class GymnasiumText:
    """A gymnasium environment with few discrete actions, as text.

    A task is `{"seed": int}`. The last action word in a response is the action. A response without one changes nothing,
    but counts as a step.

    Args:
        make: seed -> the gymnasium environment of that task.
        actions: words, in the order of the action numbers.
        show: (environment, observation) -> the observation as text.
        max_steps: steps after which an episode is truncated.
    """

    def __init__(
        self,
        make: Callable[[int], gymnasium.Env],
        actions: Sequence[str],
        show: Callable[[gymnasium.Env, Any], str],
        max_steps: int,
    ):
        if max_steps < 1:
            raise ValueError(f"expected max_steps of at least 1, got {max_steps}")
        self._make, self._actions, self._show, self._max_steps = make, list(actions), show, max_steps
        self._words = re.compile(rf"\b({'|'.join(actions)})\b", re.IGNORECASE)
        self._env: gymnasium.Env | None = None
        self._steps = 0
        self._seen = ""

    def reset(self, task: Mapping[str, Any]) -> StepResult:
        """Starts the episode of a seed.

        Raises:
            ValueError: the task has no seed of 0 or more.
        """
        seed = task.get("seed")
        if type(seed) is not int or seed < 0:
            raise ValueError(f"expected a task with a seed of at least 0, got {dict(task)!r:.100}")
        self.close()
        env = self._make(seed)
        observation, _ = env.reset(seed=seed)
        self._env, self._steps, self._seen = env, 0, self._show(env, observation)
        return self._result(0.0, terminated=False, truncated=False, valid=True)

    def step(self, action_text: str) -> StepResult:
        """Executes the action in the response, if there is one."""
        assert self._env, "expected a reset first"  # the server enforces the order
        self._steps += 1
        limit = self._steps >= self._max_steps
        words = self._words.findall(action_text)
        if not words:
            return self._result(0.0, terminated=False, truncated=limit, valid=False)
        action = self._actions.index(words[-1].lower())
        observation, reward, terminated, truncated, _ = self._env.step(action)
        self._seen = self._show(self._env, observation)
        # An episode ends in one way only: the goal reached with the last step counts as terminated.
        return self._result(float(reward), terminated=terminated, truncated=not terminated and (truncated or limit))

    def close(self) -> None:
        """Closes the gymnasium environment."""
        if self._env:
            self._env.close()
            self._env = None

    def _result(self, reward: float, *, terminated: bool, truncated: bool, valid: bool = True) -> StepResult:
        info = {"won": terminated and reward > 0, "valid_action": valid, "admissible": self._actions}
        text = f"{self._seen}\nSay one of: {', '.join(self._actions)}."
        return StepResult(text, reward, terminated, truncated, info)


def frozen_lake(size: int = 4, slippery: bool = False, max_steps: int = 20) -> GymnasiumText:
    """Lakes of size × size, a different one for each seed: walk from S to G over frozen F, avoiding the holes H.

    Args:
        size: rows and columns.
        slippery: whether two steps out of three slip sideways.
        max_steps: steps until truncation.
    """

    def make(seed: int) -> gymnasium.Env:
        lake = generate_random_map(size, seed=seed)
        return gymnasium.make("FrozenLake-v1", desc=lake, is_slippery=slippery, max_episode_steps=max_steps)

    def show(env: gymnasium.Env, place: int) -> str:
        lake: Any = env.unwrapped
        rows = [[letter.decode() for letter in row] for row in lake.desc]
        row, column = divmod(int(place), size)
        under, rows[row][column] = rows[row][column], "X"
        line = {"H": "You fell into a hole.", "G": "You reached the goal."}.get(under, "You are at X; go to G.")
        return "\n".join([*(" ".join(row) for row in rows), line])

    return GymnasiumText(make, ("left", "down", "right", "up"), show, max_steps)


def blackjack() -> GymnasiumText:
    """A hand of Blackjack, dealt by the seed; a win is a reward of 1, a loss of -1."""

    def show(env: gymnasium.Env, hand: tuple[int, int, int]) -> str:
        total, dealer, ace = hand
        usable = ", an ace counted as 11" if ace else ""
        return f"You hold {total}{usable}; the dealer shows {dealer}."

    return GymnasiumText(lambda seed: gymnasium.make("Blackjack-v1"), ("stick", "hit"), show, max_steps=10)
