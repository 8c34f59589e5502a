"""Runs a task's verifier in the environment that the agent left or in its own; reads its reward, as Harbor does.

No process of the agent is alive any more. Reward files that exist are removed, /tests is replaced by the task's tests,
and /tests/test.sh runs in the work folder. Its exit status does not count; the reward is what it writes to
/logs/verifier/reward.json, or else to reward.txt.

A verifier without a valid reward gives 0: the agent's code can be the cause, and must not gain by it.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from aem_jax.envs.harbor.config import HarborConfig
from aem_jax.envs.harbor.sandbox import LOGS, TESTS, Sandboxes, TaskSandbox
from aem_jax.envs.harbor.task import PRE_ARTIFACTS, HarborTask
from aem_jax.envs.swe.sandbox.execution import FILE_S
from aem_jax.envs.swe.sandbox.workspace import EngineError, SandboxError, WorkspaceError
from aem_jax.files import parse_json

REWARD_BYTES = 2**16
"""Largest reward file."""
PRE_ARTIFACTS_S = 300.0
"""Time limit of pre_artifacts.sh, seconds."""
_FOLDER = f"{LOGS}/verifier"
_NAMES = ("reward.json", "reward.txt")
_OUTPUT = f"{_FOLDER}/test-stdout.txt"
_CLEAR = f"""
for folder in {LOGS} {_FOLDER}; do [ -L $folder ] || [ ! -d $folder ] && rm -rf -- $folder; done
mkdir -p -- {_FOLDER} && chmod 777 {_FOLDER} && rm -rf -- {_FOLDER}/reward.json {_FOLDER}/reward.txt {_OUTPUT}
"""
_READ = f"""
for name in {" ".join(_NAMES)}; do
  if [ -e {_FOLDER}/$name ]; then echo $name; exec head -c {REWARD_BYTES + 1} -- {_FOLDER}/$name; fi
done
"""


@dataclass(frozen=True)
class Verdict:
    """The result of a verifier.

    Attributes:
        reward: the reward that it gave; 0 without a valid one.
        failure: the reason why there is no valid reward; empty if there is one.
        log: the end of its output.
    """

    reward: float
    failure: str = ""
    log: str = ""

    @property
    def won(self) -> bool:
        """Whether the task is solved."""
        return self.reward >= 1.0

    @property
    def score(self) -> float:
        """The reward, within 0 and 1."""
        return min(max(self.reward, 0.0), 1.0)


def grade(sandbox: TaskSandbox, task: HarborTask, sandboxes: Sandboxes, config: HarborConfig) -> Verdict:
    """Verifies what the agent left in its sandbox, and closes the sandbox.

    A verifier with its own environment gets a fresh sandbox, and only the artifacts of the agent's.

    Raises:
        SandboxError: the engine failed, or the verifier's sandbox could not be opened.
    """
    try:
        if task.verifier is None:
            return _verify(sandbox, task, config)
        for command, seconds, stdin in _hooks(task):  # what they fail to make is missing in the artifacts
            sandbox.agent.run(command, limits=replace(config.limits(task), seconds=seconds), stdin=stdin)
        try:
            artifacts = sandbox.take(task.artifacts, config.limits(task))
        except WorkspaceError as error:
            return Verdict(0.0, f"the artifacts could not be taken: {error}")
    finally:
        sandbox.close()
    own = sandboxes.open(task.verifier)
    try:
        own.receive(task.artifacts, artifacts)
        return _verify(own, task.verifier, config)
    finally:
        own.close()


def _hooks(task: HarborTask) -> Iterator[tuple[str, float, bytes]]:
    """Yields the command, time limit and standard input of what runs before artifacts are taken."""
    for hook in task.hooks:
        yield hook.command, hook.seconds, b""
    if (task.folder / PRE_ARTIFACTS).is_file():
        yield "bash", PRE_ARTIFACTS_S, (task.folder / PRE_ARTIFACTS).read_bytes()


def _verify(sandbox: TaskSandbox, task: HarborTask, config: HarborConfig) -> Verdict:
    """Runs the verifier in a sandbox, which must not be used for the agent afterwards."""
    limits, seconds = config.limits(task), config.seconds(task)[1]
    short = replace(limits, seconds=FILE_S, output_bytes=4 * REWARD_BYTES)
    cleared = sandbox.root.run(_CLEAR, limits=short)
    if cleared.exit_code != 0:
        return Verdict(0.0, f"the verifier could not be prepared: {cleared.notice or cleared.output.strip():.300}")
    try:
        if not (task.has_tests and sandbox.from_image):
            sandbox.put(task.folder / "tests", TESTS, ("Dockerfile", ".dockerignore") if task.has_tests else ())
    except EngineError:
        raise
    except SandboxError as error:
        return Verdict(0.0, f"the verifier could not be prepared: {error}")
    sandbox.begin_verification()
    ran = sandbox.verifier.run(f"({TESTS}/test.sh) > {_OUTPUT} 2>&1", limits=replace(limits, seconds=seconds))
    log = sandbox.root.run(f"tail -c 4000 -- {_OUTPUT}", limits=short).output
    if ran.exit_code is None:
        return Verdict(0.0, f"{TESTS}/test.sh: {ran.notice}", log)
    text = sandbox.root.run(_READ, limits=short)
    name, _, content = text.output.partition("\n")
    if text.exit_code is None or name not in _NAMES:
        expected = f"{_FOLDER}/reward.txt or reward.json after {TESTS}/test.sh (exit code {ran.exit_code})"
        return Verdict(0.0, f"expected {expected}, got none", log)
    try:
        return Verdict(parse_reward(name, content, config.reward_key), log=log)
    except ValueError as error:
        return Verdict(0.0, str(error), log)


def parse_reward(name: str, text: str, reward_key: str = "") -> float:
    """Returns the reward in a reward file.

    Args:
        name: `reward.txt` or `reward.json`.
        text: its content.
        reward_key: key of reward.json that is the reward; empty: `reward`, or the only key.

    Raises:
        ValueError: there is no finite number in it, or several without a key that chooses one.
    """
    path = f"{_FOLDER}/{name}"
    if len(text) > REWARD_BYTES:
        raise ValueError(f"{path}: expected at most {REWARD_BYTES} bytes, got more")
    if name == "reward.json":
        return _number(path, *_chosen(path, _rewards(path, text), reward_key))
    try:
        value: Any = float(text)
    except ValueError:
        value = text.strip()
    return _number(path, "", value)


def _rewards(path: str, text: str) -> Mapping[str, Any]:
    try:
        rewards = parse_json(text, path)
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON, got {text.strip()!r:.100} ({error})") from None
    if not isinstance(rewards, dict) or not rewards:
        raise ValueError(f"{path}: expected a mapping of names to numbers, got {json.dumps(rewards):.100}")
    return rewards


def _chosen(path: str, rewards: Mapping[str, Any], reward_key: str) -> tuple[str, Any]:
    """Returns the key and the value of the entry that is the reward."""
    key = reward_key or ("reward" if len(rewards) > 1 else next(iter(rewards)))
    if key not in rewards:
        names = ", ".join(rewards)
        raise ValueError(
            f"{path}: expected the key {key!r}, got {names:.200}; --harbor.reward-key names the key that is the reward"
        )
    return key, rewards[key]


def _number(path: str, key: str, value: Any) -> float:
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        where = f"{path}: {key}" if key else path
        raise ValueError(f"{where}: expected a finite number, got {value!r:.100}")
    return float(value)
