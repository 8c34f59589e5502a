"""Tasks in order: complete passes, the same again from seed and place."""

import itertools
import json
from collections import Counter

import pytest

from aem_jax.data import task_groups
from aem_jax.trajectory import Task

TASKS = [Task(f"task-{n}", "look", {"index": n}) for n in range(7)]


def names(groups, steps):
    return [[task.id for task in step] for step in itertools.islice(groups, steps)]


def test_each_pass_has_every_task_once_in_another_order():
    flat = list(itertools.chain(*names(task_groups(TASKS, 3, seed=1), 7)))
    passes = [tuple(flat[n : n + 7]) for n in range(0, 21, 7)]
    assert all(Counter(each) == Counter(task.id for task in TASKS) for each in passes)
    assert len(set(passes)) == 3


def test_the_order_is_the_seeds():
    first, again, other = (names(task_groups(TASKS, 3, seed=seed), 5) for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize("done", [0, 1, 2, 5, 23])
def test_a_resumed_iterator_goes_on_exactly(done):
    unbroken = task_groups(TASKS, 3, seed=4)
    names(unbroken, done)
    state = json.loads(json.dumps(unbroken.get_state()))
    resumed = task_groups(TASKS, 3, seed=4)
    resumed.set_state(state)
    wanted = names(unbroken, 9)
    assert names(resumed, 9) == wanted
    assert names(task_groups(TASKS, 3, seed=4, start=done), 9) == wanted


def test_more_groups_than_tasks():
    (step,) = names(task_groups(TASKS[:2], 5, seed=0), 1)
    assert sorted(Counter(step).values()) == [2, 3]


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="expected at least one task, got none"):
        task_groups([], 3, seed=0)
    with pytest.raises(ValueError, match="expected num_groups ≥ 1, got 0"):
        task_groups(TASKS, 0, seed=0)
    with pytest.raises(ValueError, match="expected start ≥ 0, got -1"):
        task_groups(TASKS, 1, seed=0, start=-1)
