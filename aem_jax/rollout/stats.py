"""Counts and seconds of a rollout."""

import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields

import jax

from aem_jax.envs.protocol import EnvError
from aem_jax.trajectory import Trajectory


@dataclass
class RolloutStats:
    """Counts and seconds of one rollout.

    Attributes:
        episodes: episodes that ended.
        sampled_tokens: tokens of responses.
        prompt_tokens: tokens of the prompts of all responses, as the model sees them.
        prefill_tokens: tokens of prompts that were computed; the others were in the cache.
        recomputed_tokens: tokens that were in the cache with parameters of an earlier step, and are prefilled again.
        padded_tokens: computed tokens with the padding of their calls.
        retries: further attempts at episodes.
        env_errors: episodes masked.
        overlong_prompts: episodes whose first prompt was too long.
        branches: prompts that do not continue the latest response (context "tree").
        rematched: responses that came back with changes that do not matter (context "tree").
        device_busy_s: seconds in which the device ran a program, or a program was being called.
        environment_s: seconds in which the host only waited for environments.
        total_s: seconds in all.
        first_error: the first task that could not be played, and the reason, in one line; empty if there is none.
    """

    episodes: int = 0
    sampled_tokens: int = 0
    prompt_tokens: int = 0
    prefill_tokens: int = 0
    recomputed_tokens: int = 0
    padded_tokens: int = 0
    retries: int = 0
    env_errors: int = 0
    overlong_prompts: int = 0
    branches: int = 0
    rematched: int = 0
    device_busy_s: float = 0.0
    environment_s: float = 0.0
    total_s: float = 0.0
    first_error: str = ""

    def __add__(self, other: "RolloutStats") -> "RolloutStats":
        """The sums over two rollouts, one after the other."""
        names = [field.name for field in fields(self) if field.name != "first_error"]
        sums = {name: getattr(self, name) + getattr(other, name) for name in names}
        return RolloutStats(**sums, first_error=self.first_error or other.first_error)


def none_played(trajectories: Iterable[Trajectory]) -> bool:
    """Whether no episode has a turn that counts: the environment broke it, or its first prompt was too long."""
    return all(trajectory.is_left_out or not trajectory.turns for trajectory in trajectories)


class OverlongPromptsError(EnvError):
    """No first prompt has at most `rollout.prompt_tokens` tokens."""


def check_some_played(trajectories: Iterable[Trajectory], stats: RolloutStats, where: str) -> None:
    """Raises an error if no episode was played, because the cause is then not a single task.

    All processes hold the same trajectories, so all of them raise, or none.

    Raises:
        EnvError: no episode was played; with the first error.
    """
    if none_played(trajectories):
        kind = OverlongPromptsError if stats.overlong_prompts and not stats.env_errors else EnvError
        raise kind(f"no episode of {where} could be played; the first error: {stats.first_error}")


class DeviceClock:
    """Measures the time in which the device had a program to run, from the host.

    Programs run one after another: a program runs from its call, or from the end of the previous program, to its end.
    """

    def __init__(self) -> None:
        self._busy, self._last_end, self._called = 0.0, 0.0, None
        self._watcher = ThreadPoolExecutor(1, "device-clock")

    def before_call(self) -> None:
        """Marks the time of a call; until `after_call`, further marks change nothing."""
        self._called = self._called or time.perf_counter()

    def after_call(self, output: jax.Array) -> None:
        """Watches a program by an output, one that is not donated to the next program."""
        called, self._called = self._called or time.perf_counter(), None
        self._watcher.submit(self._wait, called, output)

    def stop(self) -> float:
        """Waits for all watched programs; returns the seconds busy."""
        self._watcher.shutdown()
        return self._busy

    def _wait(self, called: float, output: jax.Array) -> None:
        output.block_until_ready()
        now = time.perf_counter()
        self._busy += now - max(called, self._last_end)
        self._last_end = now
