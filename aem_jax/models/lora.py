"""LoRA: low-rank adapters beside frozen projections (Hu et al. 2021, arXiv:2106.09685).

    y = x W + s · (x A) B,  s = alpha / rank;  W_eff = W + s · A B

A is drawn as PEFT draws it, uniform in ±1/√inputs, and B begins at zero, so that an adapter begins as nothing. Each of
Hugging Face's projections has a pair of its own, although queries, keys and values (and both halves of the MLP's input)
are one matrix here: so any of them can be left out, and an adapter is PEFT's own but for the order of its axes.

Left out: dropout (a policy gradient needs the probabilities that were sampled), biases, adapters of embedding and head.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from flax import nnx

from aem_jax.models.config import ModelConfig

Array = jax.Array
Adapter = dict[str, dict[str, Any]]
"""Projection -> {"a": [L, *inputs, r], "b": [L, r, *outputs]}."""

Target = Literal["all", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class LoraConfig:
    """Training small adapters beside frozen weights, instead of the weights.

    With --model.path the weights are those of its files; warm start and reinforcement learning both train the adapter.
    Random weights have nothing worth adapting to: there the warm start trains all of them, what comes of it is frozen
    and kept in the run's folder (`base/`, in Hugging Face's files), and reinforcement learning trains the adapter.
    A learning rate about ten times that of full fine-tuning is usual.
    """

    rank: int = 0
    """Rank of the adapters; 0 trains all weights."""
    alpha: float = 32.0
    """What the adapters add is scaled by alpha / rank."""
    targets: tuple[Target, ...] = ("all",)
    """Projections that have one: q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj, or all."""
    merge: bool = True
    """Sample from a copy of the weights with the adapters in it, made anew each step; False: from the frozen weights
    with the adapters beside them, two small products more for each projection, but no second copy where frozen weights
    lie alike for learning and sampling (one device, or --mesh.fsdp 1)."""

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
    """One of Hugging Face's projections, and where it lies.

    Attributes:
        leaf: our array [L, *inputs, ..., outputs[-1]] that holds it.
        first: where it begins along the last axis but one of that array; None if it is all of it.
        inputs: sizes of the axes that it reads.
        outputs: sizes of the axes that it writes, as they lie in the array.
        input_axes: their logical names.
        output_axes: their logical names.
    """

    leaf: str
    first: int | None
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    input_axes: tuple[str, ...]
    output_axes: tuple[str | None, ...]


def projections(config: ModelConfig) -> dict[str, Projection]:
    """All that can have an adapter, by name."""
    d, f, dh = config.hidden_size, config.intermediate_size, config.head_dim
    h, kv = config.num_heads, config.num_kv_heads
    r = h // kv
    split: tuple[str | None, ...] = ("kv_heads", None, "head_dim")
    qkv = lambda first, count: Projection("qkv", first, (d,), (kv, count, dh), ("embed",), split)
    half = lambda first: Projection("gate_up", first, (d,), (1, f), ("embed",), (None, "mlp"))
    return {
        "q_proj": qkv(0, r),
        "k_proj": qkv(r, 1),
        "v_proj": qkv(r + 1, 1),
        "o_proj": Projection("o", None, (h, dh), (d,), ("heads", "head_dim"), ("embed",)),
        "gate_proj": half(0),
        "up_proj": half(1),
        "down_proj": Projection("down", None, (f,), (d,), ("mlp",), ("embed",)),
    }


def targets(config: ModelConfig, lora: LoraConfig) -> dict[str, Projection]:
    """The projections that have an adapter, in the order of `projections`.

    Raises:
        ValueError: the rank is 0, or above what a projection can have.
    """
    chosen = {name: p for name, p in projections(config).items() if {"all", name} & set(lora.targets)}
    if lora.rank < 1:
        raise ValueError(f"expected a rank of at least 1, got {lora.rank}; 0 is full fine-tuning, without an adapter")
    sides = {name: (_size(p.inputs), _size(p.outputs)) for name, p in chosen.items()}
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
        name: {"a": ("layers", *p.input_axes, "rank"), "b": ("layers", "rank", *p.output_axes)}
        for name, p in targets(config, lora).items()
    }


def init_adapter(config: ModelConfig, lora: LoraConfig, key: Array) -> Adapter:
    """A float32 adapter that adds nothing yet; a projection's A does not depend on which others have one."""
    keys = dict(zip(projections(config), jax.random.split(key, len(projections(config))), strict=True))

    def pair(name: str, p: Projection) -> dict[str, Array]:
        bound = _size(p.inputs) ** -0.5
        a = jax.random.uniform(keys[name], (config.num_layers, *p.inputs, lora.rank), jnp.float32, -bound, bound)
        return {"a": a, "b": jnp.zeros((config.num_layers, lora.rank, *p.outputs), jnp.float32)}

    return {name: pair(name, p) for name, p in targets(config, lora).items()}


