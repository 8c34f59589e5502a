"""Under load, no message is lost or reaches another session; a lost or crossed message would be detected."""

import contextlib
import os
import subprocess
import sys
from concurrent.futures import Future
from types import SimpleNamespace

import numpy as np
import pytest

from aem_jax.bench import envs
from aem_jax.bench.config import BenchConfig
from aem_jax.bench.envs import EPISODE, Load, measure_load, put_under_load, resident_mib
from aem_jax.envs.protocol import EnvError
from aem_jax.envs.serving.pool import EnvPool, PoolConfig
from aem_jax.envs.testing.echo import EchoEnv


def test_every_session_of_a_server_gets_its_own_replies():
    with EnvPool(PoolConfig(num_servers=1, sessions_per_server=64), ("echo", {})) as pool:
        load = put_under_load(pool, 64, 64 * 20)
    assert (load.lost, load.crossed, len(load.latency_ms)) == (0, 0, 64 * 20)
    assert load.latency_ms.min() > 0 and load.latency_ms.max() < 1e3 * load.seconds


class Faulty:
    """Sessions in this process that answer immediately; `fault` may replace the right answer."""

    def __init__(self, sessions, fault):
        self.envs, self.fault, self.steps, self.resets = [EchoEnv() for _ in range(sessions)], fault, 0, 0

    def reset(self, session, payload):
        self.resets += 1
        return self._future(lambda: self.envs[session].reset(payload))

    def step(self, session, text):
        self.steps += 1
        step = self.steps
        return self._future(lambda: self.fault(step, self.envs[session].step(text)))

    def _future(self, call):
        future = Future()
        try:
            future.set_result(call())
        except EnvError as error:
            future.set_exception(error)
        return future


def counts(load):
    return load.lost, load.crossed, len(load.latency_ms)


def test_the_number_of_steps_and_episodes_is_exact():
    pool, steps = Faulty(3, lambda step, result: result), 3 * EPISODE
    load = put_under_load(pool, 3, steps, resident=lambda: 7.0)
    assert counts(load) == (0, 0, steps) and pool.steps == steps and load.resident_mib == [7.0] * 10
    # with immediate answers the first session never pauses: it plays all three episodes
    assert pool.resets == 3


def test_a_reply_of_another_step_is_crossed():
    kept = []

    def late(step, result):
        kept.append(result)
        return kept[-2] if step == 30 else result

    assert counts(put_under_load(Faulty(2, late), 2, 80)) == (0, 1, 80)


def test_a_missing_reply_is_lost_and_ends_its_episode():
    def breaks(step, result):
        if step == 30:
            raise EnvError("gone")
        return result

    pool = Faulty(1, breaks)
    assert counts(put_under_load(pool, 1, 80)) == (1, 0, 79)
    assert (pool.steps, pool.resets) == (80, 2)  # 30 steps, and 50 of a new episode


def test_a_server_that_stays_down_ends_the_test():
    def gone(step, result):
        raise EnvError("gone")

    load = put_under_load(Faulty(2, gone), 2, 1000)
    assert 2 < load.lost <= 4 and load.crossed == 0
    assert len(load.latency_ms) == len(load.resident_mib) == 0  # nothing was answered


@pytest.mark.parametrize("steps", [1, 7, 15])
def test_memory_is_measured_after_each_tenth_of_any_number_of_steps(steps):
    pool = Faulty(4, lambda step, result: result)
    load = put_under_load(pool, 4, steps, resident=lambda: pool.steps)
    assert len(load.latency_ms) == steps
    assert load.resident_mib == [-(-tenth * steps // 10) for tenth in range(1, 11)]


def measured(monkeypatch, *loads):
    """The measurement of repetitions with these results; the first one warms up."""
    pool, results = SimpleNamespace(server_pids=()), iter(loads)  # the server is about to start again
    monkeypatch.setattr(envs, "EnvPool", lambda *_: contextlib.nullcontext(pool))
    monkeypatch.setattr(envs, "put_under_load", lambda *_: next(results))
    (result,) = measure_load(BenchConfig(sessions=2, load_steps=100, repeats=len(loads) - 1))
    return result


def test_a_server_that_dies_leaves_a_result(monkeypatch):
    memory = [float(sample) for sample in range(1, 11)]
    whole = Load(2.0, np.full(100, 1, np.float32), resident_mib=memory)
    partial = Load(3.0, np.full(60, 5, np.float32), lost=3, resident_mib=memory[:6])
    none = Load(1.0, np.zeros(0, np.float32), lost=3)
    result = measured(monkeypatch, whole, whole, partial, none)
    assert (result.best, result.worst, result.repeats) == (pytest.approx(50), pytest.approx(20), 2)
    facts = dict(result.facts)
    assert (facts["steps"], facts["lost"], facts["p50_ms"], facts["largest_ms"]) == (160, 6, 1, 5)
    assert [facts[f"server_mib_at_{percent}_percent"] for percent in (10, 50, 100)] == [1, 3, 6]
    few = measured(monkeypatch, whole, Load(1.0, np.ones(9, np.float32), lost=3))
    assert few.best == pytest.approx(9) and "server_mib_at_100_percent" not in few.facts
    with pytest.raises(EnvError, match="expected answers to the steps of 2 sessions, got none"):
        measured(monkeypatch, none, none)


def test_an_ended_process_has_no_memory():
    process = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert resident_mib("self") > 1 and resident_mib(process.pid) == 0  # its parent has not asked for its status
    process.wait()
    assert resident_mib(process.pid) == 0
