"""One token from each row of logits, with its log-probability and the distribution's entropy."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from aem_jax.models.config import dtype_name

Array = jax.Array

Draw = Callable[[Array, Array], tuple[Array, Array, Array]]
"""(logits f32[S,V], uniforms f32[S,2]) -> tokens i32[S], logprobs f32[S], entropies f32[S]."""

_BLOCK = 64


@dataclass(frozen=True)
class SamplingConfig:
    """How tokens are drawn."""

    temperature: float = 1.0
    """Divides the logits; 0 takes the most likely token. Logprobs and entropies are those at this temperature."""
    top_k: int = 0
    """Draw only from the k most likely tokens; 0 means all."""
    top_p: float = 1.0
    """Draw only from the smallest set of tokens whose probability reaches p; 1 means all."""
    weights: Literal["model", "int8"] = "model"
    """Weights to sample from: in the model's dtype, or layers' matrices in int8 with a scale for each output, half the
    bytes of bfloat16. Its policy is not quite the learner's: --learner.importance-cap corrects for that."""
    cache: Literal["model", "int8"] = "model"
    """Keys and values of earlier tokens: in the model's dtype, or in int8 with a scale for each token of each key head,
    which is about half the bytes of bfloat16. As with weights in int8, --learner.importance-cap corrects for that."""

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"expected temperature >= 0, got {self.temperature}; 0 is greedy")
        if self.top_k < 0:
            raise ValueError(f"expected top_k >= 0, got {self.top_k}; 0 keeps every token")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"expected 0 < top_p <= 1, got {self.top_p}; 1 keeps every token")
        for name in ("weights", "cache"):
            object.__setattr__(self, name, dtype_name(getattr(self, name), ("model", "int8"), name))


def uniforms(prng: Array, indices: Array) -> Array:
    """The random numbers that an episode draws its tokens with: its key, folded with the index of each token.

    Args:
        prng: u32[S,2], key data of the episodes.
        indices: i32[S,G], which tokens of the episode.

    Returns:
        f32[G,S,2] in [0, 1).
    """
    one = lambda key, index: jax.random.uniform(jax.random.fold_in(key, index), (2,))
    return jax.vmap(jax.vmap(one), in_axes=(None, 1))(jax.random.wrap_key_data(prng), indices)


def categorical(weights: Array, uniforms: Array) -> Array:
    """Draws an index from each row of unnormalised `weights` f32[S,V], by inverting two short cumulative sums.

    First a block of 64 tokens is drawn by its mass, then a token inside it, each with a uniform of its own: two random
    numbers a row instead of V, no cumulative sum over V, and float32 resolution *inside* each block, so rare tokens
    keep their odds.
    """
    slots, vocab = weights.shape
    blocks = jnp.pad(weights, ((0, 0), (0, -vocab % _BLOCK))).reshape(slots, -1, _BLOCK)

    def invert(masses: Array, uniform: Array) -> Array:
        cumulative = jnp.cumsum(masses, axis=-1)
        index = jnp.sum(cumulative <= uniform[:, None] * cumulative[:, -1:], axis=-1)
        last = masses.shape[-1] - 1 - jnp.argmax(jnp.flip(masses > 0, axis=-1), axis=-1)
        return jnp.minimum(index, last)  # rounding must not reach past the last possible one

    block = invert(jnp.sum(blocks, axis=-1), uniforms[:, 0])
    inside = invert(jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0], uniforms[:, 1])
    return block * _BLOCK + inside


def make_draw(config: SamplingConfig) -> Draw:
    """Builds the drawing function.

    Logprobs and entropies are those of `softmax(logits / temperature)` *before* top-k and top-p: that is the
    distribution that the learner differentiates, and its log-probabilities can be compared token by token. Greedy
    reports those at temperature 1.
    """
    greedy = config.temperature == 0.0

    def draw(logits: Array, uniforms: Array) -> tuple[Array, Array, Array]:
        logits = logits if greedy else logits / config.temperature
        shifted = logits - jnp.max(logits, axis=-1, keepdims=True)
        weights = jnp.exp(shifted)
        total = jnp.sum(weights, axis=-1)
        log_total = jnp.log(total)
        entropies = log_total - jnp.sum(jnp.where(weights > 0, weights * shifted, 0.0), axis=-1) / total
        if greedy:
            tokens = jnp.argmax(logits, axis=-1)
        else:
            tokens = categorical(_keep(weights, total, config), uniforms)
        logprobs = jnp.take_along_axis(shifted, tokens[:, None], axis=-1)[:, 0] - log_total
        return tokens.astype(jnp.int32), logprobs, entropies

    return draw


def _keep(weights: Array, total: Array, config: SamplingConfig) -> Array:
    """Sets the weights outside top-k and top-p to zero; ties at the edge are kept.

    No sort: a weight is kept if the larger ones are fewer than k, and if together they do not reach p of all (of the k
    largest, if both are given). Its edge is found by bisection.
    """
    if config.top_k == 0 and config.top_p == 1.0:
        return weights
    floor, mass = jnp.zeros(weights.shape[0], weights.dtype), total
    if config.top_k:
        floor = _edge(weights, jnp.full(weights.shape[0], config.top_k, jnp.int32), jnp.int32)
        above = weights > floor[:, None]
        ties = config.top_k - jnp.sum(above, axis=-1, dtype=jnp.int32)  # of which no more than these count
        mass = jnp.sum(weights, axis=-1, where=above) + ties * floor
    if config.top_p < 1.0:
        # With k beyond the vocabulary there are no ties to fill it up with, and the floor is 0.
        floor = jnp.maximum(floor, _edge(weights, config.top_p * mass, weights.dtype))
    return jnp.where(weights >= floor[:, None], weights, 0.0)


def _edge(weights: Array, limit: Array, dtype: DTypeLike) -> Array:
    """The least t ≥ 0 of each row for which what is larger than t stays below `limit`: in mass, or in number.

        t = min { t : Σ_{w > t} m(w) < limit },  m(w) = w for a floating dtype, 1 for an integer one

    Floats ≥ 0 are ordered as their bits are, so 31 halvings of the bits find t exactly: it is one of the weights, or 0.
    """
    bits = lambda x: jax.lax.bitcast_convert_type(x, jnp.int32)
    is_count = jnp.issubdtype(dtype, jnp.integer)

    def halve(_: int, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends  # t is above low and at most high
        middle = jnp.maximum(low + (high - low) // 2, 0)
        above = weights > jax.lax.bitcast_convert_type(middle, jnp.float32)[:, None]
        found = jnp.sum(above if is_count else jnp.where(above, weights, 0.0), axis=-1, dtype=dtype)
        return jnp.where(found < limit, low, middle), jnp.where(found < limit, middle, high)

    top = bits(jnp.max(weights, axis=-1))
    _, high = jax.lax.fori_loop(0, 31, halve, (jnp.full_like(top, -1), top))
    return jax.lax.bitcast_convert_type(high, jnp.float32)
