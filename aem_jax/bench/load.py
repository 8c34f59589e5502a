"""One environment server under load: sessions that each step as fast as they are answered, every message tagged.

A step says which session it is of and the how manieth; the echo must come back to that session, with that number. What
comes back to another session, or twice, or in another order is *crossed*; what does not come back is *lost*. Latency is
the time from handing a step to the pool until its result is there, so waiting behind the other sessions counts. The
server's resident memory is read as the steps go on: after the first tenth it should stay where it is.

    python -m aem_jax.launch bench load --sessions 256 --load-steps 1000000 --repeats 1
"""

import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from aem_jax.bench.config import BenchConfig
from aem_jax.bench.measure import Measurement, summarise
from aem_jax.envs.protocol import EnvError, StepResult
from aem_jax.envs.serving.pool import EnvPool, PoolConfig

EPISODE = 50
"""Steps of an episode, after which a session is reset."""


class Sessions(Protocol):
    """What is put under load; an `EnvPool`."""

    def reset(self, session: int, payload: Mapping[str, Any]) -> Future[StepResult]:
        """Starts an episode."""
        ...

    def step(self, session: int, text: str) -> Future[StepResult]:
        """Answers a response."""
        ...


@dataclass
class Load:
    """What happened.

    Attributes:
        seconds: from the first request to the last answer.
        latency_ms: of each step, in no order. f32[steps]
        lost: steps and resets without an answer.
        crossed: answers that are another step's.
        resident_mib: what `resident` gave after each tenth of the steps.
    """

    seconds: float
    latency_ms: np.ndarray
    lost: int = 0
    crossed: int = 0
    resident_mib: list[float] = field(default_factory=list)


def put_under_load(pool: Sessions, sessions: int, steps: int, resident: Any = lambda: 0.0) -> Load:
    """Lets all sessions step at their own pace until `steps` were taken in all.

    Args:
        pool: the sessions; of an echo environment.
        sessions: how many.
        steps: of all sessions together.
        resident: gives MiB of memory; called ten times.
    """
    # Ones, not zeros: memory that is first touched as latencies come in would look like a leak.
    found = Load(0.0, np.ones(steps, np.float32))
    lock, ended = threading.Lock(), threading.Semaphore(0)
    begun = answered = 0
    tenth = max(steps // 10, 1)

    def ask(session: int, count: int) -> None:
        """The next request of a session that has taken `count` steps."""
        nonlocal begun
        with lock:
            over = begun >= steps or found.lost > sessions  # a server that stays away would be asked for ever
            resets = not over and not running[session]
            running[session] = True
            begun += not over and not resets
        if over:
            ended.release()
        elif resets:
            request = pool.reset(session, {"word": f"never {session}", "length": EPISODE + 1})
            request.add_done_callback(lambda future: check(session, count, future, f"say never {session}"))
        else:
            start = time.perf_counter()
            request = pool.step(session, f"{session}/{count}")
            request.add_done_callback(lambda future: told(session, count, start, future))

    def told(session: int, count: int, start: float, future: Future[StepResult]) -> None:
        nonlocal answered
        milliseconds = 1e3 * (time.perf_counter() - start)
        with lock:
            found.latency_ms[answered] = milliseconds
            answered += 1
            if answered % tenth == 0 and len(found.resident_mib) < 10:
                found.resident_mib.append(resident())
        count += 1
        running[session] = count % EPISODE != 0
        check(session, count, future, f"{(count - 1) % EPISODE + 1}: {session}/{count - 1}")

    def check(session: int, count: int, future: Future[StepResult], expected: str) -> None:
        try:
            crossed = future.result().observation != expected
        except EnvError:
            running[session] = False
            count = -(-count // EPISODE) * EPISODE  # as if its episode had been played to the end
            with lock:
                found.lost += 1
        else:
            with lock:
                found.crossed += crossed
        ask(session, count)

    running = [False] * sessions
    start = time.perf_counter()
    for session in range(sessions):
        ask(session, 0)
    for _ in range(sessions):
        ended.acquire()
    found.seconds = time.perf_counter() - start
    found.latency_ms = found.latency_ms[:answered]
    return found


def resident_mib(pid: int | str) -> float:
    """Resident memory of a process in MiB; 0 where the system does not say (it is Linux that does)."""
    status = Path(f"/proc/{pid}/status")
    if not status.exists():
        return 0.0
    line = next(line for line in status.read_text(encoding="utf-8").splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


def run(config: BenchConfig) -> list[Measurement]:
    """Steps a second of all sessions, the latency of a step, and what was lost or crossed."""
    server = PoolConfig(num_servers=1, sessions_per_server=config.sessions)
    with EnvPool(server, ("echo", {})) as pool:
        put_under_load(pool, config.sessions, max(config.load_steps // 10, config.sessions))  # to warm up
        memory = lambda: resident_mib(pool.server_pids[0])
        begin, own_begin = memory(), resident_mib("self")
        rounds = [put_under_load(pool, config.sessions, config.load_steps, memory) for _ in range(config.repeats)]
    latency = np.concatenate([each.latency_ms for each in rounds])
    facts = {f"p{share}_ms": float(np.percentile(latency, share)) for share in (50, 99)}
    facts |= {"largest_ms": float(latency.max()), "steps": float(len(latency))}
    facts |= {"lost": sum(each.lost for each in rounds), "crossed": sum(each.crossed for each in rounds)}
    facts |= {"server_mib_at_the_start": begin}
    facts |= {f"server_mib_at_{share}_percent": rounds[-1].resident_mib[share // 10 - 1] for share in (10, 50, 100)}
    facts |= {"client_mib_at_the_start": own_begin, "client_mib_at_the_end": resident_mib("self")}
    shape = f"1 server, {config.sessions} sessions, {config.load_steps} steps, reset every {EPISODE}"
    return [
        summarise("load", "echo", shape, "steps/s", config.load_steps, [each.seconds for each in rounds], facts=facts)
    ]