def merge(config: ModelConfig, lora: LoraConfig, adapter: Adapter, weights: Mapping[str, Array]) -> dict[str, Array]:
    """W + s · A B, rounded once, layer by layer: no product of all layers exists at a time.

    Args:
        config: of the model.
        lora: of the adapter.
        adapter: float32.
        weights: the stacked arrays that hold its projections, by name (`merged_leaves`), in any dtype.

    Returns:
        As weights.
    """
    chosen = targets(config, lora)

    def one(layer: tuple[Adapter, dict[str, Array]]) -> dict[str, Array]:
        pairs, found = layer
        sums = {leaf: weight.astype(jnp.float32) for leaf, weight in found.items()}
        for name, p in chosen.items():
            delta = lora.scale * jnp.tensordot(pairs[name]["a"], pairs[name]["b"], axes=1, precision="highest")
            if p.first is not None:  # a part of its array
                after = sums[p.leaf].shape[-2] - p.first - p.outputs[-2]
                delta = jnp.pad(delta, [(0, 0)] * (delta.ndim - 2) + [(p.first, after), (0, 0)])
            sums[p.leaf] = sums[p.leaf] + delta
        return {leaf: sums[leaf].astype(weight.dtype) for leaf, weight in found.items()}

    return jax.lax.map(one, (adapter, dict(weights)))


def merged_leaves(config: ModelConfig, lora: LoraConfig) -> tuple[str, ...]:
    """Stacked arrays that an adapter changes."""
    return tuple(dict.fromkeys(p.leaf for p in targets(config, lora).values()))


class LowRank(nnx.Module):
    """A and B of one projection: of all layers, stacked, or of one."""

    def __init__(self, a: Array, b: Array) -> None:
        self.a = nnx.Param(a)
        self.b = nnx.Param(b)


class Adapters(nnx.Module):
    """What stands beside a block's projections, by their names."""

    def __init__(self, config: ModelConfig, lora: LoraConfig) -> None:
        for name, pair in init_adapter(config, lora, jax.random.key(0)).items():
            setattr(self, name, LowRank(**pair))
        self.scale = lora.scale

    def add(self, name: str, x: Array, y: Array) -> Array:
        """y + s · (x A) B, in the dtype of x.

        Args:
            name: of the projection; without an adapter, y is left as it is.
            x: [..., *inputs], what the projection reads.
            y: [..., *outputs], what the frozen one makes of it.
        """
        pair = getattr(self, name, None)
        if pair is None:
            return y
        a, b = pair.a[...].astype(x.dtype), pair.b[...].astype(x.dtype)
        low = jnp.tensordot(x, a, axes=a.ndim - 1) * jnp.asarray(self.scale, x.dtype)
        return y + jnp.tensordot(low, b, axes=1)


def _size(sizes: tuple[int, ...]) -> int:
    total = 1
    for size in sizes:
        total *= size
    return total
