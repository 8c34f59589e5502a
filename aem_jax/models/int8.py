"""Weights to sample from in int8. The time of a decode step is bounded by reading every weight once.

    W ≈ q · s,  q = round(W / s) in −127 … 127,  s = max |W| over a column / 127,  x W ≈ (x q) · s

A column computes one number of the output, so the scale is applied after the product, which reads only int8. Embedding,
head, biases and norms keep the model's dtype: an error of the head would directly change the probabilities.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from aem_jax.models.config import ModelConfig
from aem_jax.models.parameters import Parameter, parameter_table

Array = jax.Array


class QuantizedArray(NamedTuple):
    """An array in int8.

    Attributes:
        codes: int8, of the array's shape.
        scales: f32, without the dimensions that share a scale.
    """

    codes: Array
    scales: Array


def quantize(x: Array, axes: int | tuple[int, ...]) -> QuantizedArray:
    """Codes and scales of x, one scale over `axes` (not negative): |x − q s| <= s / 2. Zeros have scale 1."""
    x = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(x), axis=axes)
    # A product: XLA turns `largest / 127` into one only in some programs, and the last bits of scales would differ.
    scales = jnp.where(largest > 0, largest * (1 / 127), 1.0)
    return QuantizedArray(jnp.round(x / jnp.expand_dims(scales, axes)).astype(jnp.int8), scales)


def scale_of(name: str) -> str:
    """Name of the scales of a matrix, next to it in the parameter tree."""
    return f"{name}_scale"


def quantized_matrices(config: ModelConfig) -> dict[str, Parameter]:
    """The matrices that have int8 codes, by name."""
    return {row.name: row for row in parameter_table(config) if row.int8}


def quantized_table(config: ModelConfig) -> tuple[Parameter, ...]:
    """The parameter table of a decoder in int8: codes in place of matrices, and a row for the scales of each."""
    matrices = quantized_matrices(config).values()
    codes = {row.name: row._replace(dtype="int8") for row in matrices}
    scales = (Parameter(scale_of(row.name), _outputs(row), ()) for row in matrices)
    return (*(codes.get(row.name, row) for row in parameter_table(config)), *scales)


def quantize_layers(config: ModelConfig, layers: Mapping[str, Array]) -> dict[str, Array]:
    """Stacked layers, or some of their arrays, with codes and scales in place of each matrix."""
    quantized = dict(layers)
    for name, row in quantized_matrices(config).items():
        if name in layers:
            quantized[name], quantized[scale_of(name)] = quantize(layers[name], tuple(row.input_axes))
    return quantized


def _outputs(row: Parameter) -> dict[str | None, int]:
    return {name: size for axis, (name, size) in enumerate(row.dims.items()) if axis not in row.input_axes}
