"""The settings of a run: the components' own configs, composed. Only `config/` and the entry points import this.

A choice is a name here and a function everywhere else. The tables that map names to functions are in `algorithms.py`
(advantages) and `components.py` (the rest).
"""

# ruff: noqa: RUF009 (the configs that stand as defaults are frozen)

from dataclasses import dataclass, field
from functools import partial
from typing import Annotated

from aem_jax.batch import BatchConfig
from aem_jax.checkpoint import CheckpointConfig
from aem_jax.config.algorithms import AlgorithmConfig
from aem_jax.credit import AemConfig
from aem_jax.distributed.config import RuntimeConfig
from aem_jax.envs.registry import TRAINED, default_config
from aem_jax.envs.serving.config import PoolConfig
from aem_jax.envs.suite import EnvironmentConfig
from aem_jax.evaluate import EvaluationConfig
from aem_jax.learner.config import LearnerConfig
from aem_jax.metrics import MetricsConfig
from aem_jax.models.config import ModelChoice
from aem_jax.models.lora import LoraConfig
from aem_jax.overrides import OneOf
from aem_jax.rollout.config import RolloutConfig
from aem_jax.sampler.sampling import SamplingConfig
from aem_jax.selection import SelectionConfig
from aem_jax.sharding import MeshConfig
from aem_jax.tokenizer import TokenizerConfig
from aem_jax.train import TrainConfig
from aem_jax.warmstart import WarmstartConfig

ENVIRONMENT = OneOf(TRAINED, default_config, lambda config: config.NAME)
"""The environments of the registry: each brings its own settings."""


@dataclass(frozen=True)
class RunConfig:
    """All settings of a run."""

    name: str = ""
    """Folder of the run in runs_dir; empty: the presets' names and your changes. The same command resumes the run."""
    runs_dir: str = "runs"
    """Folder of all runs."""
    preset: str = ""
    """Presets, later ones over earlier ones: names (`python -m aem_jax.launch presets`) or TOML files."""
    seed: int = 0
    """Seed of everything random, from 0 to 2³² - 1: weights, games, sampling."""
    environment: Annotated[EnvironmentConfig, ENVIRONMENT] = field(default_factory=partial(default_config, "alfworld"))
    """What the agent learns. The settings of the others are listed by --environment NAME --help."""
    env: PoolConfig = PoolConfig(num_servers=2, sessions_per_server=64)
    """Environment servers."""
    model: ModelChoice = ModelChoice()
    """The policy."""
    lora: LoraConfig = LoraConfig()
    """Training adapters instead of all weights."""
    tokenizer: TokenizerConfig = TokenizerConfig()
    """The tokenizer."""
    mesh: MeshConfig = MeshConfig()
    """The device mesh."""
    warmstart: WarmstartConfig = WarmstartConfig()
    """Learning from demonstrations, before reinforcement learning."""
    train: TrainConfig = TrainConfig()
    """Length of the training, and what is kept."""
    sampling: SamplingConfig = SamplingConfig()
    """How tokens are drawn while training."""
    rollout: RolloutConfig = RolloutConfig()
    """How episodes are played."""
    selection: SelectionConfig = SelectionConfig()
    """Which episodes are learnt from."""
    algorithm: AlgorithmConfig = AlgorithmConfig()
    """Base advantages."""
    aem: AemConfig = AemConfig()
    """Adaptive Entropy Modulation."""
    batch: BatchConfig = BatchConfig()
    """Sizes of a batch."""
    learner: LearnerConfig = LearnerConfig()
    """The update."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """Fixed evaluation sets."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Checkpoints."""
    metrics: MetricsConfig = MetricsConfig()
    """Where numbers go."""
    runtime: RuntimeConfig = RuntimeConfig()
    """The machine."""

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**32:  # JAX's keys take 32 bits of it: two seeds beyond them may be the same run
            raise ValueError(f"expected seed from 0 to {2**32 - 1}, got {self.seed}")


MAY_CHANGE = (
    *("name", "runs_dir", "preset", "rollout.prompt_tokens", "rollout.cache_gib"),
    *("train.", "evaluation.", "checkpoint.", "env.", "metrics.", "runtime."),
)
"""Fields, or groups of fields, that a resumed run may change: they do not decide what is computed."""


MUST_MATCH = ("env.field_mapping.", "env.command")
"""Exceptions among them, which decide what environments receive and answer."""


def may_change(name: str) -> bool:
    """Whether a resumed run may change the field of this dotted name."""
    groups = tuple(entry for entry in MAY_CHANGE if entry.endswith("."))
    return (name.startswith(groups) or name in MAY_CHANGE) and not name.startswith(MUST_MATCH)
