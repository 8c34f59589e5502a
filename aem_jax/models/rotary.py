"""Rotary positions: the angles by which a layer turns queries and keys, and their scalings for longer contexts.

    angle(position, i) = position * frequency_i,   frequency_i = theta^(-2i / head_dim)

A scaling divides some or all frequencies, so that a model reads contexts that are longer than those of its pretraining.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3's scaling: low frequencies are divided."""

    factor: float
    """Divisor of low frequencies."""
    low_freq_factor: float
    """Frequencies with at most this many turns in the original context are low."""
    high_freq_factor: float
    """Frequencies with at least this many turns are not divided; between the two bounds both are mixed."""
    original_context: int
    """Tokens of the original context."""

    def __post_init__(self) -> None:
        if not self.factor >= 1 or not 0 < self.low_freq_factor < self.high_freq_factor or self.original_context < 1:
            raise ValueError(
                f"expected a rope factor >= 1, 0 < low_freq_factor < high_freq_factor and an original context >= 1, "
                f"got {self.factor}, {self.low_freq_factor}, {self.high_freq_factor} and {self.original_context}"
            )

    @property
    def magnitude(self) -> float:
        """Factor of cosines and sines."""
        return 1.0

    def scaled(self, frequencies: Array, theta: float) -> Array:
        """The frequencies, low ones divided."""
        turns = self.original_context * frequencies / (2 * jnp.pi)
        fast = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        fast = jnp.clip(fast, 0.0, 1.0)
        return frequencies * (fast + (1 - fast) / self.factor)


@dataclass(frozen=True)
class LinearScaling:
    """All frequencies are divided, as if positions were closer together."""

    factor: float
    """Divisor of all frequencies."""

    def __post_init__(self) -> None:
        if not self.factor >= 1:
            raise ValueError(f"expected a rope factor >= 1, got {self.factor}")

    @property
    def magnitude(self) -> float:
        """Factor of cosines and sines."""
        return 1.0

    def scaled(self, frequencies: Array, theta: float) -> Array:
        """The frequencies, divided."""
        return frequencies / self.factor


@dataclass(frozen=True)
class YarnScaling:
    """YaRN (arXiv 2309.00071): low frequencies are divided, and the scores of attention are sharpened."""

    factor: float
    """Divisor of low frequencies."""
    original_context: int
    """Tokens of the original context."""
    attention_factor: float
    """Factor of cosines and sines, so that scores grow by its square."""
    beta_fast: float = 32.0
    """Pairs that turn at least this often in the original context are not divided."""
    beta_slow: float = 1.0
    """Pairs that turn at most this often are divided; between the two bounds both are mixed."""
    truncate: bool = True
    """Whether the bounds, as indices of pairs, are rounded outwards to whole numbers."""

    def __post_init__(self) -> None:
        fits = self.factor >= 1 and self.beta_fast > self.beta_slow > 0 and self.original_context >= 1
        if not fits or not self.attention_factor > 0:
            raise ValueError(
                f"expected a rope factor >= 1, beta_fast > beta_slow > 0, an original context >= 1 and an attention "
                f"factor above 0, got {self.factor}, {self.beta_fast}, {self.beta_slow}, {self.original_context} and "
                f"{self.attention_factor}"
            )

    @property
    def magnitude(self) -> float:
        """Factor of cosines and sines."""
        return self.attention_factor

    def scaled(self, frequencies: Array, theta: float) -> Array:
        """The frequencies, those of pairs that turn slowly divided."""
        pairs = len(frequencies)

        def pair_of(turns: float) -> float:
            return pairs * math.log(self.original_context / (turns * 2 * math.pi)) / math.log(theta)

        first, last = pair_of(self.beta_fast), pair_of(self.beta_slow)
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, 2 * pairs - 1)
        ramp = (jnp.arange(pairs, dtype=jnp.float32) - first) / (last - first or 0.001)
        divided = jnp.clip(ramp, 0.0, 1.0)
        return frequencies / self.factor * divided + frequencies * (1 - divided)


RopeScaling = Llama3Scaling | LinearScaling | YarnScaling


class Rope(NamedTuple):
    """The rotary positions of a layer.

    Attributes:
        theta: base of the frequencies.
        scaling: scaling of the frequencies; None for none.
    """

    theta: float
    scaling: RopeScaling | None = None


def rotary_tables(positions: Array, head_dim: int, rope: Rope | None) -> tuple[Array, Array]:
    """cos and sin [..., head_dim/2] of the rotary angles; without rotary positions 1 and 0."""
    if rope is None:
        shape = (*positions.shape, head_dim // 2)
        return jnp.ones(shape, jnp.float32), jnp.zeros(shape, jnp.float32)
    frequencies = rope.theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    if rope.scaling:
        frequencies = rope.scaling.scaled(frequencies, rope.theta)
    angles = jnp.tensordot(positions.astype(jnp.float32), frequencies, axes=0)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    if rope.scaling and rope.scaling.magnitude != 1:
        cos, sin = cos * rope.scaling.magnitude, sin * rope.scaling.magnitude
    return cos, sin


@jax.custom_vjp
def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Rotates the pairs (x[i], x[i + head_dim/2]) of x [..., heads, head_dim] by the angles of its position."""
    cos, sin = cos[..., None, :], sin[..., None, :]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


rotate.defvjp(
    lambda x, cos, sin: (rotate(x, cos, sin), (cos, sin)),
    lambda angles, cotangent: (rotate(cotangent, angles[0], -angles[1]), None, None),  # the transposed matrix
)
