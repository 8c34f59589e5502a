"""Success rates with their intervals, and agents that play complete episodes."""

import math
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest

from aem_jax.envs.protocol import EnvError, StepResult, Task
from aem_jax.envs.testing.echo import EchoEnv
from aem_jax.evaluate import evaluate_agent, evaluate_policy, rate
from aem_jax.metrics import read_evaluation
from aem_jax.rollout import RolloutStats
from aem_jax.trajectory import Ending, Trajectory, Turn


def test_wilson_interval_by_hand():
    """k = 8 of n = 10, z = 1.96: centre (0.8 + 0.19208) / 1.38416 = 0.71674, half 0.22659 → 0.4902 to 0.9433."""
    interval = rate([True] * 8 + [False] * 2)
    assert (interval.success, interval.count) == (0.8, 10)
    assert (interval.low, interval.high) == (pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, abs=1e-4))


def test_intervals_stay_within_zero_and_one():
    assert rate([True] * 20).high == pytest.approx(1.0) and rate([True] * 20).low > 0.8
    assert rate([False] * 20).low == pytest.approx(0.0, abs=1e-12)
    assert math.isnan(rate([]).success) and (rate([]).low, rate([]).high) == (0.0, 1.0)


def test_an_agent_is_counted_by_task_type():
    """The agent sends the word in its second turn; tasks with one step end before that."""
    tasks = [
        Task(f"t{i}", kind, {"word": "yes", "length": length})
        for i, (kind, length) in enumerate([("short", 1), ("long", 4), ("long", 4)])
    ]

    def make_act(task):
        actions = iter(["no", "yes"])
        return lambda result: next(actions)

    evaluation = evaluate_agent(EchoEnv(), make_act, tasks, max_turns=9, name="set", split="valid_seen")
    assert (evaluation.by_task_type["short"].success, evaluation.by_task_type["long"].success) == (0.0, 1.0)
    assert (
        evaluation.rate.count == 3
        and evaluation.mean_turns == pytest.approx(5 / 3)
        and evaluation.mean_return == pytest.approx(2 / 3)
    )
    assert evaluation.mean_score == evaluation.rate.success  # the environment has no finer score
    record = evaluation.record(7, "expert")
    assert (record["step"], record["phase"], record["by_task_type"]["long"]["count"]) == (7, "expert", 2)


def test_the_tasks_own_score_is_that_of_the_last_step():
    """Two episodes with final scores 0.5 and nan. For nan, the score is 1 if won, else 0; here 0."""

    class Graded:
        def reset(self, task):
            self.score = task["score"]
            return StepResult("begin", info={"score": 0.9})

        def step(self, action_text):
            return StepResult("end", terminated=True, info={"won": False, "score": self.score})

        def close(self):
            pass

    tasks = [Task(f"t{score}", "k", {"score": score}) for score in (0.5, float("nan"))]
    evaluation = evaluate_agent(Graded(), lambda task: lambda result: "x", tasks, max_turns=3, name="set", split="test")
    assert (evaluation.mean_score, evaluation.rate.success) == (0.25, 0.0)
    assert evaluation.record(0, "expert")["mean_score"] == 0.25


@pytest.mark.parametrize("error", [KeyError, SystemExit])
def test_a_broken_task_is_left_out_and_an_error_is_raised_where_all_are_broken(error):
    class Fragile(EchoEnv):
        def reset(self, task):
            if task["level"] > 1:
                raise error("no such level")
            return super().reset(task)

    tasks = [Task(f"t{level}", "k", {"word": "hi", "level": level}) for level in (0, 1, 2)]
    settings = {"max_turns": 3, "name": "set", "split": "test"}
    evaluation = evaluate_agent(Fragile(), lambda task: lambda result: "hi", tasks, **settings)
    assert (evaluation.rate.count, evaluation.rate.success, evaluation.env_errors) == (2, 1.0, 1)
    with pytest.raises(EnvError, match="every task broke its environment, t2 first: .*no such level"):
        evaluate_agent(Fragile(), lambda task: lambda result: "hi", tasks[2:], **settings)


def test_a_task_whose_first_prompt_is_too_long_is_left_out_and_counted():
    ids, numbers = np.zeros(1, np.int32), np.zeros(1, np.float32)
    turn = Turn(ids, ids, numbers, numbers, reward=1.0, valid_action=True)
    task = Task("t", "k", {})
    endings = ((turn,), Ending.TERMINATED, True), ((), Ending.TRUNCATED, False), ((), Ending.ENV_ERROR, False)
    endings += (((), Ending.TERMINATED, False),)  # an agent that ended without a request has failed
    trajectories = [Trajectory(task, group, 0, *ending) for group, ending in enumerate(endings)]
    rollout: Any = lambda *_, **__: (trajectories, RolloutStats())
    evaluation, _ = evaluate_policy(rollout, {}, [task] * 4, jax.random.key(0), name="set", split="test")
    assert (evaluation.rate.count, evaluation.rate.success) == (2, 0.5)
    assert (evaluation.env_errors, evaluation.overlong_prompts) == (1, 1)
    assert read_evaluation(evaluation.record(0, "final")) == replace(evaluation, phase="final")


def test_an_evaluation_without_playable_episodes_raises_the_first_error():
    def rollout(endings):
        trajectories = [Trajectory(Task("t", "k", {}), i, 0, (), ending, False) for i, ending in enumerate(endings)]
        return lambda *_, **__: (trajectories, RolloutStats(first_error="task t: no display"))

    settings = {"params": None, "tasks": [], "key": jax.random.key(0), "name": "valid-2-ab", "split": "valid"}
    for endings in ([Ending.ENV_ERROR] * 2, [Ending.ENV_ERROR, Ending.TRUNCATED]):  # the second: no prompt fits
        with pytest.raises(EnvError, match="no episode of valid-2-ab could be played; the first error: task t: no dis"):
            evaluate_policy(rollout(endings), **settings)  # type: ignore[arg-type]
