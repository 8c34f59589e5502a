"""Conformance checks for any environment, in this process or behind a server.

The checks cover the assumptions of training: results have the right types, the same task and actions give the same
episode, environments are independent, and every policy output gets a reply. Problems are returned as sentences.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from aem_jax.envs.protocol import Environment, StepResult, describe
from aem_jax.envs.serving.plain import checked_result

RUBBISH = (
    "",
    " ",
    "\n\n",
    "\x00\x07\x1b[31m",
    "<action>",
    "</action><action>",
    '{"type":"reset"}',
    "ü€𝄞\ud800",
    "go " * 20000,
)
"""Unusual texts that a policy may produce; an environment must reply to each."""


class Problem(Exception):
    """A failed check; the message describes the problem."""


def expect(condition: bool, message: str) -> None:
    """Raises a `Problem` unless the condition holds."""
    if not condition:
        raise Problem(message)


@dataclass(frozen=True)
class Subject:
    """An environment under test.

    Attributes:
        make: creates an instance.
        tasks: some of its tasks, at least one.
        actions: responses to give in turn, repeated until the episode ends.
        max_steps: number of steps after which an unfinished episode is abandoned.
        alone: whether only one instance can exist at a time, as on a server with one session.
    """

    make: Callable[[], Environment]
    tasks: Sequence[Mapping[str, Any]]
    actions: Sequence[str]
    max_steps: int = 100
    alone: bool = False

    def __post_init__(self) -> None:
        if not self.tasks or not self.actions:
            raise ValueError(f"expected a task and an action at least, got {len(self.tasks)} and {len(self.actions)}")


def _answer(env: Environment, call: str, argument: Any) -> StepResult:
    """Calls the environment; returns the result as training reads it, after checking its types."""
    result = getattr(env, call)(argument)
    try:
        result = checked_result(env, call, result)
    except ValueError as error:
        raise Problem(str(error)) from None
    for name in ("won", "valid_action"):
        expect(name in result.info, f"expected {name} in the info of a {call}, got {sorted(result.info)}")
    score = result.info.get("score", 0.0)
    expect(0 <= score <= 1, f"expected a score from 0 to 1 in the info of a {call}, got {score}")
    expect(not (result.terminated and result.truncated), "expected terminated or truncated, got both")
    return result


def _play(env: Environment, subject: Subject, task: Mapping[str, Any]) -> list[StepResult]:
    results = [_answer(env, "reset", task)]
    while not results[-1].done and len(results) <= subject.max_steps:
        results.append(_answer(env, "step", subject.actions[(len(results) - 1) % len(subject.actions)]))
    return results


@contextmanager
def _made(subject: Subject) -> Iterator[Environment]:
    env = subject.make()
    try:
        yield env
    finally:
        env.close()


def reset_starts_an_episode(subject: Subject) -> None:
    """The result of a reset is not done, has reward 0, and contains an observation."""
    with _made(subject) as env:
        for task in subject.tasks:
            first = _answer(env, "reset", task)
            expect(not first.done, f"expected an open episode after the reset, got {first}")
            expect(first.reward == 0, f"expected no reward for a reset, got {first.reward}")
            expect(bool(first.observation.strip()), "expected an observation after the reset, got none")


def same_task_and_actions_give_the_same_episode(subject: Subject) -> None:
    """Checked in a new environment and in a used one."""
    episodes = []
    with _made(subject) as used:
        for task in subject.tasks:
            first, again = _play(used, subject, task), _play(used, subject, task)
            expect(first == again, f"a second episode of the same task differs: {_difference(first, again)}")
            episodes.append(first)
    with _made(subject) as fresh:
        for task, first in zip(subject.tasks, episodes):
            elsewhere = _play(fresh, subject, task)
            expect(first == elsewhere, f"another environment differs: {_difference(first, elsewhere)}")


def reset_discards_the_episode(subject: Subject) -> None:
    """Checked with two resets in a row, and with a reset during an episode."""
    task = subject.tasks[0]
    with _made(subject) as env:
        first = _play(env, subject, task)
        env.reset(subject.tasks[-1])
        env.step(subject.actions[0])
        env.reset(subject.tasks[-1])
        again = _play(env, subject, task)
        expect(first == again, f"an episode after an unfinished one differs: {_difference(first, again)}")


def environments_are_independent(subject: Subject) -> None:
    """Two interleaved episodes give the same results as separate ones."""
    if subject.alone:
        return
    task, other = subject.tasks[0], subject.tasks[-1]
    with _made(subject) as env, _made(subject) as neighbour:
        alone = _play(env, subject, task)
        together = [_answer(env, "reset", task)]
        neighbour_done = neighbour.reset(other).done
        for index in range(len(alone) - 1):
            together.append(_answer(env, "step", subject.actions[index % len(subject.actions)]))
            if not neighbour_done:
                neighbour_done = neighbour.step(subject.actions[-1 - index % len(subject.actions)]).done
        expect(alone == together, f"an episode beside another differs: {_difference(alone, together)}")


def any_text_gets_a_result(subject: Subject) -> None:
    """Any text from a policy gets a result. It may be an invalid action, but it is not an error."""
    with _made(subject) as env:
        for text in RUBBISH:
            env.reset(subject.tasks[0])
            try:
                _answer(env, "step", text)
            except Exception as error:
                raise Problem(f"expected an answer to {text!r:.40}, got {describe(error)}") from None


def invalid_tasks_do_no_harm(subject: Subject) -> None:
    """An invalid task may be refused; a valid one works afterwards."""
    with _made(subject) as env:
        for task in ({"no such key": 1}, {"game": 7, "generate": "x"}, {}):
            try:
                env.reset(task)
            except Exception:
                continue
        _play(env, subject, subject.tasks[0])


def close_twice_is_harmless(subject: Subject) -> None:
    """Checked with and without an episode."""
    env = subject.make()
    env.close()
    env.close()
    env = subject.make()
    env.reset(subject.tasks[0])
    env.close()
    env.close()


CHECKS: tuple[Callable[[Subject], None], ...] = (
    reset_starts_an_episode,
    same_task_and_actions_give_the_same_episode,
    reset_discards_the_episode,
    environments_are_independent,
    any_text_gets_a_result,
    invalid_tasks_do_no_harm,
    close_twice_is_harmless,
)


def check_environment(subject: Subject) -> list[str]:
    """Runs all `CHECKS` on an environment; returns the problems."""
    return run_checks(CHECKS, subject)


def run_checks(checks: Iterable[Callable[[Any], None]], subject: Any) -> list[str]:
    """Runs each check on the subject; returns a sentence for each check that found a problem or raised an error."""
    problems = []
    for check in checks:
        try:
            check(subject)
        except Problem as problem:
            problems.append(f"{check.__name__}: {problem}")
        except Exception as error:
            problems.append(f"{check.__name__}: failed with {describe(error)}")
    return problems


def _difference(left: list[StepResult], right: list[StepResult]) -> str:
    for index, (one, other) in enumerate(zip(left, right)):
        if one != other:
            return f"at step {index}: {one!r:.300} and {other!r:.300}"
    return f"{len(left) - 1} and {len(right) - 1} steps"
