"""An environment written for OpenEnv's own server, with words of its own; run by test_openenv as a process.

`python openenv_server.py PORT SESSIONS`
"""

import sys

import uvicorn
from openenv.core.env_server.http_server import create_app
from openenv.core.env_server.interfaces import Environment
from openenv.core.env_server.types import Action, Observation, State


class CommandAction(Action):
    command: str


class CommandObservation(Observation):
    output: str
    out_of_steps: bool = False


class CommandEnvironment(Environment):
    """Solved by the command "done"; cut after five steps."""

    SUPPORTS_CONCURRENT_SESSIONS = True

    def __init__(self):
        super().__init__()
        self._state = State()
        self._prefix = ""

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

    @property
    def state(self):
        return self._state


if __name__ == "__main__":
    app = create_app(
        CommandEnvironment, CommandAction, CommandObservation, env_name="command", max_concurrent_envs=int(sys.argv[2])
    )
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="warning")
