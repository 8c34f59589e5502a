"""From names and numbers to components. Only this module and `algorithms.py` map names to functions."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from aem_jax.batch import BatchLayout
from aem_jax.config.algorithms import has_values
from aem_jax.config.run import RunConfig
from aem_jax.envs.harness.suite import HarnessConfig
from aem_jax.errors import ConfigError
from aem_jax.gateway.requests import SampledAs
from aem_jax.gateway.session import Limits
from aem_jax.learner.config import LearnerConfig
from aem_jax.models import CONFIGS, ModelConfig, Policy
from aem_jax.models.config import ModelChoice
from aem_jax.models.parameters import Mixture
from aem_jax.models.pretrained import read_config, resolve
from aem_jax.overrides import nearest
from aem_jax.sampler import SamplingConfig
from aem_jax.selection import (
    Length,
    Outcome,
    Rule,
    episode_lengths,
    keep,
    mask_loss,
    response_lengths,
    returned,
    soft_overlong,
    succeeded,
)
from aem_jax.trajectory import Trajectory

NO_SIZES = ("name", "path")
"""Fields of `ModelChoice` that are no sizes."""

OUTCOMES: Mapping[str, Outcome] = {"return": returned, "success": succeeded}

TRUNCATED: Mapping[str, Callable[[Trajectory], Trajectory | None]] = {
    "learn": keep,
    "mask": mask_loss,
    "drop": lambda t: None,
}
"""Treatment of an episode that ended at a limit."""

LENGTHS: Mapping[str, tuple[Length, str]] = {
    "response": (response_lengths, "response_tokens"),
    "episode": (episode_lengths, "context_tokens"),
}
"""What an overlong penalty measures -> its lengths, and the field of `RolloutConfig` that limits them."""


def selection_rule(config: RunConfig) -> Rule:
    """The rule that selects the episodes to learn from."""
    selection = config.selection
    length, limit = LENGTHS[selection.overlong_of]
    sizes = {"limit": getattr(config.rollout, limit), "buffer": selection.overlong_buffer}
    return Rule(
        num_groups=config.rollout.groups_per_step,
        max_rounds=selection.max_rounds,
        outcome=OUTCOMES[selection.outcome] if selection.filter_equal_outcomes else None,
        truncated=TRUNCATED[selection.truncated],
        penalise=partial(soft_overlong, length=length, penalty=selection.overlong_penalty, **sizes)
        if selection.overlong_penalty
        else None,
    )


def model_config(choice: ModelChoice, vocab_size: int, files: Path | None = None) -> ModelConfig:
    """The sizes of the decoder.

    Args:
        choice: a model in files, or a known size with changes.
        vocab_size: of the tokenizer; for random weights rounded up to a multiple of 64, so that it divides over a mesh.
        files: folder with the config of a model in files, if it is not the model's own folder or file.

    Raises:
        ConfigError: an unknown size, or sizes that do not go together.
        ValueError: files that cannot be used.
    """
    changes = {name: value for name, value in vars(choice).items() if name not in NO_SIZES and value is not None}
    if choice.path:
        config = read_config(files or resolve(choice.path), changes.pop("dtype", "bfloat16"))
        if vocab_size > config.vocab_size:
            raise ValueError(
                f"--model.path: expected a vocabulary of at least {vocab_size} (the tokenizer's), "
                f"got {config.vocab_size}; are tokenizer and weights of one model?"
            )
        return config
    try:
        known = known_model(choice.name)
        known = known.with_layers(changes.pop("num_layers", known.num_layers))
        return replace(known, vocab_size=-(-vocab_size // 64) * 64, **changes)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"--model: {error}") from None


def check_sizes(choice: ModelChoice) -> None:
    """Refuses sizes for a model whose files give them.

    Raises:
        ConfigError: such a size.
    """
    sizes = [name for name, value in vars(choice).items() if name not in (*NO_SIZES, "dtype") and value is not None]
    if choice.path and sizes:
        raise ConfigError(
            f"--model.{sizes[0].replace('_', '-')}: expected none with --model.path, whose files give the sizes, "
            f"got {getattr(choice, sizes[0])}; leave it out"
        )


def make_policy(config: RunConfig, vocab_size: int, files: Path | None = None) -> Policy:
    """The policy that reinforcement learning trains. `files` is as in `model_config`.

    Raises:
        ConfigError: as `model_config`.
        ValueError: as `model_config`, or a rank that the decoder's projections cannot have.
    """
    lora = config.lora if config.lora.rank else None
    policy = Policy(model_config(config.model, vocab_size, files), lora, value=has_values(config.algorithm))
    try:
        policy.axes  # noqa: B018
    except ValueError as error:
        raise ConfigError(f"--lora.rank: {error}") from None
    return policy


def sampled_policy(sampling: SamplingConfig, policy: Policy) -> Policy:
    """The policy that samples with the parameters that `reshard` returns."""
    return policy.quantized if sampling.weights == "int8" else policy.sampled


def warm_start_makes_frozen_weights(config: RunConfig) -> bool:
    """Whether the warm start trains all weights, which then are the frozen weights of a LoRA run."""
    return bool(config.lora.rank) and not config.model.path


def reference_is_frozen_weights(config: RunConfig) -> bool:
    """Whether the frozen weights alone are the policy before reinforcement learning."""
    return bool(config.lora.rank) and (warm_start_makes_frozen_weights(config) or not config.warmstart.episodes)


def known_model(name: str, option: str = "--model.name") -> ModelConfig:
    """A known size by name; `option` is the one that named it.

    Raises:
        ConfigError: no name, or an unknown one.
    """
    if not name:
        raise ConfigError(
            "expected a model, got none; add the preset of one, as in --preset alfworld-paper qwen2.5-1.5b, or give "
            "--model.path or --model.name"
        )
    if name not in CONFIGS:
        hint = nearest(name, CONFIGS) or f"; known are {', '.join(CONFIGS)}"
        raise ConfigError(f"{option}: unknown size {name!r}{hint}")
    return CONFIGS[name]


def row_length(config: RunConfig) -> int:
    """Tokens of a row."""
    return config.batch.row_length or config.rollout.context_tokens


def microbatch_rows(config: RunConfig) -> int:
    """Rows of a microbatch: `batch.rows`, or `batch.tokens_per_microbatch` / row length; the mesh divides them.

    Raises:
        ConfigError: too few tokens for one row on each part of the mesh.
    """
    tokens, length = config.batch.tokens_per_microbatch, row_length(config)
    if not tokens:
        return config.batch.rows
    parts = max(config.mesh.data, 1) * max(config.mesh.fsdp, 1) * max(config.mesh.expert, 1)
    if rows := tokens // length // parts * parts:
        return rows
    raise ConfigError(
        f"--batch.tokens-per-microbatch: expected at least {parts * length} (mesh.data × mesh.fsdp rows of {length} "
        f"tokens), got {tokens}"
    )


def replayed_mixture(config: RunConfig, model: ModelConfig | None) -> Mixture | None:
    """The mixture of experts whose routing the sampler records and the learner replays, if any."""
    return model.mixture if model is not None and config.learner.routing_replay else None


def batch_layout(
    config: RunConfig, trajectories: int, num_minibatches: int, model: ModelConfig | None = None
) -> BatchLayout:
    """Sizes that hold any `trajectories` episodes: in the worst case each segment has a row of its own.

    Args:
        config: the run's.
        trajectories: number of episodes.
        num_minibatches: optimizer steps of an epoch.
        model: of episodes that the run's sampler played; None without recorded experts.
    """
    mixture = replayed_mixture(config, model)
    recorded = {}
    if model is not None and mixture:
        width = model.num_layers * mixture.experts_per_token
        recorded = {"experts": width, "experts_dtype": mixture.record_dtype}
    rollout, rows = config.rollout, microbatch_rows(config)
    responses = trajectories * rollout.max_turns
    segments = trajectories if rollout.context == "append" else responses
    return BatchLayout(
        num_microbatches=-(-segments // rows) + num_minibatches - 1,
        rows=rows,
        row_length=row_length(config),
        max_responses=responses,
        max_trajectories=trajectories,
        num_minibatches=num_minibatches,
        **recorded,
    )


def learner(config: RunConfig) -> LearnerConfig:
    """The config of the learner, with `constant_length` filled in from the episodes."""
    if config.learner.constant_length:
        return config.learner
    rollout = config.rollout
    length = rollout.max_turns * rollout.response_tokens
    if rollout.context == "append":
        length = min(length, rollout.context_tokens)
    return replace(config.learner, constant_length=length)


def warmstart_learner(config: RunConfig) -> LearnerConfig:
    """The learner of the warm start: its own schedule, the default optimizer, and the run's settings of memory."""
    settings, trained = config.warmstart, config.learner
    return LearnerConfig(
        learning_rate=settings.learning_rate,
        schedule="cosine",
        warmup_steps=settings.steps // 10,
        total_steps=settings.steps,
        temperature=trained.temperature,
        head_chunk=trained.head_chunk,
        remat=trained.remat,
        attention=trained.attention,
        moments=trained.moments,
        balance_coefficient=trained.balance_coefficient,
    )


def gateway(config: RunConfig) -> tuple[SampledAs, Limits]:
    """How requests of agents are sampled, and the bounds of an episode."""
    rollout, sampling = config.rollout, config.sampling
    lenient = isinstance(config.environment, HarnessConfig) and config.environment.lenient
    return (
        SampledAs(sampling.temperature, sampling.top_p, lenient),
        Limits(rollout.max_turns, rollout.context_tokens),
    )
