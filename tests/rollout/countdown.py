"""A game without jax: each process of an agent imports it."""

from collections.abc import Mapping
from typing import Any

from aem_jax.envs.protocol import StepResult


class CountdownEnv:
    """Ends after `turns` turns (0: at its reset, won).

    Observations grow with the response's length. The episode is won if the last response has an even length.
    """

    def reset(self, task: Mapping[str, Any]) -> StepResult:
        self.left = int(task["turns"])
        first = task.get("first", "start" + "x" * (int(task["turns"]) % 3))
        return StepResult(first, terminated=not self.left, info={"won": not self.left, "valid_action": True})

    def step(self, text: str) -> StepResult:
        self.left -= 1
        won = self.left == 0 and len(text) % 2 == 0
        info = {"won": won, "valid_action": bool(text)}
        return StepResult("o" * (1 + len(text) % 5), 1.0 if won else 0.1, self.left == 0, False, info)

    def close(self) -> None:
        pass
