"""The settings of a run: the components' own configs, composed. Only `config/` and the entry points import this.

A choice is a name here and a function everywhere else. The tables that map names to functions are in `algorithms.py`
(advantages) and `components.py` (the rest).
"""

# ruff: noqa: RUF009 (the configs that stand as defaults are frozen)

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated

from aem_jax.batch import BatchConfig
from aem_jax.checkpoint import CheckpointConfig
from aem_jax.config.algorithms import READ_BY, AlgorithmConfig, has_values
from aem_jax.credit import AemConfig
from aem_jax.distributed.config import RuntimeConfig
from aem_jax.envs.registry import TRAINED, default_config
from aem_jax.envs.serving.config import PoolConfig
from aem_jax.envs.suite import EnvironmentConfig
from aem_jax.evaluate import EvaluationConfig
from aem_jax.learner.config import LearnerConfig
from aem_jax.metrics import MetricsConfig
from aem_jax.models.config import CONFIGS, ModelChoice
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
    """Presets, later ones over earlier ones: names (the command `presets` lists them) or TOML files."""
    seed: int = 0
    """Seed of everything random, from 0 to 2³² - 1: weights, games, sampling."""
    environment: Annotated[EnvironmentConfig, ENVIRONMENT] = field(default_factory=partial(default_config, "alfworld"))
    """What the agent learns; --environment NAME --help lists another's settings."""
    env: PoolConfig = PoolConfig(num_servers=2, sessions_per_server=64)
    """Environment servers."""
    model: ModelChoice = ModelChoice()
    """The policy."""
    lora: LoraConfig = LoraConfig()
    """Training adapters instead of all weights."""
    tokenizer: TokenizerConfig = TokenizerConfig()
    """The tokenizer."""
    mesh: MeshConfig = MeshConfig()
    """The device mesh. One size may be -1: all remaining devices. If none is set, a run chooses sizes that fit."""
    warmstart: WarmstartConfig = WarmstartConfig()
    """Learning from demonstrations, before reinforcement learning."""
    train: TrainConfig = TrainConfig()
    """Length of the training."""
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
    """The machine, and the processes of a run."""

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**32:  # JAX's keys take 32 bits of it: two seeds beyond them may be the same run
            raise ValueError(f"expected seed from 0 to {2**32 - 1}, got {self.seed}")


def _read_by(names: str, estimators: Sequence[str]) -> tuple[str, str, Callable[[RunConfig], bool]]:
    return names, f"--algorithm.estimator {', '.join(estimators)}", lambda run: run.algorithm.estimator in estimators


