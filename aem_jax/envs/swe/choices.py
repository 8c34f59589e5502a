"""Bug-fixing as a choice among edits: an action space small enough for a policy of under a million parameters.

The observation shows the symptoms of the bug and numbered edits. One edit is the fix, or several if the task has
several bugs; the others are mistakes of the same kinds elsewhere in the module. The actions are `run`, `apply <n>`,
`undo` and `finish`. The chosen edits are graded as a patch, in a sandbox, by the task's tests.

Success is not evidence that a policy can write code. `run` shows how many of all tests fail, including the hidden ones,
so trying one edit after the other solves every task with one bug. This is the strategy to learn.
"""

import hashlib
import json
import os
import random
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

from aem_jax.envs.actions import extract_action
from aem_jax.envs.protocol import StepResult
from aem_jax.envs.swe.generate.mutate import Edit, apply, edits
from aem_jax.envs.swe.generate.packages import package
from aem_jax.envs.swe.generate.tasks import DIFFICULTIES, Bug, bug, check_difficulties, checkout, diff, instance
from aem_jax.envs.swe.grading import TIMED_OUT, grade
from aem_jax.envs.swe.sandbox.choose import choose_runtime
from aem_jax.envs.swe.sandbox.containers import ContainerConfig
from aem_jax.envs.swe.sandbox.workspace import Limits, Runtime, SandboxError
from aem_jax.files import user_cache

ALL_PASS = "all pass"
SEVERAL = "several causes"
_MAX_SHOWN = 60

CountFailing = Callable[[Bug, Sequence[Edit]], int]
"""Returns the number of tests that fail with some edits of a bug's module; 0 means that they resolve the task."""


@dataclass(frozen=True)
class ChoicesConfig:
    """Bug-fixing as a choice among edits: the tasks, and the rules of an episode."""

    NAME: ClassVar[str] = "swe-choices"

    difficulties: tuple[str, ...] = DIFFICULTIES
    """Difficulties of the tasks: easy, medium, hard."""
    candidates: int = 4
    """Number of edits to choose from, including the fix."""
    max_steps: int = 12
    """Actions after which an unfinished episode is truncated, unsolved."""
    max_invalid: int = 0
    """Responses without a valid action after which an episode is truncated; 0 sets no limit."""
    reward_won: float = 1.0
    """Reward for finishing with all tests passing."""
    reward_invalid: float = 0.0
    """Reward for a response without a valid action."""
    runtime: str = "auto"
    """Sandbox for grading: auto | bubblewrap | docker | podman | kubernetes (with its default settings)."""
    image: str = ""
    """Image for grading in containers, with bash, git, patch, tar, and a `python` with pytest 7.2 or newer."""
    cache: str = "auto"
    """Folder of cached verdicts. Equal edits have equal verdicts. auto: $XDG_CACHE_HOME/aem_jax/swe; off: only in
    memory."""

    def __post_init__(self) -> None:
        check_difficulties(self.difficulties)
        if self.candidates < 2 or self.max_steps < 1:
            raise ValueError(
                "expected candidates of at least 2 and max_steps of at least 1, "
                f"got {self.candidates} and {self.max_steps}"
            )
        if self.max_invalid < 0:
            raise ValueError(f"expected max_invalid of at least 0 (no limit), got {self.max_invalid}")


@lru_cache(maxsize=4096)
def candidates(bug_id: str, count: int, draw: int) -> tuple[Edit, ...]:
    """Returns the edits to choose from: the fix (each edit of the bug reversed), and wrong edits of its module.

    At least one wrong edit is in a function of the bug, if possible. The bug's id determines the edits. `draw` and the
    id determine their order, so the position of the fix gives no information.
    """
    case = bug({"bug": bug_id})
    rng = random.Random(f"candidates/{bug_id}")
    gold, shift = [], 0
    for edit in case.edits:
        start = edit.start + shift
        gold.append(Edit(start, start + len(edit.after), edit.after, edit.before, edit.kind, edit.function))
        shift += len(edit.after) - len(edit.before)
    spans = {(edit.start, edit.end) for edit in gold}
    others = [edit for edit in edits(_source(case)) if (edit.start, edit.end) not in spans]
    rng.shuffle(others)
    near = {edit.function for edit in gold}
    others.sort(key=lambda edit: edit.function not in near)
    picked, places = [], set()
    for edit in [*others[:1], *rng.sample(others, len(others))]:
        if (edit.start, edit.end) not in places and len(gold) + len(picked) < count:
            picked.append(edit)
            places.add((edit.start, edit.end))
    chosen = gold + picked
    random.Random(f"order/{bug_id}/{draw}").shuffle(chosen)
    return tuple(chosen)


