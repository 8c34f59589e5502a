"""A minimal environment that repeats its input, for tests, fault injection and benchmarks of all layers above it.

A task is `{"word": str, "length": int, "fault": {…}}`, every key optional. A response that equals the word wins (reward
1); after `length` steps without it the episode is truncated. A fault breaks the server in a given way at a given step:

    {"kind": "exit", "step": 2}                   at every attempt
    {"kind": "hang", "step": 0, "once": "path"}   step 0 is the reset; once: only if that file is absent; creates it
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
    """Duration of a step (sleep, no computation), seconds."""
    reset_latency_s: float = 0.0
    """Duration of a reset, seconds."""
    make_latency_s: float = 0.0
    """Duration of creating the environment, seconds."""
    length: int = 5
    """Steps until truncation, if the task does not set them."""
    padding: int = 0
    """Characters appended to every observation, to measure the cost of long texts."""


def _raise() -> None:
    raise RuntimeError("scripted fault")


def _write_to_sockets(payload: bytes) -> Callable[[], None]:
    """Writes bytes directly to all connections of this process, so that all sessions of the server receive them."""

    def write() -> None:
        for name in os.listdir("/proc/self/fd"):
            try:
                if stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                    os.write(int(name), payload)
            except OSError:
                continue  # a closed or a listening socket

    return write


FAULTS: Mapping[str, Callable[[], None]] = {
    "raise": _raise,
    "exit": lambda: os._exit(17),
    "hang": lambda: time.sleep(3600),
    "rubbish": _write_to_sockets(b"\x81\x07rubbish"),  # a valid text frame, but not JSON
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
        """Repeats the text; an empty text is an invalid action."""
        time.sleep(self._config.step_latency_s)
        self._steps += 1
        self._break_if_scripted()
        won = action_text.strip() == self._task.get("word", "done")
        return self._result(f"{self._steps}: {action_text}", float(won), won, bool(action_text.strip()))

    def close(self) -> None:
        """Does nothing; there are no resources."""

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