CONDITIONS: Sequence[tuple[str, str, Callable[[RunConfig], bool]]] = (
    (
        "env.field_mapping",
        "--env.urls, --env.command or --environment openenv",
        lambda run: bool(run.env.urls or run.env.command or run.environment.NAME == "openenv"),
    ),
    ("tokenizer.chat_template tokenizer.thinking", "--model.path", lambda run: bool(run.model.path)),
    (
        "model.name model.hidden_size model.intermediate_size model.num_layers model.num_heads model.num_kv_heads "
        "model.head_dim tokenizer.vocab_size tokenizer.whole_words tokenizer.episodes",
        "no --model.path",
        lambda run: not run.model.path,
    ),
    ("lora.alpha lora.targets lora.merge", "--lora.rank", lambda run: run.lora.rank > 0),
    (
        "warmstart.steps warmstart.batch_episodes warmstart.learning_rate warmstart.expert_noise "
        "warmstart.expert_thinks warmstart.expert_habit warmstart.only_successful",
        "--warmstart.episodes",
        lambda run: run.warmstart.episodes > 0 and not run.warmstart.init_from,
    ),
    (
        "rollout.slot_divisors",
        "--rollout.mode continuous or context window",
        lambda run: run.rollout.mode == "continuous" or run.rollout.context == "window",
    ),
    ("rollout.num_cohorts", "--rollout.mode lockstep", lambda run: run.rollout.mode == "lockstep"),
    ("rollout.carry_max_age", "--rollout.carry-min-groups", lambda run: run.rollout.carry_min_groups > 0),
    (
        "rollout.prompt_style rollout.thinking",
        "--rollout.context window",
        lambda run: run.rollout.context == "window",
    ),
    (
        "rollout.window_turns rollout.compact_chars",
        "--rollout.context window or compact",
        lambda run: run.rollout.context in ("window", "compact"),
    ),
    (
        "selection.outcome selection.oversample selection.max_rounds",
        "--selection.filter-equal-outcomes",
        lambda run: run.selection.filter_equal_outcomes,
    ),
    (
        "selection.overlong_buffer selection.overlong_of",
        "--selection.overlong-penalty",
        lambda run: run.selection.overlong_penalty > 0,
    ),
    *(_read_by(f"algorithm.{name}", estimators) for name, estimators in READ_BY.items()),
    (
        "learner.value_coefficient learner.value_clip learner.value_learning_rate learner.value_gradient",
        "--algorithm.estimator gae",
        lambda run: has_values(run.algorithm),
    ),
    ("aem.min_range aem.scope aem.variant", "--aem.strength", lambda run: run.aem.strength > 0),
    ("learner.covariance_share", "--learner.covariance", lambda run: run.learner.covariance != "off"),
    ("learner.covariance_range", "--learner.covariance clip", lambda run: run.learner.covariance == "clip"),
    ("learner.covariance_penalty", "--learner.covariance kl", lambda run: run.learner.covariance == "kl"),
    (
        "mesh.expert learner.balance_coefficient learner.routing_replay",
        "--model.name or --model.path of a mixture of experts",
        lambda run: bool(run.model.path or (run.model.name in CONFIGS and CONFIGS[run.model.name].mixture)),
    ),
    ("learner.total_steps", "--learner.schedule", lambda run: run.learner.schedule != "constant"),
    ("learner.constant_length", "--learner.aggregation constant", lambda run: run.learner.aggregation == "constant"),
    ("runtime.num_processes runtime.process_id", "--runtime.coordinator", lambda run: bool(run.runtime.coordinator)),
)
"""Settings or groups of settings, the options with which they have an effect, and whether they have one in a run."""


def without_effect(config: RunConfig) -> dict[str, list[str]]:
    """The settings and groups that have no effect on a run of this config, by the options that would give them one."""
    return {option: names.split() for names, option, have_effect in CONDITIONS if not have_effect(config)}


MAY_CHANGE = (
    *("name", "runs_dir", "preset", "rollout.cache_gib"),
    *("train.", "evaluation.", "checkpoint.", "env.", "metrics.", "runtime."),
    *("swe.host.", "swe.kubernetes.", "harbor.host."),
)
"""Fields, or groups of fields, that a resumed run may change: they do not decide what is computed."""


MUST_MATCH = ("env.field_mapping.", "env.command")
"""Exceptions among them, which decide what environments receive and answer."""

ENGINES = {"swe.runtime": ("docker", "podman", "kubernetes"), "harbor.runtime": ("docker", "podman")}
"""Runtimes that a resumed run may replace by one another: all run a task in the same image. bubblewrap has none."""


_SHAPES = ("model.", "lora.rank", "lora.alpha", "lora.targets", "learner.moments", "algorithm.estimator")
"""Fields, or groups of fields, that decide which arrays a checkpoint has and what they mean."""


def decides_shapes(name: str) -> bool:
    """Whether a checkpoint can only be read with the value of this field with which it was written."""
    return name.startswith(_SHAPES) and name not in ("model.path", "model.dtype")


def may_change(name: str) -> bool:
    """Whether a resumed run may change the field of this dotted name."""
    groups = tuple(entry for entry in MAY_CHANGE if entry.endswith("."))
    return (name.startswith(groups) or name in MAY_CHANGE) and not name.startswith(MUST_MATCH)
