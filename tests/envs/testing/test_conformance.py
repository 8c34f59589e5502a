"""The conformance suite accepts conforming environments and detects each kind of violation."""

import dataclasses

import pytest
from envs.servers import served

from aem_jax.envs.alfworld.generator.config import GeneratorConfig
from aem_jax.envs.alfworld.tasks import generated_tasks
from aem_jax.envs.protocol import StepResult
from aem_jax.envs.registry import environment_spec
from aem_jax.envs.serving.address import websocket_url
from aem_jax.envs.testing.conformance import Subject, check_environment
from aem_jax.envs.testing.conformance_wire import CHECKS, ServerSubject, check_server, main
from aem_jax.envs.testing.echo import EchoConfig, EchoEnv

TASKS = ({"word": "hi", "length": 4}, {"word": "ho", "length": 3})
ACTIONS = ("try", "ho", "hi")


def subject(make):
    return Subject(make, TASKS, ACTIONS)


def test_the_echo_environment_conforms():
    assert check_environment(subject(EchoEnv)) == []


def test_a_limit_that_ends_episodes_conforms():
    assert check_environment(Subject(EchoEnv, TASKS, ("never",))) == []


@pytest.mark.parametrize("name", ["echo", "echo-slow"])
def test_our_server_conforms(name, capsys):
    with served(name, "--sessions", "3") as (url, _):
        assert check_server(ServerSubject(websocket_url(url), TASKS, ACTIONS, sessions=3)) == []
        assert main([url, "--task", '{"word": "hi"}', "--action", "hi", "--sessions", "3"]) == 0
        assert capsys.readouterr().out == "0 problems\n"
        # the suite detects a server with fewer sessions than claimed
        assert main([url, "--task", '{"word": "hi"}', "--action", "hi", "--sessions", "4"]) == 1
        assert "capacity_is_enforced_and_freed: expected room for session 3" in capsys.readouterr().out
    assert main([url, "--task", "{}", "--action", "hi"]) == 2


ALFWORLD_TASKS = [task.payload for task in generated_tasks(GeneratorConfig(), "train", 0, range(3))]
ALFWORLD_ACTIONS = [f"<action>{command}</action>" for command in ("look", "go to drawer 1", "inventory", "help", "fly")]


def test_alfworld_conforms():
    make = environment_spec("alfworld").factory({"max_steps": 12})
    assert check_environment(Subject(make, ALFWORLD_TASKS, ALFWORLD_ACTIONS)) == []


def test_recorded_alfworld_games_conform(golden):
    tasks = [{"game": str(path)} for path in sorted((golden / "alfworld").glob("*.tw-pddl"))[:3]]
    make = environment_spec("alfworld").factory({})
    assert check_environment(Subject(make, tasks, ALFWORLD_ACTIONS)) == []


def test_an_alfworld_server_conforms():
    with served("alfworld", "--sessions", "2", settings={"max_steps": 12}) as (url, _):
        subject = ServerSubject(websocket_url(url), ALFWORLD_TASKS, ALFWORLD_ACTIONS, sessions=2)
        assert check_server(subject) == []


SCRIPTED_TASKS = [{"seed": seed} for seed in range(3)]


def test_the_scripted_environment_conforms():
    make = environment_spec("scripted").factory({"max_turns": 5})
    assert check_environment(Subject(make, SCRIPTED_TASKS, ("one", "other"))) == []
    with served("scripted", "--sessions", "2", settings={"max_turns": 5}) as (url, _):
        subject = ServerSubject(websocket_url(url), SCRIPTED_TASKS, ("one", "other"), sessions=2)
        assert check_server(subject) == []


def test_an_address_with_a_query_is_examined():
    with served("echo") as (url, _):
        assert check_server(ServerSubject(websocket_url(f"{url}/?key=a/ws"), TASKS, ACTIONS)) == []


def test_a_server_with_one_session_is_examined_alone():
    with served("echo", "--sessions", "1") as (url, _):
        assert check_server(ServerSubject(websocket_url(url), TASKS, ACTIONS, sessions=1)) == []


class Nondeterministic(EchoEnv):
    """Each environment continues to count across its episodes."""

    def reset(self, task):
        self.resets = getattr(self, "resets", 0) + 1
        return dataclasses.replace(super().reset(task), observation=f"episode {self.resets}")


class Shared(EchoEnv):
    """All environments count together."""

    steps = 0

    def reset(self, task):
        Shared.steps = 0
        return super().reset(task)

    def step(self, action_text):
        Shared.steps += 1
        return dataclasses.replace(super().step(action_text), observation=f"step {Shared.steps}")


