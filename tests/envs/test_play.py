"""Episodes in this process: a broken one does not affect the others; if all break, an error reports it."""

import pytest

from aem_jax.envs.play import play, play_each
from aem_jax.envs.protocol import EnvError, Task
from aem_jax.envs.testing.echo import EchoEnv

TASKS = [Task(f"t{n}", "k", {"n": n}) for n in range(4)]


def broken_at(*numbers, error=KeyError):
    def play_one(task):
        if task.payload["n"] in numbers:
            raise error(f"no\nlevel {task.id}")
        return task.payload["n"]

    return play_one


@pytest.mark.parametrize("error", [KeyError, SystemExit, RecursionError, EnvError])
def test_a_task_that_breaks_is_left_out_with_one_line(caplog, error):
    assert [outcome for _, outcome in play_each(TASKS, broken_at(0, 2, error=error))] == [None, 1, None, 3]
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2 and lines[1].startswith("task t2 is left out: ") and "no" in lines[1]
    assert "\n" not in "".join(lines)


def test_if_all_tasks_break_the_first_error_is_raised():
    with pytest.raises(EnvError, match=r"every task broke its environment, t0 first: KeyError: 'no\\nlevel t0'"):
        list(play_each(TASKS, broken_at(0, 1, 2, 3)))
    assert list(play_each([], broken_at())) == []


def test_an_episode_over_at_its_reset_is_an_error():
    with pytest.raises(EnvError, match=r"ended at its reset \(truncated, not won\)"):
        play(EchoEnv(), {"length": 0}, lambda result: "x", 3)
