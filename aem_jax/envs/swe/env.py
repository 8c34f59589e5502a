"""A software-engineering task: the agent works in one sandbox, its patch is graded in another."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from aem_jax.envs.protocol import StepResult
from aem_jax.envs.swe.formats import grade
from aem_jax.envs.swe.grading import Report
from aem_jax.envs.swe.patches import model_patch, save_base, set_aside
from aem_jax.envs.swe.sandbox.admission import HostConfig
from aem_jax.envs.swe.sandbox.bubblewrap import BubblewrapConfig
from aem_jax.envs.swe.sandbox.choose import choose_runtime
from aem_jax.envs.swe.sandbox.containers import ContainerConfig
from aem_jax.envs.swe.sandbox.pods import KubernetesConfig
from aem_jax.envs.swe.sandbox.workspace import (
    Limits,
    Outcome,
    PreparingRuntime,
    Runtime,
    Workspace,
    WorkspaceError,
)
from aem_jax.envs.swe.tasks import TasksConfig, load_task
from aem_jax.envs.swe.tools import RECIPES, Tools, describe

PROMPT = """\
You are working in a copy of the repository {repo} at /testbed. Solve this issue by changing the code:

<issue>
{issue}
</issue>

Hidden tests decide whether it is solved; changes to the tests do not count.

{tools}"""

LOG_BYTES = 4 * 2**20
"""Maximum length of the log of the final tests; the middle of longer logs is cut out."""
PATCH_BYTES = 2**20
"""Longest patch that is graded; a longer patch counts as unsolved."""


@dataclass(frozen=True)
class SweConfig:
    """Bug-fixing with tools: the tasks, the rules of an episode, and limits on the code that runs."""

    NAME: ClassVar[str] = "swe"

    tasks: TasksConfig = TasksConfig()  # noqa: RUF009 (frozen)
    """Bug-fixing tasks."""
    runtime: str = "auto"
    """Sandbox for untrusted code: auto | bubblewrap | docker | podman | kubernetes."""
    max_steps: int = 50
    """Steps after which an episode is truncated; its patch is still graded."""
    max_invalid: int = 0
    """Responses without a valid call after which an episode is truncated; 0 sets no limit."""
    command_s: float = 90.0
    """Wall-time limit of one command, seconds."""
    grade_s: float = 300.0
    """Time limit of the final tests, seconds."""
    memory_mib: int = 2048
    """Memory limit of all processes of a command together, MiB."""
    processes: int = 128
    """Maximum number of processes and threads of a command at one time."""
    file_mib: int = 256
    """Largest file that may be written, MiB."""
    disk_mib: int = 1024
    """Work tree and /tmp together, MiB; with bubblewrap, or containers with storage `memory`, this is memory."""
    observation_bytes: int = 16384
    """Approximate maximum length of a tool's output; the middle of longer outputs is cut out."""
    recipe: str = "own"
    """Words and limits of the tools' outputs: own (`observation_bytes`) | r2e-gym (200 lines, 10,000 characters)."""
    reward_won: float = 1.0
    """Reward for solving the task."""
    reward_invalid: float = 0.0
    """Reward for a response without a valid call."""
    partial: bool = False
    """Whether an unsolved task earns the fraction of its failing tests that now pass, if no passing test broke."""
    bubblewrap: BubblewrapConfig = field(default_factory=BubblewrapConfig)
    """Contents of a bubblewrap sandbox in addition to the system and the interpreter."""
    container: ContainerConfig = field(default_factory=ContainerConfig)
    """Settings of containers: docker, podman, kubernetes."""
    kubernetes: KubernetesConfig = field(default_factory=KubernetesConfig)
    """Settings of a Kubernetes cluster."""
    host: HostConfig = HostConfig()  # noqa: RUF009 (frozen)
    """What the sandboxes of a host may take together."""

    def __post_init__(self) -> None:
        for name in ("max_steps", "observation_bytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} of at least 1, got {getattr(self, name)}")
        if self.recipe not in RECIPES:
            raise ValueError(f"expected recipe to be one of {', '.join(RECIPES)}, got {self.recipe!r}")
        if self.max_invalid < 0:
            raise ValueError(f"expected max_invalid of at least 0 (no limit), got {self.max_invalid}")
        _ = self.command_limits, self.grade_limits  # these validate the remaining settings

    def make_runtime(self) -> Runtime:
        """Chooses the sandboxes.

        Raises:
            SandboxError: none works on this machine.
        """
        return choose_runtime(self.runtime, self.bubblewrap, self.container, host=self.host, kubernetes=self.kubernetes)

    @property
    def command_limits(self) -> Limits:
        """Limits on one command of the agent."""
        return Limits(
            seconds=self.command_s,
            memory_mib=self.memory_mib,
            processes=self.processes,
            file_mib=self.file_mib,
            disk_mib=self.disk_mib,
            output_bytes=self.observation_bytes,
        )

    @property
    def grade_limits(self) -> Limits:
        """Limits on the final tests."""
        return replace(self.command_limits, seconds=self.grade_s, output_bytes=LOG_BYTES)


