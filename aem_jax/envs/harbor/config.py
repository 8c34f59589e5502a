"""Settings of Harbor tasks: sources, rules of an episode, and bounds on what a task may ask for."""

from dataclasses import dataclass, field
from typing import ClassVar

from aem_jax.envs.harbor.task import HarborTask
from aem_jax.envs.swe.sandbox.admission import HostConfig
from aem_jax.envs.swe.sandbox.bubblewrap import BubblewrapConfig
from aem_jax.envs.swe.sandbox.workspace import Limits

NETWORKS = ("off", "verifier", "task")
RUNTIMES = ("auto", "bubblewrap", "docker", "podman")


@dataclass(frozen=True)
class HarborConfig:
    """Harbor task folders (terminal-bench 2, DeepSWE, SkillsBench, …): tools in a sandbox, the task's own verifier."""

    NAME: ClassVar[str] = "harbor"

    tasks: str = ""
    """Folder of task folders to train on, or one task folder."""
    evaluation: str = ""
    """Folder of tasks to evaluate on: one set, named by the single split in evaluation.splits. Empty: a part of `tasks`
    is held out."""
    held_out: float = 0.2
    """Fraction of `tasks` that is held out without `evaluation`; half of it is the split valid, half test."""
    exclude: tuple[str, ...] = ()
    """Names of tasks to leave out, or patterns such as 'qemu-*'."""
    runtime: str = "auto"
    """Sandbox for untrusted code: auto | bubblewrap | docker | podman. auto: an engine for tasks with an image or a
    Dockerfile, else bubblewrap."""
    ignore_images: bool = False
    """Whether tasks with an image or a Dockerfile run in bubblewrap, on this machine's files; environment/ is copied to
    the work folder. Many tasks do not work so: `python -m aem_jax.envs.harbor.check --ignore-images FOLDER` tells which
    do."""
    image: str = ""
    """Image for tasks without an image and without a Dockerfile, in docker or podman. It needs bash and tar."""
    network: str = "off"
    """Who has a network: off (nobody) | verifier (the verifier, if the task allows it) | task (agent and verifier, as
    the task says)."""
    max_steps: int = 50
    """Steps after which an episode is truncated; the verifier still runs."""
    max_invalid: int = 0
    """Responses without a valid call after which an episode is truncated; 0 sets no limit."""
    command_s: float = 180.0
    """Time limit of one command, seconds."""
    agent_s: float = 1800.0
    """Most time for all commands of an episode together, seconds; less if the task's agent.timeout_sec says so."""
    verify_s: float = 900.0
    """Most time for the verifier, seconds; less if the task's verifier.timeout_sec says so."""
    build_s: float = 1800.0
    """Most time to build an image, seconds; less if the task's environment.build_timeout_sec says so."""
    cpus: float = 4.0
    """Most processors of a container; less if the task asks for less. bubblewrap does not limit processors."""
    memory_mib: int = 4096
    """Most memory of a task, MiB; less if the task asks for less."""
    disk_mib: int = 2048
    """Most disk of a task, MiB; less if the task asks for less. With bubblewrap this is memory. In containers it holds
    only with `storage_quota`."""
    storage_quota: bool = False
    """Whether the engine limits a container's disk (`--storage-opt size`); its storage driver must support that."""
    processes: int = 256
    """Maximum number of processes and threads at one time."""
    file_mib: int = 1024
    """Largest file that may be written, MiB."""
    observation_bytes: int = 16384
    """Approximate maximum length of a tool's output; the middle of longer outputs is cut out."""
    reward_key: str = ""
    """Key of reward.json that is the reward. Empty: 'reward', or the only key."""
    reward_won: float = 1.0
    """Reward of an episode whose verifier gives 1 or more."""
    reward_invalid: float = 0.0
    """Reward for a response without a valid call."""
    partial: bool = False
    """Whether a verifier's reward below 1 counts in proportion; otherwise it is only the episode's score."""
    bubblewrap: BubblewrapConfig = field(default_factory=BubblewrapConfig)
    """Contents of a bubblewrap sandbox in addition to the system and the interpreter."""
    host: HostConfig = HostConfig()  # noqa: RUF009 (frozen)
    """What the sandboxes of a host may take together."""

    def __post_init__(self) -> None:
        for name in ("max_steps", "observation_bytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} of at least 1, got {getattr(self, name)}")
        if self.max_invalid < 0:
            raise ValueError(f"expected max_invalid of at least 0 (no limit), got {self.max_invalid}")
        for name in ("agent_s", "verify_s", "build_s", "cpus"):
            if not getattr(self, name) > 0:
                raise ValueError(f"expected {name} above 0, got {getattr(self, name)}")
        if not 0 <= self.held_out < 1:
            raise ValueError(f"expected held_out of at least 0 and below 1, got {self.held_out}")
        for name, known in (("network", NETWORKS), ("runtime", RUNTIMES)):
            if getattr(self, name) not in known:
                raise ValueError(f"expected {name} to be one of {', '.join(known)}, got {getattr(self, name)!r}")
        if self.ignore_images and self.runtime not in ("auto", "bubblewrap"):
            raise ValueError(f"expected runtime auto or bubblewrap with ignore_images, got {self.runtime!r}")
        _ = self.limits()  # validates the remaining settings

    def limits(self, task: HarborTask | None = None) -> Limits:
        """Returns the limits on one command of a task's agent; without a task, the most that any task gets."""
        memory, disk = (task.memory_mib, task.storage_mib) if task else (None, None)
        return Limits(
            seconds=self.command_s,
            memory_mib=min(memory or self.memory_mib, self.memory_mib),
            disk_mib=min(disk or self.disk_mib, self.disk_mib),
            processes=self.processes,
            file_mib=self.file_mib,
            output_bytes=max(self.observation_bytes, 256),
        )

    def seconds(self, task: HarborTask) -> tuple[float, float, float]:
        """Returns a task's time limits, seconds: all commands of the agent together, the verifier, building the
        image."""
        agent_s = self.agent_s if task.agent_s is None else min(task.agent_s, self.agent_s)
        return agent_s, min(task.verify_s, self.verify_s), min(task.build_s, self.build_s)

    def networks(self, task: HarborTask) -> tuple[bool, bool]:
        """Returns whether a task's agent and its verifier have a network; both alike if each has its own environment.

        Raises:
            ValueError: the task limits a network to some hosts, which is not supported.
        """
        modes = {
            "agent": task.agent_network if self.network == "task" else "no-network",
            "verifier": task.verifier_network if self.network != "off" else "no-network",
        }
        for who, mode in modes.items():
            if mode == "allowlist":
                raise ValueError(
                    f"{task.folder / 'task.toml'}: {who}.network_mode or environment.network_mode: expected no-network "
                    f"or public with --harbor.network {self.network}, got 'allowlist'; --harbor.network off runs the "
                    "task without a network"
                )
        agent, verifier = modes["agent"] == "public", modes["verifier"] == "public"
        if task.is_verifier:
            return verifier, verifier
        return agent, agent if task.verifier else verifier
