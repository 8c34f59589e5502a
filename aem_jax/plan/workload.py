"""A run's sizes, as a plan needs them: what is computed at a time, and what lies in memory beside it."""

import math
import os
from dataclasses import dataclass
from pathlib import Path

from aem_jax.batch import BatchLayout
from aem_jax.config import components
from aem_jax.config.algorithms import has_values
from aem_jax.config.run import RunConfig
from aem_jax.errors import ConfigError
from aem_jax.models import ModelConfig
from aem_jax.models.config import published
from aem_jax.models.lora import LoraConfig, targets
from aem_jax.models.pretrained import read_config

MOMENTS = {"float32": 8, "bfloat16": 4}
"""`LearnerConfig.moments` -> bytes of both moments of a parameter."""


@dataclass(frozen=True)
class Workload:
    """Sizes of one training step.

    Attributes:
        model: of the decoder.
        layout: of a batch that always suffices: every episode as long as it may get.
        slots: that decode at once: those of one cohort.
        cohorts: sets of slots, each with a cache of its own.
        capacity: tokens of a slot.
        slack: places behind them for a chunk that is being written.
        prompt_rows: rows of the cache in which prompts are computed.
        prompt_tokens: tokens of such a row.
        decode_chunk: tokens that one call decodes.
        extend_chunk: tokens that one call appends.
        head_chunk: positions of a row whose logits exist at one time.
        remat: what the backward pass computes again.
        ratio: of which the loss is, and which is measured before it: of tokens, responses or trajectories.
        reference: whether a reference policy lies beside the learner's.
        value: whether a value head is trained.
        moments: bytes that Adam keeps of each trained parameter.
        lora: adapters, of which alone there are masters; of rank 0 if all is trained.
        int8: whether layers' matrices are sampled from in 8 bits.
        int8_cache: whether keys and values are cached in 8 bits.
    """

    model: ModelConfig
    layout: BatchLayout
    slots: int
    cohorts: int
    capacity: int
    slack: int
    prompt_rows: int
    prompt_tokens: int
    decode_chunk: int
    extend_chunk: int
    head_chunk: int
    remat: str
    ratio: str
    reference: bool
    value: bool
    moments: int
    lora: LoraConfig
    int8: bool
    int8_cache: bool

    @property
    def trained(self) -> int:
        """Parameters that are trained: all, or those of the adapters; and those of a value head."""
        head = (self.model.hidden_size + 1) * self.value
        if not self.lora.rank:
            return self.model.num_parameters + head
        chosen = targets(self.model, self.lora).values()
        sides = sum(math.prod(each.inputs) + math.prod(each.outputs) for each in chosen)
        return self.model.num_layers * self.lora.rank * sides + head

    @property
    def microbatch_tokens(self) -> int:
        """Tokens of one microbatch."""
        return self.layout.rows * self.layout.row_length

    @property
    def rounds(self) -> int:
        """Microbatches of an optimizer step, when all of the batch is full."""
        return max((self.layout.num_microbatches - self.layout.num_minibatches + 1) // self.layout.num_minibatches, 1)

    @property
    def cached_tokens(self) -> int:
        """Places in all caches together."""
        slots = self.slots * self.cohorts * (self.capacity + self.slack)
        return slots + self.prompt_rows * (self.prompt_tokens + self.slack)

    @property
    def token_bytes(self) -> int:
        """Bytes that a token takes in a cache: its keys and values, in 8 bits with a float32 scale for each head."""
        model = self.model
        of_a_head = model.head_dim + 4 if self.int8_cache else model.head_dim * (2 if model.dtype == "bfloat16" else 4)
        return 2 * model.num_layers * model.num_kv_heads * of_a_head


def workload(config: RunConfig, prompt_multiple: int = 1, model: ModelConfig | None = None) -> Workload:
    """The sizes that a run's config means.

    Args:
        config: the run's.
        prompt_multiple: the mesh's data × fsdp, of which rows of prompts are a multiple.
        model: the decoder's sizes where they are known; else what the config says of them.

    Raises:
        ConfigError: a model that is not known here.
    """
    rollout, learner = config.rollout, config.learner
    slots = rollout.num_slots // rollout.num_cohorts
    prompt_rows = -(-slots // rollout.group_size)
    return Workload(
        model=model or planned_model(config),
        layout=components.batch_layout(config, rollout.groups_per_step * rollout.group_size, learner.num_minibatches),
        slots=slots,
        cohorts=rollout.num_cohorts,
        capacity=rollout.context_tokens,
        slack=rollout.slack,
        prompt_rows=prompt_rows + -prompt_rows % prompt_multiple,
        prompt_tokens=rollout.prompt_tokens,
        decode_chunk=rollout.decode_chunk,
        extend_chunk=max(rollout.extend_buckets),
        head_chunk=learner.head_chunk,
        remat=learner.remat,
        ratio=learner.ratio,
        reference=learner.kl_coefficient > 0 and not components.reference_is_frozen_weights(config),
        value=has_values(config.algorithm),
        moments=MOMENTS[learner.moments],
        lora=config.lora,
        int8=config.sampling.weights == "int8",
        int8_cache=config.sampling.cache == "int8",
    )


def planned_model(config: RunConfig) -> ModelConfig:
    """The decoder's sizes without its files: of a model on the Hub they are known, nothing is downloaded.

    Raises:
        ConfigError: no folder, and no published model whose sizes are known.
    """
    choice = config.model
    if not choice.path:
        tiny = choice.name == "tiny"
        vocab = config.tokenizer.vocab_size if tiny else components.known_model(choice.name).vocab_size
        return components.model_config(choice, vocab)
    folder = Path(os.path.expanduser(choice.path))  # as it is where there is no such user
    try:
        if folder.is_dir():
            return read_config(folder, choice.dtype or "bfloat16")
    except (ValueError, OSError) as error:
        raise ConfigError(f"--model.path: {error}") from None
    if found := published(choice.path):
        return found
    raise ConfigError(
        f"--model.path: expected a folder or a published model of known size, got {choice.path!r}; "
        "give its sizes with --model.name"
    )
