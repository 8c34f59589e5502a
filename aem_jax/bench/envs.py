"""Environment servers over their wire, through the pool that a rollout uses: at the pace of a step, and under load.

Under load, every session steps as soon as its reply arrives, and every message has a tag: its session and number. The
echo must return to that session with that number. A reply to another session, a repeated one, or one out of order is
*crossed*; a missing one is *lost*. Latency is the time from the call of the pool to its result, and so includes waiting
for other sessions. The server's resident memory should stay constant after the first tenth of the steps.

    python -m aem_jax.launch bench load --sessions 256 --load-steps 1000000 --repeats 1
"""

import re
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from aem_jax.bench.config import BenchConfig
from aem_jax.bench.measure import Measurement, summarise, timed
from aem_jax.envs.protocol import EnvError, StepResult
from aem_jax.envs.serving.pool import EnvPool, PoolConfig

EPISODE = 50
"""Steps of an episode, after which a session is reset."""

HOUSEHOLD: Mapping[str, Any] = {"generate": {"seed": 0, "split": "train", "index": 0, "max_steps": EPISODE + 1}}


def measure_envs(config: BenchConfig) -> list[Measurement]:
    """Steps per second of a household, and of an environment that does nothing, which is the cost of the wire alone."""
    commands = ("<action>look</action>", "<action>inventory</action>")
    return [
        _steps(config, "alfworld", {}, HOUSEHOLD, lambda step: commands[step % 2]),
        _steps(config, "echo", {"length": EPISODE + 1}, {}, lambda step: "hello"),
    ]


def _steps(
    config: BenchConfig, name: str, settings: Mapping[str, Any], task: Mapping[str, Any], act: Callable[[int], str]
) -> Measurement:
    sessions = range(config.sessions)
    with EnvPool(PoolConfig(num_servers=1, sessions_per_server=config.sessions), (name, settings)) as pool:

        def play() -> None:
            for future in [pool.reset(session, task) for session in sessions]:
                future.result()
            for step in range(EPISODE):
                for future in [pool.step(session, act(step)) for session in sessions]:
                    future.result()

        shape = f"1 server, {config.sessions} sessions, reset every {EPISODE} steps"
        seconds = timed(play, repeats=config.repeats)
        return summarise("envs", name, shape, "steps/s", config.sessions * EPISODE, seconds)


class Sessions(Protocol):
    """The sessions under load; an `EnvPool`."""

    def reset(self, session: int, payload: Mapping[str, Any]) -> Future[StepResult]:
        """Starts an episode."""
        ...

    def step(self, session: int, text: str) -> Future[StepResult]:
        """Sends a response to the environment."""
        ...


@dataclass
class Load:
    """The result of a load test.

    Attributes:
        seconds: from the first request to the last reply.
        latency_ms: of each answered step, in no order. f32[answered steps]
        lost: steps and resets without a reply.
        crossed: replies that belong to another step.
        resident_mib: results of `resident` after each tenth of the steps; fewer than ten if steps were not answered.
    """

    seconds: float
    latency_ms: np.ndarray
    lost: int = 0
    crossed: int = 0
    resident_mib: list[float] = field(default_factory=list)


