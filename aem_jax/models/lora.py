"""LoRA: low-rank adapters of frozen projections (Hu et al. 2021, arXiv:2106.09685).

    y = x W + s · (x A) B,  s = alpha / rank;  W_eff = W + s · A B

A is drawn as in PEFT, uniform in ±1/√inputs, and B starts at zero, so that an adapter starts without effect. Each of
Hugging Face's projections has its own pair, although Q, K and V (and gate and up) are fused here. So any of them can be
left out, and an adapter is that of PEFT but for the order of its axes.

A mixture's experts each have adapters of gate_proj, up_proj and down_proj; its router has none.

Left out: dropout (a policy gradient needs the probabilities that were sampled), biases, adapters of embedding and head.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from flax import nnx

from aem_jax.models.config import ModelConfig
from aem_jax.models.parameters import Parameter, Part, parameter_table

Array = jax.Array
Adapter = dict[str, dict[str, Any]]
"""Projection -> {"a": [L, *inputs, r], "b": [L, r, *outputs]}; of experts [L, E, …]."""

Target = Literal["all", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class LoraConfig:
    """Training of low-rank adapters; the weights are frozen.

    With --model.path the weights are those of its files, and warm start and reinforcement learning both train the
    adapter. Without it the warm start trains all weights, and the result is frozen and kept in the run's folder
    (`frozen_weights/`, in Hugging Face's files); reinforcement learning trains the adapter.
    A learning rate about ten times that of full fine-tuning is usual.
    """

    rank: int = 0
    """Rank of the adapters; 0 trains all weights."""
    alpha: float = 32.0
    """The output of an adapter is scaled by alpha / rank."""
    targets: tuple[Target, ...] = ("all",)
    """Projections with an adapter; all: every one of them."""
    merge: bool = True
    """Sample from a copy of the weights with merged adapters, made each step. False: sample from the frozen weights and
    the adapters, with two more small products for each projection, but no second copy where learning and sampling have
    the same layout of frozen weights (one device, or --mesh.fsdp 1)."""

    def __post_init__(self) -> None:
        if self.rank < 0 or not self.alpha > 0:
            raise ValueError(f"expected rank >= 0 and alpha > 0, got {self.rank} and {self.alpha}")
        odd = [name for name in self.targets if name not in get_args(Target)]
        if odd or not self.targets:
            raise ValueError(f"expected targets among {', '.join(get_args(Target))}, got {', '.join(odd) or 'none'}")

    @property
    def scale(self) -> float:
        """s = alpha / rank."""
        return self.alpha / self.rank


class Projection(NamedTuple):
    """One of Hugging Face's projections, and the part of a parameter that it is.

    Attributes:
        parameter: the stacked array [L, *inputs, ..., outputs[-1]] that holds it; [L, E, …] of experts.
        first: its start on the last axis but one of that array; None if it is all of it.
        inputs: sizes of its input dimensions.
        outputs: sizes of its output dimensions, in the order of the array.
        input_axes: logical names of the inputs.
        output_axes: logical names of the outputs.
        tensor: Hugging Face's tensor of it; {layer} stands for the layer's number, {expert} for the expert's.
        experts: number of experts that each have one; empty for no experts.
    """

    parameter: str
    first: int | None
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    input_axes: tuple[str | None, ...]
    output_axes: tuple[str | None, ...]
    tensor: str
    experts: tuple[int, ...] = ()

    @property
    def stacked_axes(self) -> tuple[str, ...]:
        """Logical names of the axes before the inputs."""
        return ("layers", "experts") if self.experts else ("layers",)


_OF_EXPERTS = {"experts_gate": "gate_proj", "experts_up": "up_proj", "experts_down": "down_proj"}
"""Experts' matrices -> their names as projections, whatever they are called in the files."""


def projections(config: ModelConfig) -> dict[str, Projection]:
    """All projections that can have an adapter, by name, in the order of the parameter table."""
    rows = [(row, part) for row in parameter_table(config) if row.lora for part in row.parts]
    return {_OF_EXPERTS.get(row.name, part.module): _projection(row, part) for row, part in rows}


def _projection(row: Parameter, part: Part) -> Projection:
    shape, axes, n = row.part_shape(part), row.axes[row.num_stacked :], row.num_inputs
    return Projection(
        parameter=row.name,
        first=None if part.rows is None else part.rows.start,
        inputs=shape[:n],
        outputs=shape[n:],
        input_axes=axes[:n],
        output_axes=axes[n:],
        tensor=part.name,
        experts=row.shape[1 : row.num_stacked],
    )


def targets(config: ModelConfig, lora: LoraConfig) -> dict[str, Projection]:
    """The projections that have an adapter, in the order of `projections`.

    Raises:
        ValueError: the rank is 0, or exceeds a side of a projection.
    """
    chosen = {name: p for name, p in projections(config).items() if {"all", name} & set(lora.targets)}
    if lora.rank < 1:
        raise ValueError(f"expected a rank of at least 1, got {lora.rank}; 0 is full fine-tuning, without an adapter")
    sides = {name: (math.prod(p.inputs), math.prod(p.outputs)) for name, p in chosen.items()}
    name, tightest = min(sides.items(), key=lambda item: min(item[1]))
    if lora.rank > min(tightest):
        raise ValueError(
            f"expected rank of at most {min(tightest)}, the smaller side of {name} {list(tightest)}, got {lora.rank}; "
            f"lower it or leave {name} out of lora.targets"
        )
    return chosen


def adapter_axes(config: ModelConfig, lora: LoraConfig) -> Adapter:
    """Logical axes of an adapter's arrays, in its structure."""
    return {
        name: {"a": (*p.stacked_axes, *p.input_axes, "rank"), "b": (*p.stacked_axes, "rank", *p.output_axes)}
        for name, p in targets(config, lora).items()
    }


def init_adapter(config: ModelConfig, lora: LoraConfig, key: Array) -> Adapter:
    """A float32 adapter without effect (B = 0). The A of a projection does not depend on which others have one."""
    keys = dict(zip(projections(config), jax.random.split(key, len(projections(config))), strict=True))

    def pair(name: str, p: Projection) -> dict[str, Array]:
        bound, stacked = math.prod(p.inputs) ** -0.5, (config.num_layers, *p.experts)
        a = jax.random.uniform(keys[name], (*stacked, *p.inputs, lora.rank), jnp.float32, -bound, bound)
        return {"a": a, "b": jnp.zeros((*stacked, lora.rank, *p.outputs), jnp.float32)}

    return {name: pair(name, p) for name, p in targets(config, lora).items()}


def merge(config: ModelConfig, lora: LoraConfig, adapter: Adapter, weights: Mapping[str, Array]) -> dict[str, Array]:
    """W + s · A B, rounded once. Layer by layer, so that the products of all layers never exist at once.

    Args:
        config: of the model.
        lora: of the adapter.
        adapter: float32.
        weights: the stacked arrays of its projections, by name (`merged_leaves`), in any dtype.

    Returns:
        As weights.
    """
    chosen = targets(config, lora)

    def one(layer: tuple[Adapter, dict[str, Array]]) -> dict[str, Array]:
        pairs, layer_weights = layer
        sums = {leaf: weight.astype(jnp.float32) for leaf, weight in layer_weights.items()}
        for name, p in chosen.items():
            product = partial(jnp.tensordot, axes=1, precision="highest")
            product = jax.vmap(product) if p.experts else product
            delta = lora.scale * product(pairs[name]["a"], pairs[name]["b"])
            if p.first is not None:  # a part of its array
                after = sums[p.parameter].shape[-2] - p.first - p.outputs[-2]
                delta = jnp.pad(delta, [(0, 0)] * (delta.ndim - 2) + [(p.first, after), (0, 0)])
            sums[p.parameter] = sums[p.parameter] + delta
        return {leaf: sums[leaf].astype(weight.dtype) for leaf, weight in layer_weights.items()}

    return jax.lax.map(one, (adapter, dict(weights)))


def merged_leaves(config: ModelConfig, lora: LoraConfig) -> tuple[str, ...]:
    """Names of the stacked arrays that an adapter changes."""
    return tuple(dict.fromkeys(p.parameter for p in targets(config, lora).values()))


class LowRank(nnx.Module):
    """A and B of one projection: of all layers, stacked, or of one."""

    def __init__(self, a: Array, b: Array) -> None:
        self.a: nnx.Param[Array] = nnx.Param(a)
        self.b: nnx.Param[Array] = nnx.Param(b)


class Adapters(nnx.Module):
    """The adapters of a block's projections, by their names."""

    def __init__(self, adapter: Adapter, lora: LoraConfig) -> None:
        for name, pair in adapter.items():
            setattr(self, name, LowRank(**pair))
        self.scale: float = lora.scale

    def of_experts(self, name: str) -> tuple[Array, Array] | None:
        """s · A [E, inputs, r] and B [E, r, outputs] of the experts' projection; None without an adapter."""
        pair = getattr(self, name, None)
        return None if pair is None else (pair.a[...] * self.scale, pair.b[...])

    def add(self, name: str, x: Array, y: Array) -> Array:
        """y + s · (x A) B, in the dtype of x.

        Args:
            name: of the projection; without an adapter, y is returned.
            x: [..., *inputs], its input.
            y: [..., *outputs], its output without the adapter.
        """
        pair = getattr(self, name, None)
        if pair is None:
            return y
        a, b = pair.a[...].astype(x.dtype), pair.b[...].astype(x.dtype)
        low = jnp.tensordot(x, a, axes=a.ndim - 1) * jnp.asarray(self.scale, x.dtype)
        return y + jnp.tensordot(low, b, axes=1)
