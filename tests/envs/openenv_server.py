"""Environments behind OpenEnv's own server, run by test_openenv as processes.

`python openenv_server.py NAME PORT SESSIONS`: `command` is defined here; `textarena` and `reasoning_gym` are thin
wrappers of the packages of these names, with the fields of the corresponding OpenEnv environments.
"""

import sys
from typing import Any

import uvicorn
from openenv.core.env_server.http_server import create_app
from openenv.core.env_server.interfaces import Environment
from openenv.core.env_server.types import Action, Observation, State


class CommandAction(Action):
    command: str


class CommandObservation(Observation):
    output: str
    out_of_steps: bool = False


class MessageAction(Action):
    message: str


class MessagesObservation(Observation):
    messages: list[dict[str, Any]]


class AnswerAction(Action):
    answer: str


class QuestionObservation(Observation):
    question: str | None = None
    score: float | None = None


class Counted(Environment):
    """Counts the steps: the only content of these environments' state."""

    SUPPORTS_CONCURRENT_SESSIONS = True

    def __init__(self):
        super().__init__()
        self._state = State()

    @property
    def state(self):
        return self._state


class CommandEnvironment(Counted):
    """Solved by the command "done"; truncated after five steps."""

    _prefix = ""

    def reset(self, seed=None, episode_id=None, prefix=""):
        self._state, self._prefix = State(episode_id=episode_id, step_count=0), prefix
        return CommandObservation(output=f"{prefix}ready", done=False, reward=None)

    def step(self, action, timeout_s=None):
        self._state.step_count += 1
        solved, cut = action.command == "done", self._state.step_count >= 5
        return CommandObservation(
            output=f"{self._prefix}{action.command}",
            done=solved or cut,
            reward=float(solved),
            out_of_steps=cut and not solved,
        )


class TextarenaEnvironment(Counted):
    """TextArena's GuessTheNumber; the seed determines the number."""

    def reset(self, seed=None, episode_id=None):
        import textarena

        self._state, self._game = State(episode_id=episode_id, step_count=0), textarena.make("GuessTheNumber-v0-raw")
        self._game.reset(num_players=1, seed=seed)
        return MessagesObservation(messages=self._heard(), done=False, reward=None)

    def step(self, action, timeout_s=None):
        self._state.step_count += 1
        done, _ = self._game.step(action.message)
        rewards = getattr(self._game.state, "rewards", None) or {}
        return MessagesObservation(messages=self._heard(), done=done, reward=float(rewards.get(0, 0.0)))

    def _heard(self):
        _, messages = self._game.get_observation()
        return [{"sender_id": sender, "content": str(text)} for sender, text, *_ in messages]


class ReasoningGymEnvironment(Counted):
    """One question of a reasoning_gym data set, and one answer."""

    def reset(self, dataset_name="leg_counting", seed=None, size=1, episode_id=None):
        import reasoning_gym

        self._state = State(episode_id=episode_id, step_count=0)
        self._questions = reasoning_gym.create_dataset(dataset_name, seed=seed, size=size)
        return QuestionObservation(question=self._questions[0]["question"], done=False, reward=None)

    def step(self, action, timeout_s=None):
        self._state.step_count += 1
        score = float(self._questions.score_answer(action.answer, self._questions[0]))
        return QuestionObservation(score=score, done=True, reward=score)


ENVIRONMENTS = {
    "command": (CommandEnvironment, CommandAction, CommandObservation),
    "textarena": (TextarenaEnvironment, MessageAction, MessagesObservation),
    "reasoning_gym": (ReasoningGymEnvironment, AnswerAction, QuestionObservation),
}

if __name__ == "__main__":
    name, port, sessions = sys.argv[1:]
    app = create_app(*ENVIRONMENTS[name], env_name=name, max_concurrent_envs=int(sessions))
    uvicorn.run(app, host="127.0.0.1", port=int(port), log_level="warning")
