"""From names and numbers to components. Names turn into functions here and in `algorithm.py`, and nowhere else."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from aem_jax.batch import BatchLayout
from aem_jax.config.algorithms import has_values
from aem_jax.config.run import RunConfig
from aem_jax.distributed.join import expected
from aem_jax.errors import ConfigError
from aem_jax.learner.config import LearnerConfig
from aem_jax.models import CONFIGS, LoraPolicy, ModelConfig, Policy, ValuePolicy
from aem_jax.models.config import ModelChoice
from aem_jax.models.pretrained import read_config, resolve
from aem_jax.overrides import nearest
from aem_jax.sampler.layout import INT8_MERGES
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

_NO_SIZES = ("name", "path")
"""Fields of `ModelChoice` that are no sizes."""

OUTCOMES: Mapping[str, Outcome] = {"return": returned, "success": succeeded}

TRUNCATED: Mapping[str, Callable[[Trajectory], Trajectory | None]] = {
    "learn": keep,
    "mask": mask_loss,
    "drop": lambda t: None,
}
"""What becomes of an episode that ended at a limit."""

LENGTHS: Mapping[str, tuple[Length, str]] = {
    "response": (response_lengths, "response_tokens"),
    "episode": (episode_lengths, "context_tokens"),
}
"""What is too long -> its lengths, and the field of `RolloutConfig` that limits them."""


def selection_rule(config: RunConfig) -> Rule:
    """Which episodes are learnt from."""
    chosen = config.selection
    length, limit = LENGTHS[chosen.overlong_of]
    sizes = {"limit": getattr(config.rollout, limit), "buffer": chosen.overlong_buffer}
    return Rule(
        num_groups=config.rollout.groups_per_step,
        max_rounds=chosen.max_rounds,
        outcome=OUTCOMES[chosen.outcome] if chosen.filter_equal_outcomes else None,
        truncated=TRUNCATED[chosen.truncated],
        penalise=partial(soft_overlong, length=length, penalty=chosen.overlong_penalty, **sizes)
        if chosen.overlong_penalty
        else None,
    )


def model_config(choice: ModelChoice, vocab_size: int, files: Path | None = None) -> ModelConfig:
    """The sizes of the decoder.

    Args:
        choice: a model in files, or a known size and what is changed of it.
        vocab_size: of the tokenizer; for random weights rounded up to a multiple of 64, so that it divides over a mesh.
        files: folder with the config of a model in files, if not the model's own folder.

    Raises:
        ConfigError: no such size, or sizes that do not go together.
        ValueError: files that cannot be used.
    """
    changes = {name: value for name, value in vars(choice).items() if name not in _NO_SIZES and value is not None}
    if choice.path:
        config = read_config(files or resolve(choice.path), changes.pop("dtype", "bfloat16"))
        if vocab_size > config.vocab_size:
            raise ValueError(
                f"--model.path: expected a vocabulary of at least {vocab_size} (the tokenizer's), "
                f"got {config.vocab_size}; are tokenizer and weights of one model?"
            )
        return config
    try:
        return replace(known_model(choice.name), vocab_size=-(-vocab_size // 64) * 64, **changes)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"--model: {error}") from None


def make_policy(config: RunConfig, vocab_size: int, files: Path | None = None) -> Policy | LoraPolicy:
    """What is trained: all of a decoder, or adapters of one. `files` is as in `model_config`.

    Raises:
        ConfigError: as `model_config`.
        ValueError: as `model_config`, or a rank that the decoder's projections cannot have.
    """
    whole = Policy(model_config(config.model, vocab_size, files))
    if not config.lora.rank:
        return whole
    policy = LoraPolicy(whole, config.lora)
    try:
        policy.axes  # noqa: B018
    except ValueError as error:
        raise ConfigError(f"--lora.rank: {error}") from None
    return policy


def trained_policy(config: RunConfig, policy: Policy | LoraPolicy) -> Policy | LoraPolicy | ValuePolicy:
    """What reinforcement learning trains: the policy, with a value head if the algorithm asks for values."""
    return ValuePolicy(policy) if has_values(config.algorithm) else policy


def sampled_policy(config: RunConfig, policy: Policy | LoraPolicy) -> Policy | LoraPolicy:
    """The policy that takes the parameters as `reshard` lays them out."""
    return policy.whole.in_int8 if config.sampling.weights == "int8" else policy.sampled


def warm_start_makes_base(config: RunConfig) -> bool:
    """Whether the warm start trains all weights, on which reinforcement learning then trains adapters."""
    return bool(config.lora.rank) and not config.model.path


def reference_is_base(config: RunConfig) -> bool:
    """Whether the policy before reinforcement learning is that of the frozen weights alone."""
    return bool(config.lora.rank) and (warm_start_makes_base(config) or not config.warmstart.episodes)


def known_model(name: str) -> ModelConfig:
    """A known size by name.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in CONFIGS:
        hint = nearest(name, CONFIGS) or f"; known are {', '.join(CONFIGS)}"
        raise ConfigError(f"--model.name: unknown size {name!r}{hint}")
    return CONFIGS[name]


