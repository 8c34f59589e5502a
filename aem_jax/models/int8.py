"""Weights to sample from in 8 bits: a decode step reads every weight once, and that is what it waits for.

    W ≈ q · s,  q = round(W / s) in −127 … 127,  s = max |W| over a column / 127,  x W ≈ (x q) · s

A column is what makes one number of the output, so the scale comes after the product, which reads int8 alone. Embedding
and head, biases and norms stay as they are: the head's error would go straight into the probabilities.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

Array = jax.Array

INPUTS: Mapping[str, int] = {"qkv": 1, "o": 2, "gate_up": 1, "down": 1}
"""Stacked matrix [L, *inputs, *outputs] -> how many axes its product sums over."""


def scale_of(name: str) -> str:
    """What the scales of a matrix are called, beside it."""
    return f"{name}_scale"


def quantize(weights: Array, inputs: int) -> tuple[Array, Array]:
    """Codes int8[L, *inputs, *outputs] and scales f32[L, *outputs] of weights; a column of zeros has scale 1."""
    weights = weights.astype(jnp.float32)
    summed = tuple(range(1, 1 + inputs))
    largest = jnp.max(jnp.abs(weights), axis=summed)
    # A product: XLA makes one of `largest / 127` in some programs alone, and the last bits of scales would differ.
    scales = jnp.where(largest > 0, largest * (1 / 127), 1.0)
    return jnp.round(weights / jnp.expand_dims(scales, summed)).astype(jnp.int8), scales


def quantize_layers(layers: Mapping[str, Array]) -> dict[str, Array]:
    """Stacked layers with every matrix among them in codes, its scales beside it."""
    found = dict(layers)
    for name in (name for name in INPUTS if name in layers):
        found[name], found[scale_of(name)] = quantize(layers[name], INPUTS[name])
    return found


def layer_axes(axes: Mapping[str, tuple[str | None, ...]]) -> dict[str, tuple[str | None, ...]]:
    """Logical axes of `quantize_layers(layers)` from those of layers: a scale lies as its matrix's outputs."""
    scales = {scale_of(name): (axes[name][0], *axes[name][1 + INPUTS[name] :]) for name in INPUTS if name in axes}
    return {**axes, **scales}