class SweSession:
    """One task's sandbox and its grading: `SweEnv` without tools, for agents that have their own.

        with SweSession(full_payload({"bug": "calc-1"})) as session:
            session.run("python -m pytest -q")
            print(session.statement, session.grade()["won"])

    Args:
        task: the full payload of a task (see `tasks.py`).
        config: limits.
        runtime: opens the workspaces; None: the one that `config.runtime` names.

    Attributes:
        statement: text of the issue.
        repo: name of the repository, which is at /testbed.
        workspace: where commands run; None once it is closed.
        limits: on one command.

    Raises:
        ValueError: the payload is invalid.
        SandboxError: the workspace could not be opened, or no sandbox works on this machine.
    """

    def __init__(self, task: Mapping[str, Any], config: SweConfig = SweConfig(), runtime: Runtime | None = None):
        self._config = config
        # of a runtime that serves one session, nothing is used again
        self._runtime = runtime or replace(config, host=replace(config.host, warm=0)).make_runtime()
        self._instance, self._checkout = load_task(task)
        self.statement, self.repo = self._instance.problem_statement, self._instance.repo
        self.limits = self._instance.resources.of_command(config.command_limits)
        self.workspace: Workspace | None = self._runtime.open(self._instance, self._checkout, limits=self.limits)
        try:
            if self._instance.hidden:
                set_aside(self.workspace, self._instance.hidden)
            self._base = save_base(self.workspace)
            if isinstance(self._runtime, PreparingRuntime):  # a workspace for the grading
                self._runtime.prepare(self._instance, self._checkout, limits=self.limits)
        except BaseException:
            self.close()
            raise

    def run(self, command: str, seconds: float = 0.0) -> Outcome:
        """Runs a command of the agent in /testbed.

        Args:
            command: for bash.
            seconds: its time limit, at most that of the config; 0: that one.

        Raises:
            ValueError: the session was graded or closed.
            SandboxError: the sandbox failed.
        """
        if self.workspace is None:
            raise ValueError("expected an open session, got one that was graded or closed")
        limits = replace(self.limits, seconds=min(seconds or self.limits.seconds, self.limits.seconds))
        return self.workspace.run(command, limits=limits)

    def grade(self) -> dict[str, Any]:
        """Reads the patch, closes the workspace, and grades in a fresh one.

        Returns:
            `won`, `score`, `applied`, and `fail_to_pass` and `pass_to_pass` or, without a patch, `failure`.

        Raises:
            ValueError: the session was graded or closed.
            SandboxError: the grading sandbox could not be opened.
        """
        if self.workspace is None:
            raise ValueError("expected an open session, got one that was graded or closed")
        limits, failure, patch = self._config.grade_limits, "", None
        try:
            patch = model_patch(self.workspace, self._base, limits=limits, max_bytes=PATCH_BYTES)
        except WorkspaceError as error:
            failure = str(error)
        finally:
            self.close()
        if patch is None:
            return {"won": False, "score": 0.0, "applied": False, "failure": failure}
        report = grade(self._instance, patch, self._runtime, self._checkout, limits=limits)
        return {
            "won": report.resolved,
            "score": _score(report, self._config.partial),
            "applied": report.applied,
            "fail_to_pass": _share(report.fail_to_pass),
            "pass_to_pass": _share(report.pass_to_pass),
        }

    def close(self) -> None:
        """Ends all processes, and removes the workspace. A second call does nothing."""
        workspace, self.workspace = self.workspace, None
        if workspace is not None:
            workspace.close()

    def __enter__(self) -> "SweSession":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class SweEnv:
    """Runs one task at a time.

    `StepResult.info` holds `won` and `valid_action`; at the end also `score` (1 if solved; with `partial` the
    fraction), `applied`, `fail_to_pass` and `pass_to_pass` (fractions of tests with the expected result), and `failure`
    (the reason why grading was impossible). It never contains the log of the hidden tests.

    Code that breaks its own sandbox ends its episode as unsolved. This is not an error of the environment.

    Args:
        config: rules of an episode.
        runtime: opens the workspaces.
    """

    def __init__(self, config: SweConfig, runtime: Runtime):
        self._config, self._runtime = config, runtime
        self._session: SweSession | None = None

    def reset(self, task: Mapping[str, Any]) -> StepResult:
        """Opens a workspace for a task, given by its full payload (see `tasks.py`).

        Raises:
            ValueError: the payload is invalid.
            SandboxError: the workspace could not be opened.
        """
        self.close()
        session = self._session = SweSession(task, self._config, self._runtime)
        self._steps = self._invalid = 0
        assert session.workspace is not None
        recipe = RECIPES[self._config.recipe]
        self._tools = Tools(session.workspace, session.limits, self._config.observation_bytes, recipe=recipe)
        prompt = PROMPT.format(repo=session.repo, issue=session.statement, tools=describe(recipe=recipe))
        return StepResult(prompt, info={"won": False, "valid_action": True})

    def step(self, action_text: str) -> StepResult:
        """Executes the call in a response; grades after `finish`, or when a limit ends the episode.

        Raises:
            ValueError: no episode is running.
            SandboxError: the grading sandbox could not be opened.
        """
        if self._session is None:
            raise ValueError("expected a running episode, got none; call reset first")
        result = self._tools.execute(action_text)
        self._steps += 1
        self._invalid += not result.valid
        reward = 0.0 if result.valid else self._config.reward_invalid
        limited = self._steps >= self._config.max_steps or 0 < self._config.max_invalid <= self._invalid
        if not (result.finished or limited):
            return StepResult(result.text, reward, info={"won": False, "valid_action": result.valid})
        session, self._session = self._session, None
        graded = session.grade()
        won = graded["won"]
        if won:
            reward = self._config.reward_won
        elif self._config.partial:
            reward += self._config.reward_won * graded["score"]
        return StepResult(
            result.text,
            reward,
            terminated=result.finished,
            truncated=not result.finished,
            info={**graded, "valid_action": result.valid},
        )

    def close(self) -> None:
        """Ends the episode and all its processes."""
        session, self._session = self._session, None
        if session is not None:
            session.close()


def _share(tests: Mapping[str, bool]) -> float:
    return sum(tests.values()) / len(tests) if tests else 1.0


def _score(report: Report, partial: bool) -> float:
    """Returns 1 if resolved; else, with `partial`, the fraction of failing tests that now pass, if nothing broke."""
    if report.resolved:
        return 1.0
    return _share(report.fail_to_pass) if partial and report.applied and all(report.pass_to_pass.values()) else 0.0
