"""Bug-fixing as a choice among edits: an action space small enough for a policy of under a million parameters.

What it is: the observation shows what is wrong and numbered edits, one of which (or several, where there are several
bugs) is the fix; the others are mistakes of the same sort elsewhere in the module. Actions are `run`, `apply <n>`,
`undo` and `finish`. The reward comes from grading the chosen edits as a patch, in a sandbox, by the task's tests.

What it is not: evidence that a policy can write code. `run` tells how many of all tests fail, the grading ones too, so
that trying edits one after the other solves every task with one bug; that is what there is to learn.
"""

import difflib
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
from aem_jax.envs.swe.generate.tasks import DIFFICULTIES, Bug, bug, check_difficulties, checkout, instance
from aem_jax.envs.swe.grading import TIMED_OUT, grade
from aem_jax.envs.swe.sandbox.choose import choose_runtime
from aem_jax.envs.swe.sandbox.containers import ContainerConfig, Containers
from aem_jax.envs.swe.sandbox.workspace import Limits, Runtime, SandboxError

ALL_PASS = "all pass"
SEVERAL = "several causes"
_SHOWN = 60

Failing = Callable[[Bug, Sequence[Edit]], int]
"""Edits of a bug's module -> how many tests fail with them; 0: they resolve the task."""


@dataclass(frozen=True)
class ChoicesConfig:
    """Bug-fixing as a choice among edits: the tasks, and the rules of an episode."""

    NAME: ClassVar[str] = "swe-choices"

    difficulties: tuple[str, ...] = DIFFICULTIES
    """Difficulties of the tasks: easy, medium, hard."""
    candidates: int = 4
    """Edits to choose from, the fix among them."""
    max_steps: int = 12
    """Actions after which an unfinished episode is truncated, unsolved."""
    max_invalid: int = 0
    """Responses that are no action, after which an episode is truncated; 0 sets no limit."""
    reward_won: float = 1.0
    """Reward of finishing with all tests passing."""
    reward_invalid: float = 0.0
    """Reward of a response that is no action."""
    runtime: str = "auto"
    """What grades: auto, bubblewrap, docker or podman."""
    image: str = ""
    """Image in which docker or podman grades, with bash, git, patch, tar, and a `python` with pytest 7.2 or newer."""
    cache: str = "auto"
    """Folder in which verdicts are kept, since equal edits have equal verdicts; auto: $XDG_CACHE_HOME/aem_jax/swe;
    off: kept in memory alone."""

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
    """Edits of a bug's module to choose from: the reverse of each of its own, and mistakes to make instead.

    The first mistake is in a function of the bug where there is one. Which they are is drawn by the bug's id, in which
    order they stand by `draw` too, so that places tell nothing.
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


def graded(runtime: Runtime, limits: Limits | None = None) -> Failing:
    """Counts failing tests by grading the edits as a patch.

    Tests take 0.3 s, and edits that never end are ended by their processor time. So a deadline that passes says that
    the machine is slow, and nothing of the edits: they are graded once more with ten times as long.
    """
    limits = limits or Limits(seconds=60.0, memory_mib=1024, cpu_seconds=5)
    longer = replace(limits, seconds=10 * limits.seconds)

    def failing(case: Bug, chosen: Sequence[Edit]) -> int:
        task, patch = instance(case.id), _patch(case, chosen)
        report = grade(task, patch, runtime, checkout(case), limits=limits)
        if TIMED_OUT in report.log:
            report = grade(task, patch, runtime, checkout(case), limits=longer)
        if not report.applied:  # edits of our own always apply
            raise SandboxError(f"expected a patch of {case.id} to apply in the sandbox: {report.log[-500:]}")
        wrong = [*report.fail_to_pass.values(), *report.pass_to_pass.values()].count(False)
        assert report.resolved == (wrong == 0)
        return wrong

    return failing


def remembered(failing: Failing, folder: Path | None, where: str = "") -> Failing:
    """`failing`, asked once for each choice; verdicts lie in a folder that processes share, or in memory alone.

    A verdict belongs to the texts that it was reached on: the base commit, the script, the patch and the code that
    grades; and to `where` it was, since an image brings tools of its own. Threads wait for one another: each sandbox
    takes memory, and a group of episodes asks the same.
    """
    known: dict[str, int] = {}
    turn = threading.Lock()
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)

    def answer(case: Bug, chosen: Sequence[Edit]) -> int:
        task = instance(case.id)
        text = json.dumps([_grader(), where, task.base_commit, task.eval_script, _patch(case, chosen)])
        key = hashlib.sha256(text.encode()).hexdigest()
        with turn:
            if key not in known:
                known[key] = _kept(folder / key, lambda: failing(case, chosen)) if folder else failing(case, chosen)
            return known[key]

    return answer


@lru_cache(maxsize=1)
def _grader() -> str:
    """A hash of the code that reaches verdicts."""
    names = ("choices", "grading", "instance", "log_parsers", "patches")
    return hashlib.sha256(b"".join(Path(__file__).with_name(f"{name}.py").read_bytes() for name in names)).hexdigest()


def _kept(file: Path, ask: Callable[[], int]) -> int:
    """The verdict that a file holds; where there is none, or no number in it, asks for it and writes it.

    The file is written completely or not at all, since another process may read it at any time. A machine that fails
    can still leave it empty.
    """
    try:
        text = file.read_bytes()
    except FileNotFoundError:
        text = b""
    if text.isdigit():
        return int(text)
    verdict = ask()
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=file.parent, delete=False) as new:
        new.write(str(verdict))
    os.replace(new.name, file)
    return verdict


def make_failing(config: ChoicesConfig) -> Failing:
    """What counts failing tests, by the rules of a config.

    Raises:
        OSError: there is no sandbox that works on this machine.
    """
    try:
        runtime = choose_runtime(config.runtime, container=ContainerConfig(image=config.image))
    except SandboxError as error:
        raise OSError(str(error)) from None  # which servers and runs report as what is missing on this machine
    if isinstance(runtime, Containers) and not config.image:
        raise OSError(
            f"expected an image for {runtime.name} to grade in, got none; set --swe-choices.image to one with bash, "
            "git, patch, tar, and a `python` with pytest, or install bubblewrap, which needs no image"
        )
    return remembered(graded(runtime), cache_folder(config.cache), f"{runtime.name} {config.image}".strip())


def cache_folder(setting: str) -> Path | None:
    """The folder that `ChoicesConfig.cache` names."""
    if setting == "off":
        return None
    if setting != "auto":
        return Path(setting)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "aem_jax" / "swe"


class ChoicesEnv:
    """One task at a time.

    `StepResult.info` holds `won`, `valid_action`, `admissible` and, at the end, `score` (1: resolved).

    Args:
        config: rules of an episode.
        failing: counts the tests that fail with edits.
    """

    def __init__(self, config: ChoicesConfig, failing: Failing):
        self._config, self._failing = config, failing
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
            lines.append(f"{number}: {_shown(edit.before)} -> {_shown(edit.after)}")
        return StepResult("\n".join(lines), info=self._info(won=False, valid=True))

    def step(self, action_text: str) -> StepResult:
        """Answers a response.

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
            return self._end("finished", self._count() == 0, valid=True, truncated=False)
        elif action == "run":
            failing = self._count()
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

    def _count(self) -> int:
        assert self._bug is not None
        return self._failing(self._bug, [self._edits[number] for number in sorted(self._applied)])

    def _admissible(self) -> list[str]:
        """What can be done now; edits of one place exclude one another."""
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
    old, new = (text.splitlines(keepends=True) for text in (before, apply(before, chosen)))
    return "".join(difflib.unified_diff(old, new, f"a/{path}", f"b/{path}"))


def _shown(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _SHOWN else line[: _SHOWN - 3] + "..."
