"""A small policy, a chat of bytes and a pool in this process: deterministic, instant, with failures on demand."""

import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from aem_jax.envs.protocol import EnvError, StepResult, Task
from aem_jax.models import ModelConfig, Policy
from aem_jax.rollout import RolloutConfig
from aem_jax.trajectory import Trajectory

from .countdown import CountdownEnv

STOP, START, USER = 1, 2, 3
VOCAB = 32
POLICY = Policy(ModelConfig(VOCAB, 32, 64, 2, 4, 2, 8, rope_theta=10_000.0))
CONFIG = RolloutConfig(
    groups_per_step=3, group_size=4, num_slots=12, max_turns=6, response_tokens=7, context_tokens=96, prompt_tokens=16,
    decode_chunk=4, extend_buckets=(4, 8), windows=(32,),
)  # fmt: skip
TASKS = [Task(f"t{n}", "countdown", {"turns": n}) for n in (2, 5, 3)]


def sampled(trajectories: list[Trajectory]) -> list[list[list[int]]]:
    """Sampled ids of each turn of each trajectory."""
    return [[turn.response_ids.tolist() for turn in t.turns] for t in trajectories]


class ByteChat:
    """Text of the letters a..z as ids 4..29; USER text STOP START response STOP USER ..."""

    stop_ids = (STOP,)

    def encode(self, text: str) -> list[int]:
        return [4 + (ord(c) - 97) % 26 for c in text]

    def response_ids(self, response: str) -> list[int]:
        return [*self.encode(response), STOP]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(chr(97 + i - 4) for i in ids if i >= 4)

    def prompt_ids(self, messages: Sequence[dict[str, str]]) -> list[int]:
        ids: list[int] = []
        for message in messages:
            ids += [START if message["role"] == "assistant" else USER, *self.encode(message["content"]), STOP]
        return [*ids, START]

    def delta_ids(self, observation: str, *, closed: bool = True) -> list[int]:
        return [*([] if closed else [STOP]), USER, *self.encode(observation), STOP, START]


class LocalPool:
    """Sessions of one environment class; `broken(session, call)` selects the failing calls."""

    def __init__(
        self,
        capacity: int,
        make: Callable[[], Any] = CountdownEnv,
        broken: Callable[[int, int], bool] = lambda *_: False,
    ):
        self.capacity, self.calls, self._broken = capacity, 0, broken
        self._envs = [make() for _ in range(capacity)]

    def _future(self, session: int, call: Callable[[], StepResult]) -> Future[StepResult]:
        future: Future[StepResult] = Future()
        self.calls += 1
        if self._broken(session, self.calls):
            future.set_exception(EnvError("broken on purpose"))
        else:
            future.set_result(call())
        return future

    def server_of(self, session: int) -> int:
        return session

    def reset(self, session: int, payload: Mapping[str, Any]) -> Future[StepResult]:
        return self._future(session, lambda: self._envs[session].reset(payload))

    def step(self, session: int, text: str) -> Future[StepResult]:
        return self._future(session, lambda: self._envs[session].step(text))


class LatePool(LocalPool):
    """Replies after up to 20 ms, so that replies arrive out of order."""

    def __init__(self, capacity: int, seed: int, **kwargs):
        super().__init__(capacity, **kwargs)
        self._rng = random.Random(seed)

    def _future(self, session: int, call: Callable[[], StepResult]) -> Future[StepResult]:
        ready, late = super()._future(session, call), Future()

        def answer() -> None:
            if error := ready.exception():
                late.set_exception(error)
            else:
                late.set_result(ready.result())

        threading.Timer(self._rng.uniform(0, 0.02), answer).start()
        return late


class RoomPool(LocalPool):
    """Has room for few episodes; further resets wait until an episode ends, or is released.

    A thread resets and releases sessions, in order and a little later, as that of `EnvPool` does.
    """

    def __init__(self, capacity: int, room: int, make: Callable[[], Any] = CountdownEnv):
        super().__init__(capacity, make)
        self._room, self._holding, self.most = room, set[int](), 0
        self._resets: dict[int, Future[StepResult]] = {}
        self._waiting: dict[int, Callable[[], None]] = {}
        self._thread = ThreadPoolExecutor(1)

    @property
    def holding(self) -> set[int]:
        """The sessions that hold room, when all is done that was asked for before."""
        return self._thread.submit(lambda: set(self._holding)).result()

    def reset(self, session: int, payload: Mapping[str, Any]) -> Future[StepResult]:
        future = self._resets[session] = Future()
        self._thread.submit(self._leave, session)  # a reset ends the episode before
        self._thread.submit(self._enter, session, lambda: future.set_result(self._envs[session].reset(payload)))
        return future

    def step(self, session: int, text: str) -> Future[StepResult]:
        future = super().step(session, text)
        if future.result().done:
            self.release(session)
        return future

    def waits(self, session: int) -> bool:
        return session in self._waiting

    def release(self, session: int) -> None:
        assert session not in self._resets or self._resets[session].done()
        self._thread.submit(self._leave, session)

    def _leave(self, session: int) -> None:
        time.sleep(0.001)
        self._holding.discard(session)
        self._admit()

    def _enter(self, session: int, begin: Callable[[], None]) -> None:
        self._waiting[session] = begin
        self._admit()

    def _admit(self) -> None:
        while self._waiting and len(self._holding) < self._room:
            session = next(iter(self._waiting))
            self._holding.add(session)
            self._waiting.pop(session)()
        self.most = max(self.most, len(self._holding))
