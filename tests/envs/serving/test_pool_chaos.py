"""Servers in use are killed, frozen and made to send garbage. All episodes end, and the others are not affected."""

import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from aem_jax.envs.protocol import EnvError
from aem_jax.envs.serving.pool import EnvPool, PoolConfig

CONFIG = PoolConfig(num_servers=2, sessions_per_server=4, reset_deadline_s=4.0, step_deadline_s=2.0, first_pause_s=0.05)
MAKE = ("echo", {"length": 8, "step_latency_s": 0.001})
EPISODES = 12


def transcript(word):
    """The observations of an episode without faults."""
    return [f"say {word}", *(f"{step}: try {step}" for step in range(1, 8)), f"8: {word}"]


def play(pool, session, task, errors):
    """Plays one episode, restarted after each error; returns its observations."""
    while True:
        try:
            result = pool.reset(session, task).result()
            observations = [result.observation]
            for step in range(1, 9):
                result = pool.step(session, f"try {step}" if step < 8 else task["word"]).result()
                observations.append(result.observation)
            assert result.terminated and result.info["won"]
            return observations
        except EnvError as error:
            errors.append((session, str(error)))
            assert len(errors) < 100


def play_all(pool, tasks_of, disturb=lambda: None):
    """All sessions play their tasks at once while `disturb` runs; returns transcripts by session, and the errors."""
    errors = []

    def run(session):
        return [play(pool, session, task, errors) for task in tasks_of(session)]

    with ThreadPoolExecutor(pool.capacity + 1) as threads:
        nuisance = threads.submit(disturb)
        transcripts = list(threads.map(run, range(pool.capacity)))
        nuisance.result()
    return transcripts, errors


def expected(pool, tasks_of):
    return [[transcript(task["word"]) for task in tasks_of(session)] for session in range(pool.capacity)]


def plain_tasks(session):
    return [{"word": f"w{session}-{episode}"} for episode in range(EPISODES)]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_server_killed_or_frozen_under_way(number):
    with EnvPool(CONFIG, MAKE) as pool:
        untouched, victim = pool.server_pids

        def disturb():
            time.sleep(0.05)
            os.kill(victim, number)

        transcripts, errors = play_all(pool, plain_tasks, disturb)
        assert transcripts == expected(pool, plain_tasks)
        assert errors and {pool.server_of(session) for session, _ in errors} == {1}
        assert all(f"environment server 1 (pid {victim})" in message for _, message in errors)
        assert pool.server_pids[0] == untouched and pool.server_pids[1] != victim
        assert pool.stats().restarts == (0, 1)
        assert pool.stats().failed_calls == len(errors)
        with pytest.raises(ProcessLookupError):
            os.kill(victim, 0)


@pytest.mark.parametrize("kind", ["exit", "hang", "rubbish", "broken"])
@pytest.mark.parametrize("step", [0, 3])
def test_a_server_that_breaks_at_a_step(kind, step, tmp_path):
    fault = {"kind": kind, "step": step, "once": str(tmp_path / "happened")}

    def tasks_of(session):
        return [
            {**task, **({"fault": fault} if (session, i) == (2, 5) else {})}
            for i, task in enumerate(plain_tasks(session))
        ]

    with EnvPool(CONFIG, MAKE) as pool:
        untouched = pool.server_pids[1]
        transcripts, errors = play_all(pool, tasks_of)
        assert transcripts == expected(pool, plain_tasks)
        assert 2 in {session for session, _ in errors}
        assert {pool.server_of(session) for session, _ in errors} == {0}
        assert pool.stats().restarts == (1, 0) and pool.server_pids[1] == untouched


def test_an_exception_costs_one_episode_and_no_server(tmp_path):
    fault = {"kind": "raise", "step": 3, "once": str(tmp_path / "happened")}

    def tasks_of(session):
        return [
            {**task, **({"fault": fault} if (session, i) == (2, 5) else {})}
            for i, task in enumerate(plain_tasks(session))
        ]

    with EnvPool(CONFIG, MAKE) as pool:
        transcripts, errors = play_all(pool, tasks_of)
        assert transcripts == expected(pool, plain_tasks)
        assert [session for session, _ in errors] == [2] and "scripted fault" in errors[0][1]
        assert pool.stats().restarts == (0, 0)


def test_all_servers_again_and_again():
    with EnvPool(CONFIG, MAKE) as pool:
        stop = threading.Event()

        def disturb():
            for turn in range(6):
                if stop.wait(0.4):
                    return
                for pid in pool.server_pids:
                    try:
                        os.kill(pid, signal.SIGSTOP if turn % 3 == 0 else signal.SIGKILL)
                    except ProcessLookupError:
                        continue  # it is being restarted at the moment

        transcripts, errors = play_all(pool, plain_tasks, disturb)
        assert transcripts == expected(pool, plain_tasks)
        assert errors and min(pool.stats().restarts) >= 2
        # after the last kill has been detected, everything works
        play_all(pool, plain_tasks)
        _, errors = play_all(pool, plain_tasks)
        assert not errors


def test_a_server_killed_between_episodes_is_up_again_for_the_next():
    with EnvPool(CONFIG, MAKE) as pool:
        os.kill(pool.server_pids[0], signal.SIGKILL)
        deadline = time.monotonic() + 20
        while pool.stats().restarts != (1, 0):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        transcripts, errors = play_all(pool, plain_tasks)
        assert transcripts == expected(pool, plain_tasks) and not errors
