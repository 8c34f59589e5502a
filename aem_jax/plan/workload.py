"""The sizes of a run that determine its cost: of its programs, and of the other arrays in memory."""

import math
import os
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import jax
import jax.numpy as jnp

from aem_jax.batch import BatchLayout
from aem_jax.config import components
from aem_jax.config.algorithms import has_values
from aem_jax.config.run import RunConfig
from aem_jax.errors import ConfigError
from aem_jax.gguf_file import is_gguf
from aem_jax.models import ModelConfig
from aem_jax.models.config import TINY, published
from aem_jax.models.kv_cache import init_cache
from aem_jax.models.lora import LoraConfig, targets
from aem_jax.models.pretrained import read_config

MOMENTS = {"float32": 8, "bfloat16": 4}
"""`LearnerConfig.moments` -> bytes of both moments of a parameter."""


@dataclass(frozen=True)
class Workload:
    """Sizes of one training step.

    Attributes:
        model: of the decoder.
        layout: of a batch with room for all episodes at their maximum length.
        slots: that decode at once, those of one cohort.
        cohorts: sets of slots, each with a cache of its own.
        capacity: tokens of a slot.
        slack: further positions, for a chunk that is being written.
        prompt_rows: rows of the prompt cache.
        prompt_tokens: tokens of such a row.
        decode_chunk: tokens of one call of decode.
        extend_chunk: tokens of one call of extend.
        head_chunk: positions of a row with logits at one time.
        remat: the recomputation of the backward pass.
        ratio: the policy ratio of the loss: of tokens, responses or trajectories.
        reference: whether there is a reference policy besides the learner's.
        value: whether a value head is trained.
        moments: bytes of Adam's moments of each trained parameter.
        lora: the adapters, the only trained parameters; rank 0 if all weights are trained.
        int8: whether the sampler has the layers' matrices in 8 bits.
        int8_cache: whether the KV cache is in 8 bits.
        ring_slack: of the KV cache, see `init_cache`: the slack where slots only grow, else None.
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
    ring_slack: int | None

    @property
    def trained(self) -> int:
        """Number of trained parameters: all, or those of the adapters; and those of a value head."""
        head = (self.model.hidden_size + 1) * self.value
        if not self.lora.rank:
            return self.model.num_parameters + head
        rows = targets(self.model, self.lora).values()
        side = lambda row: math.prod(row.experts) * (math.prod(row.inputs) + math.prod(row.outputs))
        sides = sum(map(side, rows))
        return self.model.num_layers * self.lora.rank * sides + head

    @property
    def microbatch_tokens(self) -> int:
        """Tokens of one microbatch."""
        return self.layout.rows * self.layout.row_length

    @property
    def rounds(self) -> int:
        """Microbatches of an optimizer step of a full batch."""
        return max((self.layout.num_microbatches - self.layout.num_minibatches + 1) // self.layout.num_minibatches, 1)

    def cache_bytes(self, slots: int, tokens: int) -> int:
        """Bytes of a KV cache of slots with `tokens` tokens each, and of the positions for a chunk behind them; with
        the record of tokens' experts, if there is one."""
        make = partial(
            init_cache, self.model, slots, tokens + self.slack, int8=self.int8_cache, ring_slack=self.ring_slack
        )
        return jax.eval_shape(make).num_bytes + slots * (tokens + self.slack) * self.record_bytes

    @property
    def record_bytes(self) -> int:
        """Bytes of the record of a token's experts, layers × experts per token; 0 if they are not recorded."""
        return self.layout.experts * jnp.dtype(self.layout.experts_dtype).itemsize

    @property
    def cohort_cache_bytes(self) -> int:
        """Bytes of one cohort's cache."""
        return self.cache_bytes(self.slots, self.capacity)

    @cached_property
    def all_cache_bytes(self) -> int:
        """Bytes of all KV caches: those of the slots and that of first prompts."""
        return self.cohorts * self.cohort_cache_bytes + self.cache_bytes(self.prompt_rows, self.prompt_tokens)

    @property
    def read_bytes(self) -> int:
        """Bytes of the keys and values that one token of a full slot attends to."""
        of_layer = jax.eval_shape(partial(init_cache, self.model, 1, 1, int8=self.int8_cache)).num_bytes
        attended = sum(min(window or self.capacity, self.capacity) for window in self.model.windows)
        return of_layer * attended // self.model.num_layers


def workload(config: RunConfig, prompt_multiple: int = 1, model: ModelConfig | None = None) -> Workload:
    """The sizes of a run, from its config.

    Args:
        config: the run's.
        prompt_multiple: the mesh's data × fsdp; the rows of the prompt cache are a multiple of it.
        model: the decoder's sizes; by default those of the config.

    Raises:
        ConfigError: a model of unknown size.
    """
    rollout, learner = config.rollout, config.learner
    slots = rollout.num_slots // rollout.num_cohorts
    prompt_rows = -(-slots // rollout.group_size)
    model, episodes = model or planned_model(config), rollout.groups_per_step * rollout.group_size
    return Workload(
        model=model,
        layout=components.batch_layout(config, episodes, learner.num_minibatches, model),
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
        ring_slack=rollout.slack if rollout.context == "append" else None,
    )


def planned_model(config: RunConfig) -> ModelConfig:
    """The decoder's sizes, without a download: those of published models are known.

    Raises:
        ConfigError: neither a folder or GGUF file nor a published model of known size.
    """
    choice = config.model
    if not choice.path:
        tiny = choice.name in TINY
        vocab = config.tokenizer.vocab_size if tiny else components.known_model(choice.name).vocab_size
        return components.model_config(choice, vocab)
    source = Path(os.path.expanduser(choice.path))  # unchanged if there is no such user
    try:
        if source.is_dir() or is_gguf(source):
            return read_config(source, choice.dtype or "bfloat16")
    except (ValueError, OSError) as error:
        raise ConfigError(f"--model.path: {error}") from None
    if model := published(choice.path):
        return model
    raise ConfigError(
        f"--model.path: expected a folder, a GGUF file or a published model of known size, got {choice.path!r}; "
        "give its sizes with --model.name"
    )