def put_under_load(pool: Sessions, sessions: int, steps: int, resident: Callable[[], float] = lambda: 0.0) -> Load:
    """Lets all sessions step independently, until `steps` were taken in all, or until the server stays down.

    Args:
        pool: the sessions, of an echo environment.
        sessions: number of sessions.
        steps: of all sessions together.
        resident: returns MiB of memory; called after each tenth of the steps.
    """
    # Ones, not zeros: pages that are first written when latencies arrive would look like a leak.
    load = Load(0.0, np.ones(steps, np.float32))
    lock, ended = threading.Lock(), threading.Semaphore(0)
    begun = answered = 0

    def request(session: int, count: int) -> None:
        """Sends the next request of a session that has taken `count` steps."""
        nonlocal begun
        with lock:
            over = begun >= steps or load.lost > sessions  # a server that stays down must not be asked forever
            resets = not over and not running[session]
            running[session] = True
            begun += not over and not resets
        if over:
            ended.release()
        elif resets:
            future = pool.reset(session, {"word": f"never {session}", "length": EPISODE + 1})
            future.add_done_callback(lambda future: check(session, count, future, f"say never {session}"))
        else:
            start = time.perf_counter()
            future = pool.step(session, f"{session}/{count}")
            future.add_done_callback(lambda future: receive(session, count, start, future))

    def receive(session: int, count: int, start: float, future: Future[StepResult]) -> None:
        nonlocal answered
        milliseconds = 1e3 * (time.perf_counter() - start)
        if future.exception() is None:
            with lock:
                load.latency_ms[answered] = milliseconds
                answered += 1
                if due := answered * 10 // steps - len(load.resident_mib):
                    load.resident_mib += [resident()] * due
        count += 1
        running[session] = count % EPISODE != 0
        check(session, count, future, f"{(count - 1) % EPISODE + 1}: {session}/{count - 1}")

    def check(session: int, count: int, future: Future[StepResult], expected: str) -> None:
        try:
            crossed = future.result().observation != expected
        except EnvError:
            running[session] = False
            count = -(-count // EPISODE) * EPISODE  # as after a complete episode
            with lock:
                load.lost += 1
        else:
            with lock:
                load.crossed += crossed
        request(session, count)

    running = [False] * sessions
    start = time.perf_counter()
    for session in range(sessions):
        request(session, 0)
    for _ in range(sessions):
        ended.acquire()
    load.seconds = time.perf_counter() - start
    load.latency_ms = load.latency_ms[:answered]
    return load


def resident_mib(pid: int | str) -> float:
    """Resident memory of a process in MiB; 0 for one that has ended, or where there is no `/proc`."""
    try:
        resident = re.search(r"^VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        return 0.0
    return int(resident[1]) / 1024 if resident else 0.0


def measure_load(config: BenchConfig) -> list[Measurement]:
    """Steps per second of all sessions, the latency of a step, and the lost and crossed replies.

    Raises:
        EnvError: the server answered no step.
    """
    server = PoolConfig(num_servers=1, sessions_per_server=config.sessions)
    with EnvPool(server, ("echo", {})) as pool:
        put_under_load(pool, config.sessions, max(config.load_steps // 10, config.sessions))  # warm-up
        memory = lambda: sum(map(resident_mib, pool.server_pids), 0.0)  # no process while the server starts again
        begin, own_begin = memory(), resident_mib("self")
        loads = [put_under_load(pool, config.sessions, config.load_steps, memory) for _ in range(config.repeats)]
    rated = [load for load in loads if len(load.latency_ms)]
    if not rated:
        raise EnvError(f"expected answers to the steps of {config.sessions} sessions, got none: the server stays down")
    latency = np.concatenate([load.latency_ms for load in rated])
    facts = {f"p{share}_ms": float(np.percentile(latency, share)) for share in (50, 99)}
    facts |= {"largest_ms": float(latency.max()), "steps": float(len(latency))}
    facts |= {"lost": sum(load.lost for load in loads), "crossed": sum(load.crossed for load in loads)}
    facts |= {"server_mib_at_the_start": begin}
    if samples := rated[-1].resident_mib:  # fewer than ten, or none, if the server died
        at = lambda percent: samples[max(percent * len(samples) // 100, 1) - 1]
        facts |= {f"server_mib_at_{percent}_percent": at(percent) for percent in (10, 50, 100)}
    facts |= {"client_mib_at_the_start": own_begin, "client_mib_at_the_end": resident_mib("self")}
    shape = f"1 server, {config.sessions} sessions, {config.load_steps} steps, reset every {EPISODE}"
    seconds = [load.seconds / len(load.latency_ms) for load in rated]  # of an answered step
    return [summarise("load", "echo", shape, "steps/s", 1, seconds, facts=facts)]
