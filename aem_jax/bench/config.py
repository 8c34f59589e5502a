"""Settings of `bench`."""

from dataclasses import dataclass, field
from typing import Literal

from aem_jax.distributed.config import RuntimeConfig
from aem_jax.envs.testing.scripted import ScriptedConfig
from aem_jax.learner.config import LearnerConfig
from aem_jax.rollout.config import RolloutConfig
from aem_jax.sampler import SamplingConfig

Mode = Literal["lockstep", "continuous"]


def _small_rollout() -> RolloutConfig:
    """64 episodes of up to 30 turns on 16 slots, which take seconds on two CPU cores."""
    return RolloutConfig(
        groups_per_step=32,
        group_size=2,
        num_slots=16,
        max_turns=30,
        response_tokens=64,
        context_tokens=2560,
        prompt_tokens=128,
        decode_chunk=8,
        slot_divisors=(2, 4, 8),
        extend_buckets=(40, 128),
        windows=(256, 512, 1024),
    )


@dataclass(frozen=True)
class BenchConfig:
    """Shapes and repetitions."""

    model: str = "tiny"
    """Name of a known decoder size (sampler, context, learner, rollout); its parameters are random."""
    slots: int = 8
    """Episodes that decode at once (sampler, context), rows of a batch (learner)."""
    prompt_tokens: int = 128
    """Tokens in the cache before decoding (sampler)."""
    new_tokens: int = 128
    """Tokens that each slot decodes (sampler)."""
    contexts: tuple[int, ...] = (256, 1024, 4096, 16384)
    """Tokens in the cache before decoding, and capacities of the cache (context)."""
    context_chunk: int = 32
    """Tokens that each slot decodes after its context (context)."""
    row_length: int = 512
    """Tokens of a row (learner)."""
    trajectories: int = 128
    """Episodes, eight to a group (advantage)."""
    turns: int = 50
    """Responses of an episode (advantage)."""
    sessions: int = 32
    """Environment sessions that step at once (envs, load)."""
    load_steps: int = 10_000
    """Steps of all sessions together in one repetition (load)."""
    response_mean: float = 16.0
    """Mean tokens of a response (rollout); sets the number of stop ids. `rollout.response_tokens` cuts longer ones."""
    servers: int = 2
    """Environment servers (rollout)."""
    modes: tuple[Mode, ...] = ("lockstep", "continuous")
    """Modes of the rollout to measure in turn (rollout, carry), instead of `rollout.mode`; ratios are to the first."""
    carry_steps: int = 4
    """Steps of one repetition (carry)."""
    sandboxes: tuple[str, ...] = ()
    """Sandboxes to measure: bubblewrap, docker, podman (sandboxes). Empty: those that work here."""
    sandbox_image: str = ""
    """Image for docker and podman, with bash, git, patch, tar, python and pytest (sandboxes). Empty: neither is
    measured."""
    sandbox_storage: str = "auto"
    """Where the work tree of a container lies: see --swe.container.storage (sandboxes)."""
    sandbox_commands: int = 10
    """Commands of an episode (sandboxes)."""
    at_once: tuple[int, ...] = (1, 4, 16, 64)
    """Episodes at a time, in turn (sandboxes)."""
    seed: int = 0
    """Seed of tasks and tokens (rollout, carry)."""
    repeats: int = 5
    """Repetitions after the warm-up."""
    compare: str = ""
    """File with the JSON line of an earlier run, to show ratios to."""
    trace: str = ""
    """Folder for a profile of one more call of each program (sampler, learner); its longest operations are printed."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """The distribution, the dtypes and the attention to sample with (sampler, context)."""
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    """The update (learner): its attention, its rematerialization."""
    rollout: RolloutConfig = field(default_factory=_small_rollout)
    """The rollout's slots, turns and budgets (rollout, carry)."""
    scripted: ScriptedConfig = field(default_factory=ScriptedConfig)
    """The rollout's environment: turns, observations, latency (rollout, carry)."""
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    """The machine."""

    def __post_init__(self):
        for name, value in vars(self).items():
            least = 0 if name == "seed" else 1
            if isinstance(value, int) and value < least:
                raise ValueError(f"expected {name} >= {least}, got {value}")
        if self.response_mean < 1:
            raise ValueError(f"expected response_mean >= 1, got {self.response_mean}")
        if not self.contexts or min(self.contexts) < 1:
            raise ValueError(f"expected contexts of at least 1 token, got {self.contexts}")
        if not self.modes or len(set(self.modes)) < len(self.modes):
            raise ValueError(f"expected modes, each once, got {', '.join(self.modes) or 'none'}")
        if not self.at_once or min(self.at_once) < 1:
            raise ValueError(f"expected at_once of at least 1 episode, got {self.at_once}")
        if self.trajectories % 8:
            raise ValueError(f"expected trajectories divisible by 8, got {self.trajectories}")
        if self.scripted.max_turns > self.rollout.max_turns:
            raise ValueError(
                f"expected scripted.max_turns <= rollout.max_turns = {self.rollout.max_turns}, "
                f"got {self.scripted.max_turns}; episodes would be cut"
            )
