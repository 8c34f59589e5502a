"""One token from each row of logits, with its log-probability and the distribution's entropy."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from aem_jax.models.config import dtype_name

Array = jax.Array

SampleToken = Callable[[Array, Array], tuple[Array, Array, Array]]
"""(logits f32[S,V], uniforms f32[S,2]) -> tokens i32[S], logprobs f32[S], entropies f32[S]."""

Constrain = Callable[[Array], Array]
"""Returns its argument with a sharding constraint."""

SAMPLING_BLOCK = 64
"""Tokens of the vocabulary whose weights are summed before one of them is drawn."""


@dataclass(frozen=True)
class SamplingConfig:
    """The distribution that tokens are sampled from."""

    temperature: float = 1.0
    """Divides the logits; 0 is greedy. Logprobs and entropies are at this temperature."""
    top_k: int = 0
    """Samples from the k most likely tokens; 0 (to train): all."""
    top_p: float = 1.0
    """Samples from the smallest set of tokens of probability p; 1 (to train): all."""
    weights: Literal["model", "int8"] = "model"
    """Weights to sample from: in the model's dtype, or with the matrices of layers in int8 and a scale for each output,
    half the bytes of bfloat16. The policy then differs from the learner's; --learner.importance-cap corrects for it."""
    cache: Literal["model", "int8"] = "model"
    """Cached keys and values: in the model's dtype, or in int8 with a scale for each token and KV head, about half the
    bytes of bfloat16. As with int8 weights, --learner.importance-cap corrects for it."""
    attention: Literal["auto", "xla"] = "auto"
    """Attention of decode steps: xla, or the device's kernel if it fits (auto)."""

    def __post_init__(self) -> None:
        if self.attention not in ("auto", "xla"):
            raise ValueError(f"expected attention 'auto' or 'xla', got {self.attention!r}")
        if self.temperature < 0:
            raise ValueError(f"expected temperature >= 0, got {self.temperature}; 0 is greedy")
        if self.top_k < 0:
            raise ValueError(f"expected top_k >= 0, got {self.top_k}; 0 keeps every token")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"expected 0 < top_p <= 1, got {self.top_p}; 1 keeps every token")
        for name in ("weights", "cache"):
            object.__setattr__(self, name, dtype_name(getattr(self, name), ("model", "int8"), name))


def uniforms(prng: Array, indices: Array) -> Array:
    """The random numbers of sampled tokens: the key of the episode, folded with the index of each token.

    Args:
        prng: u32[S,2], key data of the episodes.
        indices: i32[S,G], index of each token among those that the episode samples.

    Returns:
        f32[G,S,2] in [0, 1).
    """
    one = lambda key, index: jax.random.uniform(jax.random.fold_in(key, index), (2,))
    return jax.vmap(jax.vmap(one), in_axes=(None, 1))(jax.random.wrap_key_data(prng), indices)


def categorical(weights: Array, uniforms: Array, constrain: Constrain = lambda x: x) -> Array:
    """Samples an index from each row of unnormalised `weights` f32[S,V], by inverting two short cumulative sums.

    First a block of 64 tokens is drawn by its mass, then a token inside it, with one uniform each. That takes two
    random numbers a row instead of V and no cumulative sum over V. Float32 resolution is *inside* each block, so rare
    tokens keep their probability.

    Args:
        weights: f32[S,V].
        uniforms: f32[S,2].
        constrain: as in `make_sample_token`.
    """
    slots, vocab = weights.shape
    blocks = jnp.pad(weights, ((0, 0), (0, -vocab % SAMPLING_BLOCK))).reshape(slots, -1, SAMPLING_BLOCK)

    def invert(masses: Array, uniform: Array) -> Array:
        masses = constrain(masses)  # else jax 0.12 sums over a split axis one element after the other
        cumulative = jnp.cumsum(masses, axis=-1)
        index = jnp.sum(cumulative <= uniform[:, None] * cumulative[:, -1:], axis=-1)
        last = masses.shape[-1] - 1 - jnp.argmax(jnp.flip(masses > 0, axis=-1), axis=-1)
        return jnp.minimum(index, last)  # rounding must not go past the last token of positive weight

    block = invert(jnp.sum(blocks, axis=-1), uniforms[:, 0])
    inside = invert(jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0], uniforms[:, 1])
    return block * SAMPLING_BLOCK + inside