class Forgetful(EchoEnv):
    """Reset keeps the state of an unfinished episode."""

    left = 0

    def reset(self, task):
        result, self.left = super().reset(task), self.left + self._steps
        return result

    def step(self, action_text):
        result = super().step(action_text)
        self.carried = getattr(self, "carried", 0) + (0 if result.done else 1)
        if result.done:
            self.carried = 0
        return dataclasses.replace(result, observation=f"{self.carried}")


class Choosy(EchoEnv):
    """Raises on text that is not a word."""

    def step(self, action_text):
        if not action_text.strip():
            raise ValueError("say something")
        return super().step(action_text)


class ClosesOnce(EchoEnv):
    """Closing twice is an error."""

    open = True

    def close(self):
        assert self.open
        self.open = False


class BrokenByBadTask(EchoEnv):
    """A bad task breaks it permanently."""

    spoiled = False

    def reset(self, task):
        self.spoiled |= "word" not in task
        if self.spoiled:
            raise ValueError("spoiled")
        return super().reset(task)


def altered(**changes):
    class Altered(EchoEnv):
        def step(self, action_text):
            return dataclasses.replace(super().step(action_text), **changes)

    return Altered


def altered_reset(**changes):
    class Altered(EchoEnv):
        def reset(self, task):
            return dataclasses.replace(super().reset(task), **changes)

    return Altered


class NoStepResult(EchoEnv):
    def step(self, action_text):
        return super().step(action_text).observation


@pytest.mark.parametrize(
    ("make", "check", "why"),
    [
        (Nondeterministic, "same_task_and_actions", "a second episode of the same task differs: at step 0"),
        (Shared, "environments_are_independent", "differs: at step"),
        (Forgetful, "reset_discards", "after an unfinished one differs"),
        (Choosy, "any_text_gets_a_result", "expected an answer to '', got ValueError: say something"),
        (ClosesOnce, "close_twice", "AssertionError"),
        (BrokenByBadTask, "invalid_tasks", "spoiled"),
        (altered(reward=float("nan")), "same_task", "as reward from altered.<locals>.Altered.step, got float nan"),
        (altered(observation=7), "same_task", "got int 7 as observation"),
        (altered(terminated=None), "same_task", "expected true or false as terminated"),
        (altered(terminated=True, truncated=True), "same_task", "got both"),
        (altered(info={"won": True}), "same_task", "expected valid_action in the info of a step, got ['won']"),
        (
            altered(info={"won": True, "valid_action": True, "x": object()}),
            "same_task",
            "expected values that JSON can hold, got object",
        ),
        (altered(info={"won": False, "valid_action": True, "score": 7}), "same_task", "a score from 0 to 1 in"),
        (altered(info={"won": False, "valid_action": True, "score": -0.1}), "same_task", "of a step, got -0.1"),
        (NoStepResult, "same_task", "expected a StepResult with a text observation"),
        (altered_reset(observation=" "), "reset_starts", "expected an observation after the reset"),
        (altered_reset(terminated=True), "reset_starts", "expected an open episode"),
        (altered_reset(reward=1.0), "reset_starts", "expected no reward"),
    ],
)
def test_every_violation_is_detected(make, check, why):
    problems = check_environment(subject(make))
    assert any(problem.startswith(check) and why in problem for problem in problems), problems


def test_every_wire_check_can_fail():
    """Against a server that answers everything with the same observation."""
    import threading

    from websockets.sync.server import serve

    def handler(connection):
        for _ in connection:
            connection.send('{"type": "observation", "data": {"observation": {}, "done": 1, "reward": "much"}}')

    with serve(handler, "127.0.0.1", 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = websocket_url(f"127.0.0.1:{server.socket.getsockname()[1]}")
        problems = check_server(ServerSubject(url, TASKS, ACTIONS, sessions=1))
        server.shutdown()
    assert {check.__name__ for check in CHECKS} <= {problem.partition(":")[0] for problem in problems}


def test_a_subject_without_tasks_or_actions_is_refused():
    with pytest.raises(ValueError, match="expected a task and an action"):
        Subject(EchoEnv, [], ["x"])
    with pytest.raises(ValueError, match="expected a task and an action"):
        Subject(EchoEnv, [{}], [])


def test_results_compare_by_value():
    assert StepResult("a", info={"won": True}) == StepResult("a", info={"won": True})
    assert EchoEnv(EchoConfig()).reset({"word": "a"}) == EchoEnv(EchoConfig()).reset({"word": "a"})
