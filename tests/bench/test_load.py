"""Under load, no message is lost or reaches another session; a lost or crossed message would be detected."""

from concurrent.futures import Future

import pytest

from aem_jax.bench.envs import EPISODE, put_under_load
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
    assert counts(put_under_load(pool, 1, 80)) == (1, 0, 80)
    assert pool.resets == 2  # 30 steps, and 50 of a new episode


def test_a_server_that_stays_down_ends_the_test():
    def gone(step, result):
        raise EnvError("gone")

    load = put_under_load(Faulty(2, gone), 2, 1000)
    assert 2 < load.lost <= 4 and load.crossed == 0


@pytest.mark.parametrize("steps", [1, 7])
def test_few_steps_end_the_test(steps):
    assert len(put_under_load(Faulty(4, lambda step, result: result), 4, steps).latency_ms) == steps