def failing_counter(runtime: Runtime, limits: Limits | None = None) -> CountFailing:
    """Returns a function that counts failing tests by grading the edits as a patch.

    Tests take 0.3 s, and a limit on processor time ends edits that loop forever. So a missed deadline means that the
    machine is slow. The edits are then graded once more, with ten times the time limit.
    """
    limits = limits or Limits(seconds=60.0, memory_mib=1024, cpu_seconds=5)
    longer = replace(limits, seconds=10 * limits.seconds)

    def count_failing(case: Bug, chosen: Sequence[Edit]) -> int:
        task, patch = instance(case.id), _patch(case, chosen)
        report = grade(task, patch, runtime, checkout(case), limits=limits)
        if TIMED_OUT in report.log:
            report = grade(task, patch, runtime, checkout(case), limits=longer)
        if not report.applied:  # the package's own edits always apply
            raise SandboxError(f"expected a patch of {case.id} to apply in the sandbox: {report.log[-500:]}")
        failing = [*report.fail_to_pass.values(), *report.pass_to_pass.values()].count(False)
        assert report.resolved == (failing == 0)
        return failing

    return count_failing


def cached(count_failing: CountFailing, folder: Path | None, sandbox: str = "") -> CountFailing:
    """Caches verdicts in memory, and in a folder that processes share.

    The key of a verdict contains everything that it depends on: the base commit, the script, the patch, the code that
    grades, and the sandbox, because an image has its own tools. Threads wait for one another, because each sandbox
    needs memory and the episodes of a group request the same verdicts.

    Args:
        count_failing: the function whose results are cached.
        folder: folder of one file per verdict; None: only in memory.
        sandbox: the runtime and its image.
    """
    verdicts: dict[str, int] = {}
    lock = threading.Lock()
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)

    def cached_count(case: Bug, chosen: Sequence[Edit]) -> int:
        task = instance(case.id)
        text = json.dumps([_grader(), sandbox, task.base_commit, task.eval_script, _patch(case, chosen)])
        key = hashlib.sha256(text.encode()).hexdigest()
        with lock:
            if key not in verdicts:
                verdict = _read_verdict(folder / key) if folder else None
                if verdict is None:
                    verdict = count_failing(case, chosen)
                    if folder:
                        _write_verdict(folder / key, verdict)
                verdicts[key] = verdict
            return verdicts[key]

    return cached_count


@lru_cache(maxsize=1)
def _grader() -> str:
    """Returns a hash of the code that determines verdicts."""
    names = ("choices", "grading", "instance", "log_parsers", "patches")
    return hashlib.sha256(b"".join(Path(__file__).with_name(f"{name}.py").read_bytes() for name in names)).hexdigest()


def _read_verdict(file: Path) -> int | None:
    """Returns the cached verdict; None if there is no file. A crash of the machine may leave an empty file."""
    try:
        text = file.read_bytes()
    except FileNotFoundError:
        return None
    return int(text) if text.isdigit() else None


def _write_verdict(file: Path, verdict: int) -> None:
    """Writes the file completely or not at all, because another process may read or write it at the same time."""
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=file.parent, delete=False) as new:
        new.write(str(verdict))
    os.replace(new.name, file)


def make_counter(config: ChoicesConfig) -> CountFailing:
    """Returns the function that counts failing tests with a config's sandbox and cache.

    Raises:
        OSError: no sandbox works on this machine.
    """
    try:
        runtime = choose_runtime(config.runtime, container=ContainerConfig(image=config.image))
    except SandboxError as error:
        raise OSError(str(error)) from None  # a server reports an OSError as missing on this machine
    if runtime.name != "bubblewrap" and not config.image:
        raise OSError(
            f"expected an image for {runtime.name} to grade in, got none; set --swe-choices.image to one with bash, "
            "git, patch, tar, and a `python` with pytest, or install bubblewrap, which needs no image"
        )
    return cached(failing_counter(runtime), cache_folder(config.cache), f"{runtime.name} {config.image}".strip())