def row_length(config: RunConfig) -> int:
    """Tokens of a row."""
    return config.batch.row_length or config.rollout.context_tokens


def microbatch_rows(config: RunConfig) -> int:
    """Rows of a microbatch: as given, or as many as its tokens fill.

    Raises:
        ConfigError: the tokens do not fill a row on each part of the mesh.
    """
    tokens, length = config.batch.tokens_per_microbatch, row_length(config)
    if not tokens:
        return config.batch.rows
    parts = max(config.mesh.data, 1) * max(config.mesh.fsdp, 1)
    if rows := tokens // length // parts * parts:
        return rows
    raise ConfigError(
        f"--batch.tokens-per-microbatch: expected at least {parts * length} (mesh.data × mesh.fsdp rows of {length} "
        f"tokens), got {tokens}"
    )


def batch_layout(config: RunConfig, trajectories: int, num_minibatches: int) -> BatchLayout:
    """Sizes for `trajectories` episodes, which always suffice: in the worst case each segment has a row of its own."""
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
    )


def learner(config: RunConfig) -> LearnerConfig:
    """The learner of reinforcement learning, with what depends on the episodes filled in."""
    if config.learner.constant_length:
        return config.learner
    rollout = config.rollout
    said = rollout.max_turns * rollout.response_tokens
    return replace(
        config.learner, constant_length=min(said, rollout.context_tokens) if rollout.context == "append" else said
    )


def warmstart_learner(config: RunConfig) -> LearnerConfig:
    """The learner of the warm start: a schedule of its own, the default optimizer, and the run's use of memory."""
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
    )


def check(config: RunConfig) -> None:
    """Looks for what cannot work before anything is started.

    Raises:
        ConfigError: fields that contradict each other; names both.
    """
    known_model(config.model.name)
    choice = vars(config.model)
    sizes = [name for name in choice if name not in (*_NO_SIZES, "dtype") and choice[name] is not None]
    if config.model.path and sizes:
        raise ConfigError(
            f"--model.{sizes[0].replace('_', '-')}: expected none with --model.path, whose files say the sizes, "
            f"got {choice[sizes[0]]}"
        )
    if config.warmstart.begin_from and (config.model.path or config.lora.rank):
        raise ConfigError(
            "--warmstart.begin-from: expected none with --model.path or --lora.rank, "
            f"got {config.warmstart.begin_from}; a run that trains all weights begins where another such run began"
        )
    servers = len(config.env.urls) or config.env.num_servers
    sessions = servers * config.env.sessions_per_server
    # On several hosts each process plays its share of the slots with servers of its own: the rollout looks.
    if sessions < config.rollout.num_slots and expected(config.runtime) == 1:
        raise ConfigError(
            f"--rollout.num-slots: expected at most {sessions} (servers × --env.sessions-per-server), "
            f"got {config.rollout.num_slots}; raise --env.sessions-per-server or --env.num-servers"
        )
    sampled = config.sampling.temperature or 1.0  # greedy sampling records the distribution at temperature 1
    if config.learner.temperature != sampled:
        raise ConfigError(
            f"--learner.temperature: expected {sampled} with --sampling.temperature {config.sampling.temperature}, "
            f"got {config.learner.temperature}; the learner must see the distribution that was sampled"
        )
    if config.sampling.weights == "int8" and config.lora.rank and not config.lora.merge:
        raise ConfigError(f"--sampling.weights: {INT8_MERGES}")
    if config.learner.kl_coefficient and not config.checkpoint.keep_first and not reference_is_base(config):
        raise ConfigError(
            "--checkpoint.keep-first: expected True with --learner.kl-coefficient above 0, got False;"
            " the reference policy is that of step 0, and a resumed run reads it from there"
        )
    _check_selection(config)
    microbatch_rows(config)
    if row_length(config) < config.rollout.context_tokens:
        raise ConfigError(
            f"--batch.row-length: expected at least --rollout.context-tokens = {config.rollout.context_tokens}, "
            f"got {row_length(config)}"
        )
    if config.metrics.wandb_project and find_spec("wandb") is None:
        raise ConfigError("--metrics.wandb-project: wandb is not installed; pip install 'aem_jax[wandb]'")


def _check_selection(config: RunConfig) -> None:
    chosen, rollout = config.selection, config.rollout
    if chosen.filter_equal_outcomes and rollout.group_size == 1:
        raise ConfigError(
            "--selection.filter-equal-outcomes: expected --rollout.group-size of at least 2, got 1; the outcomes "
            "of a group of one are always equal"
        )
    limit = LENGTHS[chosen.overlong_of][1]
    if chosen.overlong_buffer > getattr(rollout, limit):
        raise ConfigError(
            f"--selection.overlong-buffer: expected at most --rollout.{limit.replace('_', '-')} = "
            f"{getattr(rollout, limit)}, got {chosen.overlong_buffer}"
        )
    if chosen.overlong_penalty and chosen.overlong_of == "episode" and rollout.context == "window":
        raise ConfigError(
            "--selection.overlong-of: expected response with --rollout.context window, got episode; there no episode "
            "is too long, since each of its prompts is built anew"
        )
