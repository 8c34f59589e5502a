"""Sandboxes: how long they take to start, to run a command, to close and to grade, with many at a time.

An episode opens a workspace, runs commands in it, closes it, and grades the fix of its task in a fresh workspace, as
episodes of `swe` do. It is lost if any of that fails, or if the fix does not solve its task.

    python -m aem_jax.launch bench sandboxes --sandboxes podman --sandbox-image localhost/debian-pytest --at-once 1 16

The first start of a task is cold: its files are packed or its image is prepared, unless an earlier process did that.
Later starts are warm. Processors are not reserved here; a host with too little memory or disk admits fewer at a time,
and starts include the wait.
"""

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeVar

import numpy as np

from aem_jax.bench.config import BenchConfig
from aem_jax.bench.measure import Measurement, summarise
from aem_jax.envs.protocol import describe
from aem_jax.envs.swe.formats import grade
from aem_jax.envs.swe.instance import Instance
from aem_jax.envs.swe.sandbox.admission import HostConfig
from aem_jax.envs.swe.sandbox.choose import RUNTIMES, choose_runtime
from aem_jax.envs.swe.sandbox.containers import ContainerConfig
from aem_jax.envs.swe.sandbox.workspace import Checkout, Limits, PreparingRuntime, Runtime, SandboxError
from aem_jax.envs.swe.tasks import full_payload, generated_tasks, load_task
from aem_jax.errors import ConfigError

log = logging.getLogger(__name__)

LIMITS = Limits(seconds=120, memory_mib=256, processes=32, file_mib=16, disk_mib=32, cpus=1.0)
"""Small, so that 64 workspaces fit into a laptop's memory."""
COLD_TASKS = 3
"""Tasks whose first start is measured."""
COMMAND = "grep -rn def . | head -n 20"
T = TypeVar("T")
PHASES = ("start", "command", "close", "grade")


@dataclass
class Episodes:
    """Times of episodes, in no order (mutable; threads add to it).

    Attributes:
        milliseconds: of each phase.
        lost: episodes that failed.
    """

    milliseconds: dict[str, list[float]] = field(default_factory=lambda: {phase: [] for phase in PHASES})
    lost: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def timed(self, phase: str, call: Callable[[], T]) -> T:
        """Calls and notes the time."""
        start = time.perf_counter()
        result = call()
        with self._lock:
            self.milliseconds[phase].append(1e3 * (time.perf_counter() - start))
        return result

    def lose(self, why: str) -> None:
        """Counts a lost episode."""
        log.warning("an episode was lost: %s", why)
        with self._lock:
            self.lost += 1

    def facts(self) -> dict[str, float]:
        """Percentiles of each phase, and the number of lost episodes."""
        facts = {
            f"{phase}_p{share}_ms": float(np.percentile(values, share))
            for phase, values in self.milliseconds.items()
            for share in (50, 99)
            if values
        }
        return {**facts, "lost": float(self.lost)}


def measure_sandboxes(config: BenchConfig) -> list[Measurement]:
    """Episodes per second of each sandbox that works here, at each number at a time, and the times of their phases.

    Raises:
        ConfigError: a sandbox that the config names does not work, or none does.
    """
    measured, reasons = [], []
    for name in config.sandboxes or RUNTIMES:
        try:
            if name != "bubblewrap" and not config.sandbox_image:
                raise SandboxError(f"{name} needs an image with python, pytest, git, patch and tar: --sandbox-image")
            make = partial(
                choose_runtime,
                name,
                container=ContainerConfig(image=config.sandbox_image, storage=config.sandbox_storage),
                host=HostConfig(cpus=LIMITS.cpus * max(config.at_once)),
            )
            measured += _measure(config, name, make)
        except (SandboxError, ValueError) as error:
            if config.sandboxes:
                raise ConfigError(f"--sandboxes {name}: {error}") from None
            reasons.append(f"{name}: {error}")
            log.warning("not measured: %s", reasons[-1])
    if not measured:
        raise ConfigError(f"expected a sandbox that works on this machine, found none: {'; '.join(reasons)}")
    return measured


def _measure(config: BenchConfig, name: str, make: Callable[[], Runtime]) -> list[Measurement]:
    tasks = [load_task(full_payload(task.payload)) for task in generated_tasks("train", ["easy"])]
    result = partial(summarise, "sandboxes")
    cold = Episodes()
    for task in tasks[1 : 1 + COLD_TASKS]:
        cold.timed("start", partial(make().open, *task, limits=LIMITS)).close()
    seconds = [milliseconds / 1e3 for milliseconds in cold.milliseconds["start"]]
    measured = [result(f"cold starts, {name}", f"{COLD_TASKS} tasks, one at a time", "starts/s", 1, seconds)]
    runtime, (instance, checkout) = make(), tasks[0]
    runtime.open(instance, checkout, limits=LIMITS).close()
    for count in config.at_once:
        episodes, seconds = Episodes(), []
        for _ in range(config.repeats):
            start = time.perf_counter()
            with ThreadPoolExecutor(count) as threads:
                play = partial(_play, episodes, runtime, instance, checkout, config.sandbox_commands)
                for played in [threads.submit(play) for _ in range(count)]:
                    played.result()
            seconds.append(time.perf_counter() - start)
        shape = f"{count} at a time, {config.sandbox_commands} commands and a grading each"
        what = f"episodes, {name}, {count} at a time"
        measured.append(result(what, shape, "episodes/s", count, seconds, facts=episodes.facts()))
    return measured


def _play(episodes: Episodes, runtime: Runtime, instance: Instance, checkout: Checkout, commands: int) -> None:
    """Plays one episode; what fails in it costs this episode alone."""
    try:
        workspace = episodes.timed("start", lambda: runtime.open(instance, checkout, limits=LIMITS))
        try:
            if isinstance(runtime, PreparingRuntime):
                runtime.prepare(instance, checkout, limits=LIMITS)
            outcomes = [episodes.timed("command", lambda: workspace.run(COMMAND)) for _ in range(commands)]
        finally:
            episodes.timed("close", workspace.close)
        if wrong := [outcome for outcome in outcomes if outcome.exit_code != 0 or "def " not in outcome.output]:
            episodes.lose(f"a command had the outcome {wrong[0]}")
            return
        limits = replace(LIMITS, output_bytes=2**20)
        report = episodes.timed("grade", lambda: grade(instance, instance.patch, runtime, checkout, limits=limits))
        if not report.resolved:
            episodes.lose(f"the fix did not solve its task: {report.log[-500:]}")
    except SandboxError as error:
        episodes.lose(describe(error))
