"""What a rollout counted, and how long the device had something to do."""

import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields

import jax

from aem_jax.envs.protocol import EnvError
from aem_jax.trajectory import Ending, Trajectory


@dataclass
class RolloutStats:
    """Counts and seconds of one rollout.

    Attributes:
        episodes: that ended.
        sampled_tokens: said.
        heard_tokens: computed, not said: prompts once for each group.
        retries: episodes begun again.
        env_errors: episodes masked.
        overlong_prompts: episodes left out.
        device_busy_s: seconds in which the device had a program to run, or was being handed one.
        environment_s: seconds in which nothing was left to do but to wait for environments.
        total_s: seconds in all.
        first_error: the first task that could not be played, and why, in one line; empty where all could.
    """

    episodes: int = 0
    sampled_tokens: int = 0
    heard_tokens: int = 0
    retries: int = 0
    env_errors: int = 0
    overlong_prompts: int = 0
    device_busy_s: float = 0.0
    environment_s: float = 0.0
    total_s: float = 0.0
    first_error: str = ""

    def __add__(self, other: "RolloutStats") -> "RolloutStats":
        """Those of two rollouts, one after the other."""
        names = [each.name for each in fields(self) if each.name != "first_error"]
        added = {name: getattr(self, name) + getattr(other, name) for name in names}
        return RolloutStats(**added, first_error=self.first_error or other.first_error)


def none_played(trajectories: Iterable[Trajectory]) -> bool:
    """Whether no episode had a turn that counts: the environment broke it, or its first prompt was too long."""
    return all(each.ending is Ending.ENV_ERROR or not each.turns for each in trajectories)


def check_some_played(trajectories: Iterable[Trajectory], stats: RolloutStats, where: str) -> None:
    """Ends what cannot go on: a fault of every episode is not the tasks'.

    All processes hold the same trajectories, so all of them end, or none.

    Raises:
        EnvError: no episode was played; with the first error.
    """
    if none_played(trajectories):
        raise EnvError(f"no episode of {where} could be played; the first error: {stats.first_error}")


class DeviceClock:
    """Adds up the time in which the device had a program to run, as seen from the host: programs run one after the
    other, so one is busy from when it was called, or the one before it ended, to when it ends."""

    def __init__(self) -> None:
        self._busy, self._last, self._since = 0.0, 0.0, None
        self._watcher = ThreadPoolExecutor(1, "device-clock")

    def called(self) -> None:
        """A program is about to be called."""
        self._since = self._since or time.perf_counter()

    def watch(self, output: jax.Array) -> None:
        """An output of the last program called, one that is not donated to the next."""
        since, self._since = self._since or time.perf_counter(), None
        self._watcher.submit(self._wait, since, output)

    def stop(self) -> float:
        """Seconds busy, when all programs watched have ended."""
        self._watcher.shutdown()
        return self._busy

    def _wait(self, since: float, output: jax.Array) -> None:
        output.block_until_ready()
        now = time.perf_counter()
        self._busy += now - max(since, self._last)
        self._last = now