def cache_folder(setting: str) -> Path | None:
    """Returns the folder for a value of `ChoicesConfig.cache`; None for no folder."""
    if setting == "off":
        return None
    if setting != "auto":
        return Path(setting)
    return user_cache("swe")


class ChoicesEnv:
    """Runs one task at a time.

    `StepResult.info` holds `won`, `valid_action`, `admissible` and, at the end, `score` (1 if solved).

    Args:
        config: rules of an episode.
        count_failing: counts the tests that fail with some edits.
    """

    def __init__(self, config: ChoicesConfig, count_failing: CountFailing):
        self._config, self._count_failing = config, count_failing
        self._bug: Bug | None = None

    def reset(self, task: Mapping[str, Any]) -> StepResult:
        """Starts an episode of a payload `{"bug": "<package>-<number>", "draw": <number>}`.

        Raises:
            ValueError: there is no such bug.
        """
        self._bug = bug(task)
        self._edits = candidates(self._bug.id, self._config.candidates, task.get("draw", 0))
        self._applied: list[int] = []
        self._steps = self._invalid = 0
        names = list(self._bug.broken)
        symptom = "; ".join(name.removeprefix("test_").replace("_", " ") for name in names[:2])
        several = f" ({SEVERAL})" if len(self._bug.edits) > 1 else ""
        lines = [f"{self._bug.package}: {symptom}{several}"]
        for number, edit in enumerate(self._edits, start=1):
            lines.append(f"{number}: {_shortened(edit.before)} -> {_shortened(edit.after)}")
        return StepResult("\n".join(lines), info=self._info(won=False, valid=True))

    def step(self, action_text: str) -> StepResult:
        """Executes the action of a response.

        Raises:
            ValueError: no episode is running.
        """
        if self._bug is None:
            raise ValueError("expected a running episode, got none; call reset first")
        action = " ".join((extract_action(action_text) or "").split())
        valid = action in self._admissible()
        self._steps += 1
        self._invalid += not valid
        if not valid:
            text = "nothing happens"
        elif action == "finish":
            return self._end("finished", self._failing() == 0, valid=True, truncated=False)
        elif action == "run":
            failing = self._failing()
            text = f"{failing} fail" if failing else ALL_PASS
        elif action == "undo":
            text = f"undid {self._applied.pop() + 1}"
        else:
            self._applied.append(int(action.split()[1]) - 1)
            text = f"applied {self._applied[-1] + 1}"
        limited = self._steps >= self._config.max_steps or 0 < self._config.max_invalid <= self._invalid
        if limited:
            return self._end(text, False, valid, truncated=True)
        reward = 0.0 if valid else self._config.reward_invalid
        return StepResult(text, reward, info=self._info(won=False, valid=valid))

    def close(self) -> None:
        """Ends the episode."""
        self._bug = None

    def _end(self, text: str, won: bool, valid: bool, *, truncated: bool) -> StepResult:
        reward = self._config.reward_won if won else 0.0 if valid else self._config.reward_invalid
        info = {**self._info(won, valid), "score": float(won)}
        self._bug = None
        return StepResult(text, reward, terminated=not truncated, truncated=truncated, info=info)

    def _failing(self) -> int:
        """Returns the number of tests that fail with the applied edits."""
        assert self._bug is not None
        return self._count_failing(self._bug, [self._edits[number] for number in sorted(self._applied)])

    def _admissible(self) -> list[str]:
        """Returns the possible actions. Edits of overlapping text exclude one another."""
        taken = [self._edits[number] for number in self._applied]
        free = [
            f"apply {number}"
            for number, edit in enumerate(self._edits, start=1)
            if all(edit.end <= other.start or other.end <= edit.start for other in taken)
        ]
        return [*free, "finish", "run", *(["undo"] if taken else [])]

    def _info(self, won: bool, valid: bool) -> dict[str, Any]:
        return {"won": won, "valid_action": valid, "admissible": self._admissible()}


def _source(case: Bug) -> str:
    return apply(package(case.package).source, case.edits)


def _patch(case: Bug, chosen: Sequence[Edit]) -> str:
    path, before = package(case.package).module_path, _source(case)
    return diff({path: before}, {path: apply(before, chosen)})


def _shortened(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _MAX_SHOWN else line[: _MAX_SHOWN - 3] + "..."
