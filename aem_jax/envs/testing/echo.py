"""A tiny environment without a world: it repeats what it is told. For tests, chaos and benchmarks of everything above.

A task is `{"word": str, "length": int, "fault": {…}}`, every key optional. Saying the word wins (reward 1); after
`length` steps without it the episode is truncated. A fault breaks the server in a chosen way at a chosen step:

    {"kind": "exit", "step": 2}                   at every attempt
    {"kind": "hang", "step": 0, "once": "path"}   step 0 is the reset; only while that file is absent, and makes it
"""

import os
import stat
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from aem_jax.envs.protocol import StepResult
from aem_jax.envs.suite import EnvironmentSpec


@dataclass(frozen=True)
class EchoConfig:
    """Settings of the echo environment."""

    step_latency_s: float = 0.0
    """Seconds that a step takes (sleeping, not computing)."""
    reset_latency_s: float = 0.0
    """Seconds that a reset takes."""
    make_latency_s: float = 0.0
    """Seconds that making the environment takes."""
    length: int = 5
    """Steps until truncation, where the task does not say."""
    padding: int = 0
    """Characters appended to every observation, for the cost of long texts."""


def _raise() -> None:
    raise RuntimeError("scripted fault")


def _write_to_sockets(payload: bytes) -> Callable[[], None]:
    """Puts bytes on every connection of this process, past all layers: every session of the server sees them."""

    def write() -> None:
        for name in os.listdir("/proc/self/fd"):
            try:
                if stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                    os.write(int(name), payload)
            except OSError:
                continue  # closed meanwhile, or a listening socket

    return write


FAULTS: Mapping[str, Callable[[], None]] = {
    "raise": _raise,
    "exit": lambda: os._exit(17),
    "hang": lambda: time.sleep(3600),
    "rubbish": _write_to_sockets(b"\x81\x07rubbish"),  # a correct text frame that is no JSON
    "broken": _write_to_sockets(b"\xff\xff\xff\xff"),  # not even a WebSocket frame
}


class EchoEnv:
    """See the module's docstring."""

    def __init__(self, config: EchoConfig = EchoConfig()):
        time.sleep(config.make_latency_s)
        self._config = config
        self._task: Mapping[str, Any] = {}
        self._steps = 0

    def reset(self, task: Mapping[str, Any]) -> StepResult:
        """Starts an episode; the first observation repeats the task's word."""
        time.sleep(self._config.reset_latency_s)
        self._task, self._steps = task, 0
        self._break_if_scripted()
        return self._result(f"say {task.get('word', 'done')}", reward=0.0, won=False, valid=True)

    def step(self, action_text: str) -> StepResult:
        """Repeats the text; an empty one is not valid."""
        time.sleep(self._config.step_latency_s)
        self._steps += 1
        self._break_if_scripted()
        won = action_text.strip() == self._task.get("word", "done")
        return self._result(f"{self._steps}: {action_text}", float(won), won, bool(action_text.strip()))

    def close(self) -> None:
        """Nothing is held."""

    def _result(self, text: str, reward: float, won: bool, valid: bool) -> StepResult:
        limit = int(self._task.get("length", self._config.length))
        info = {
            "won": won,
            "valid_action": valid,
            "admissible": ["say", str(self._task.get("word", "done"))],
            "steps": self._steps,
        }
        return StepResult(text + "." * self._config.padding, reward, won, not won and self._steps >= limit, info)

    def _break_if_scripted(self) -> None:
        fault = self._task.get("fault")
        if not fault or fault.get("step", 0) != self._steps:
            return
        if "once" in fault:
            try:
                os.close(os.open(fault["once"], os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                return
        FAULTS[fault["kind"]]()


def _make(config: EchoConfig) -> Callable[[], EchoEnv]:
    return lambda: EchoEnv(config)


ECHO = EnvironmentSpec(_make, "repeats every response; for tests and benchmarks", config=EchoConfig, blocking=False)
ECHO_SLOW = EnvironmentSpec(_make, "the same, a thread for each session", config=EchoConfig)
