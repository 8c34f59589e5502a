"""The stock ALFWorld engine behind a pipe. Runs in an interpreter with alfworld and textworld, without aem_jax.

Reads JSON lines `{"load": path}` or `{"step": command}`; answers `{observation, admissible, won, done, score}` to each.
"""

import json
import os
import sys
import tempfile

answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # the planner prints to stdout
os.environ.setdefault("ALFWORLD_DATA", tempfile.mkdtemp(prefix="alfworld-"))  # else importing writes to the home folder

import textworld  # noqa: E402
from alfworld.agents.environment.alfred_tw_env import AlfredDemangler, AlfredInfos  # noqa: E402
from textworld.envs import PddlEnv  # noqa: E402

env = AlfredInfos(AlfredDemangler(PddlEnv(textworld.EnvInfos(won=True, admissible_commands=True))))
for line in sys.stdin:
    request = json.loads(line)
    if "load" in request:
        env.load(request["load"])
        state, score, done = env.reset(), 0, False
    else:
        state, score, done = env.step(request["step"])
    answer = {
        "observation": state.feedback,
        "admissible": sorted(state["admissible_commands"]),
        "won": bool(state["won"]),
        "done": bool(done),
        "score": score,
    }
    answers.write(json.dumps(answer) + "\n")
    answers.flush()