def make_sample_token(config: SamplingConfig, constrain: Constrain = lambda x: x) -> SampleToken:
    """Builds the sampling function of a config.

    Logprobs and entropies are those of `softmax(logits / temperature)` *before* top-k and top-p. The learner
    differentiates this distribution, so its log-probabilities can be compared token by token. Greedy reports those at
    temperature 1.

    Args:
        config: the distribution.
        constrain: gives the few sums f32[S,V/64] a sharding without a split of the second axis.
    """
    greedy = config.temperature == 0.0

    def sample_token(logits: Array, uniforms: Array) -> tuple[Array, Array, Array]:
        logits = logits if greedy else logits / config.temperature
        shifted = logits - jnp.max(logits, axis=-1, keepdims=True)
        weights = jnp.exp(shifted)
        total = jnp.sum(weights, axis=-1)
        log_total = jnp.log(total)
        entropies = log_total - jnp.sum(jnp.where(weights > 0, weights * shifted, 0.0), axis=-1) / total
        if greedy:
            tokens = jnp.argmax(logits, axis=-1)
        else:
            tokens = categorical(_keep(weights, total, config), uniforms, constrain)
        logprobs = jnp.take_along_axis(shifted, tokens[:, None], axis=-1)[:, 0] - log_total
        return tokens.astype(jnp.int32), logprobs, entropies

    return sample_token


def _keep(weights: Array, total: Array, config: SamplingConfig) -> Array:
    """Sets the weights outside top-k and top-p to zero; ties at the edge are kept.

    No sort: a weight is kept if fewer than k are larger, and if the larger ones sum to less than p of all (of the k
    largest, if both are set). A search over thresholds finds the edge.
    """
    if config.top_k == 0 and config.top_p == 1.0:
        return weights
    floor, mass = jnp.zeros(weights.shape[0], weights.dtype), total
    if config.top_k:
        floor = _edge(weights, jnp.full(weights.shape[0], config.top_k, jnp.int32), jnp.int32)
        above = weights > floor[:, None]
        ties = config.top_k - jnp.sum(above, axis=-1, dtype=jnp.int32)  # only so many of the ties count
        mass = jnp.sum(weights, axis=-1, where=above) + ties * floor
    if config.top_p < 1.0:
        # With k beyond the vocabulary there are no ties to fill it up with, and the floor is 0.
        floor = jnp.maximum(floor, _edge(weights, config.top_p * mass, weights.dtype))
    return jnp.where(weights >= floor[:, None], weights, 0.0)


def _edge(weights: Array, limit: Array, dtype: DTypeLike) -> Array:
    """The least t ≥ 0 of each row such that the weights above t stay below `limit`, in mass or in number.

        t = min { t : Σ_{w > t} m(w) < limit },  m(w) = w for a floating dtype, 1 for an integer one

    Floats ≥ 0 are ordered like their bits, so a search over the bits finds t exactly: one of the weights, or 0. Each of
    its 16 passes over the weights tries three thresholds and settles two bits; a bisection would take 31 passes.
    """
    bits = lambda x: jax.lax.bitcast_convert_type(x, jnp.int32)
    is_count = jnp.issubdtype(dtype, jnp.integer)

    def is_below(threshold: Array) -> Array:
        above = weights > jax.lax.bitcast_convert_type(threshold, jnp.float32)[:, None]
        return jnp.sum(above if is_count else jnp.where(above, weights, 0.0), axis=-1, dtype=dtype) < limit

    def narrow(_: int, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends  # t is above low and at most high
        width = high - low
        thresholds = [jnp.maximum(low + width // 4 * part + width % 4 * part // 4, 0) for part in (1, 2, 3)]
        for threshold, below in zip(thresholds, [is_below(threshold) for threshold in thresholds], strict=True):
            low = jnp.where(below, low, threshold)
            high = jnp.where(below, jnp.minimum(high, threshold), high)
        return low, high

    top = bits(jnp.max(weights, axis=-1))
    _, high = jax.lax.fori_loop(0, 16, narrow, (jnp.full_like(top, -1), top))
    return jax.lax.bitcast_convert_type(high, jnp.float32)
