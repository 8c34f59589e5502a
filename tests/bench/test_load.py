"""Under load, no message is lost or reaches another session; a lost or crossed message would be detected."""

from concurrent.futures import Future

import pytest

from aem_jax.bench.load import EPISODE, put_under_load
from aem_jax.envs.protocol import EnvError
from aem_jax.envs.serving.pool import EnvPool, PoolConfig
from aem_jax.envs.testing.echo import EchoEnv


def test_many_sessions_of_one_server_each_hear_their_own():
    with EnvPool(PoolConfig(num_servers=1, sessions_per_server=64), ("echo", {})) as pool:
        found = put_under_load(pool, 64, 64 * 20)
    assert (found.lost, found.crossed, len(found.latency_ms)) == (0, 0, 64 * 20)
    assert found.latency_ms.min() > 0 and found.latency_ms.max() < 1e3 * found.seconds


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

    def _future(self, answer):
        future = Future()
        try:
            future.set_result(answer())
        except EnvError as error:
            future.set_exception(error)
        return future


def answers(found):
    return found.lost, found.crossed, len(found.latency_ms)


def test_every_step_is_made_and_every_episode_begun():
    pool, steps = Faulty(3, lambda step, result: result), 3 * EPISODE
    found = put_under_load(pool, 3, steps, resident=lambda: 7.0)
    assert answers(found) == (0, 0, steps) and pool.steps == steps and found.resident_mib == [7.0] * 10
    # with immediate answers the first session never pauses: it plays all three episodes
    assert pool.resets == 3


def test_an_answer_of_another_step_is_crossed():
    kept = []

    def late(step, result):
        kept.append(result)
        return kept[-2] if step == 30 else result

    assert answers(put_under_load(Faulty(2, late), 2, 80)) == (0, 1, 80)


def test_an_answer_that_does_not_come_is_lost_and_its_episode_with_it():
    def breaks(step, result):
        if step == 30:
            raise EnvError("gone")
        return result

    pool = Faulty(1, breaks)
    assert answers(put_under_load(pool, 1, 80)) == (1, 0, 80)
    assert pool.resets == 2  # 30 steps, and 50 of a new episode


def test_a_server_that_stays_away_ends_it():
    def gone(step, result):
        raise EnvError("gone")

    found = put_under_load(Faulty(2, gone), 2, 1000)
    assert 2 < found.lost <= 4 and found.crossed == 0


@pytest.mark.parametrize("steps", [1, 7])
def test_few_steps_are_enough(steps):
    assert len(put_under_load(Faulty(4, lambda step, result: result), 4, steps).latency_ms) == steps
