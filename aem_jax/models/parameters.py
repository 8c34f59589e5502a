"""The parameters of a decoder, one row each. Everything that depends on them is read off this table.

Shapes, logical axes, dtypes, initial values, counts, the Hugging Face tensors of a checkpoint, and which matrices take
LoRA and int8. A family that differs in its parameters needs a row here, an option in `ModelConfig` and its use in
`block.py`.

Projections of the same input are fused, so that they are one product: Q, K, V (grouped by KV head, so that tensor
parallelism splits between groups), and the MLP's gate and up.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

Array = jax.Array

Dims = Mapping[str | None, int]
"""Logical axis -> size, in order."""

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
"""Hugging Face's tensors of the embedding and of an untied head."""

OUTPUT_NORMS = {"attention_norm": "attention_output_norm", "mlp_norm": "mlp_output_norm"}
"""Norm of a sublayer -> norm of its output, if inputs have a norm, too."""


ExpertNames = Literal["qwen", "mixtral"]


@dataclass(frozen=True)
class Mixture:
    """A mixture of experts in place of the MLP of every layer; each expert is a gated MLP.

    The router's softmax over all experts gives their probabilities. A token's output is the sum over its k most likely
    experts, weighted by their probabilities.
    """

    num_experts: int
    """Experts of a layer."""
    experts_per_token: int
    """k."""
    norm_topk: bool = True
    """Whether the k probabilities are divided by their sum."""
    names: ExpertNames = "qwen"
    """Names of the tensors in Hugging Face's files: those of Qwen's mixtures, or of Mixtral's."""

    def __post_init__(self) -> None:
        if not 1 <= self.experts_per_token <= self.num_experts:
            raise ValueError(
                f"expected 1 <= experts_per_token <= num_experts, got {self.experts_per_token} and {self.num_experts}"
            )
        if self.names not in get_args(ExpertNames):
            raise ValueError(f"expected names to be one of {get_args(ExpertNames)}, got {self.names!r}")

    @property
    def record_dtype(self) -> str:
        """Dtype of recorded experts."""
        return "uint8" if self.num_experts <= 256 else "int16"


class ExpertTensors(NamedTuple):
    """Modules of a mixture in Hugging Face's files.

    Attributes:
        mixture: the module of router (gate) and experts, in a layer.
        gate: of an expert.
        up: of an expert.
        down: of an expert.
    """

    mixture: str
    gate: str
    up: str
    down: str


EXPERT_TENSORS: Mapping[ExpertNames, ExpertTensors] = {
    "qwen": ExpertTensors("mlp", "gate_proj", "up_proj", "down_proj"),
    "mixtral": ExpertTensors("block_sparse_moe", "w1", "w3", "w2"),
}
"""`Mixture.names` -> the names in the files."""


class Part(NamedTuple):
    """A Hugging Face tensor, and the part of a parameter that it holds.

    Attributes:
        name: of the tensor; {layer} stands for the layer's number, {expert} for that of the expert.
        rows: the part's range on the parameter's last axis but one; None is all of the parameter.
    """

    name: str
    rows: slice | None = None

    @property
    def module(self) -> str:
        """The tensor's module without its path, such as q_proj."""
        return self.name.split(".")[-2]


class Parameter(NamedTuple):
    """One array of the parameter tree.

    Attributes:
        name: its key; parameters of layers are in "layers".
        dims: logical axes and sizes. A layer's parameter is stacked: its first axis is "layers". The next axis of
            experts' matrices is "experts".
        parts: the Hugging Face tensors that it is made of, without these axes. A matrix [*inputs, *outputs] is there
            [outputs, inputs].
        num_inputs: dimensions that a product with the matrix sums over; 0 for biases, norms and the embedding.
        std: standard deviation of random initial values; 0 if they are constant.
        constant: initial value where `std` is 0.
        dtype: dtype of its use; masters are float32.
        lora: whether each part can have an adapter.
        int8: whether it can be sampled from in int8.
        present: whether a decoder of this config has it.
    """

    name: str
    dims: Dims
    parts: tuple[Part, ...]
    num_inputs: int = 0
    std: float = 0.0
    constant: float = 0.0
    dtype: str = "float32"
    lora: bool = False
    int8: bool = False
    present: bool = True

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array."""
        return tuple(self.dims.values())

    @property
    def axes(self) -> tuple[str | None, ...]:
        """Logical axes of the array."""
        return tuple(self.dims)

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def stacked(self) -> bool:
        """Whether it holds all layers."""
        return "layers" in self.dims

    @property
    def has_experts(self) -> bool:
        """Whether it holds a matrix of each expert."""
        return "experts" in self.dims

    @property
    def num_stacked(self) -> int:
        """Leading axes that count layers and experts."""
        return self.stacked + self.has_experts

    @property
    def input_axes(self) -> range:
        """The dimensions that a product sums over."""
        return range(self.num_stacked, self.num_stacked + self.num_inputs)

    def part_shape(self, part: Part) -> tuple[int, ...]:
        """Shape of a part, without the axes of layers and experts."""
        shape = self.shape[self.num_stacked :]
        return shape if part.rows is None else (*shape[:-2], part.rows.stop - part.rows.start, shape[-1])


def parameter_table(config: Any) -> tuple[Parameter, ...]:
    """The parameters of a decoder. The order is that in which random initial values are drawn.

    Args:
        config: a `ModelConfig`, whose module imports this one.
    """
    d, f, v, dh = config.hidden_size, config.intermediate_size, config.vocab_size, config.head_dim
    h, kv = config.num_heads, config.num_kv_heads
    q = h // kv  # query heads of a group; its key and its value follow them
    groups: Dims = {"kv_heads": kv, None: q + 2, "head_dim": dh}
    residual = (2 * config.num_layers) ** -0.5  # keeps the residual stream's variance flat in depth at the start

    def layered(dims: Dims) -> Dims:
        return {"layers": config.num_layers, **dims}

    def part(module: str, rows: slice | None = None, kind: str = "weight") -> Part:
        return Part(f"model.layers.{{layer}}.{module}.{kind}", rows)

    def qkv(kind: str) -> tuple[Part, ...]:
        rows = {"q": slice(0, q), "k": slice(q, q + 1), "v": slice(q + 1, q + 2)}
        return tuple(part(f"self_attn.{name}_proj", span, kind) for name, span in rows.items())

    def projection(name: str, inputs: Dims, outputs: Dims, *parts: Part, scale: float = 1.0) -> Parameter:
        std = scale * math.prod(inputs.values()) ** -0.5
        dims = layered({**inputs, **outputs})
        return Parameter(name, dims, parts, len(inputs), std, dtype=config.dtype, lora=True, int8=True)

    one = 0.0 if config.zero_centered_norms else 1.0

    def norm(name: str, size: int, module: str, present: bool = True) -> Parameter:
        return Parameter(name, layered({"norm": size}), (part(module),), constant=one, present=present)

    q_norm, k_norm = (h * dh, kv * dh) if config.qk_norm == "projection" else (dh, dh)
    after_attention, after_mlp = "post_attention_layernorm", "post_feedforward_layernorm"
    norms = {
        "pre": ("input_layernorm", after_attention),
        "post": (after_attention, after_mlp),
        "both": ("input_layernorm", "pre_feedforward_layernorm"),
    }
    attention_norm, mlp_norm = norms[config.norm_placement]
    is_both = config.norm_placement == "both"
    gate, up = part("mlp.gate_proj", slice(0, 1)), part("mlp.up_proj", slice(1, 2))
    if config.mixture is None:
        mlp = (
            projection("gate_up", {"embed": d}, {None: 2, "mlp": f}, gate, up),
            projection("down", {"mlp": f}, {"embed": d}, part("mlp.down_proj"), scale=residual),
        )
    else:
        names, count = EXPERT_TENSORS[config.mixture.names], config.mixture.num_experts
        outer: Dims = {"layers": config.num_layers, "experts": count}

        def of_experts(name: str, inputs: Dims, outputs: Dims, module: str, scale: float = 1.0) -> Parameter:
            row = projection(name, inputs, outputs, part(f"{names.mixture}.experts.{{expert}}.{module}"), scale=scale)
            return row._replace(dims={**outer, **inputs, **outputs})

        router = projection("router", {"embed": d}, {"router": count}, part(f"{names.mixture}.gate"))
        mlp = (
            router._replace(dtype="float32", lora=False, int8=False),
            of_experts("experts_gate", {"expert_embed": d}, {"mlp": f}, names.gate),
            of_experts("experts_up", {"expert_embed": d}, {"mlp": f}, names.up),
            of_experts("experts_down", {"mlp": f}, {"expert_embed": d}, names.down, scale=residual),
        )
    table = (
        Parameter("embed", {"vocab": v, "embed": d}, (Part(EMBED),), std=d**-0.5, dtype=config.dtype),
        projection("qkv", {"embed": d}, groups, *qkv("weight")),
        projection("o", {"heads": h, "head_dim": dh}, {"embed": d}, part("self_attn.o_proj"), scale=residual),
        *mlp,
        Parameter("qkv_bias", layered(groups), qkv("bias"), dtype=config.dtype, present=config.qkv_bias),
        norm("q_norm", q_norm, "self_attn.q_norm", present=bool(config.qk_norm)),
        norm("k_norm", k_norm, "self_attn.k_norm", present=bool(config.qk_norm)),
        norm("attention_norm", d, attention_norm),
        norm("mlp_norm", d, mlp_norm),
        norm(OUTPUT_NORMS["attention_norm"], d, after_attention, present=is_both),
        norm(OUTPUT_NORMS["mlp_norm"], d, after_mlp, present=is_both),
        Parameter("norm", {"norm": d}, (Part("model.norm.weight"),), constant=one),
        Parameter(
            "head",
            {"embed": d, "vocab": v},
            (Part(HEAD),),
            num_inputs=1,
            std=d**-0.5,
            dtype=config.dtype,
            present=not config.tied_head,
        ),
    )
    return tuple(row for row in table if row.present)


def as_tree(table: tuple[Parameter, ...], leaf: Callable[[Parameter], Any]) -> dict[str, Any]:
    """`leaf(row)` of each row, in the structure of the parameter tree."""
    layers = {row.name: leaf(row) for row in table if row.stacked}
    return {**{row.name: leaf(row) for row in table if not row.stacked}, "layers": layers}


def init_parameters(config: Any, key: Array) -> dict[str, Any]:
    """Random float32 parameters. The n-th array that is drawn has the key fold_in(key, n)."""
    table = parameter_table(config)
    keys = {row.name: jax.random.fold_in(key, n) for n, row in enumerate(row for row in table if row.std)}

    def init(row: Parameter) -> Array:
        if row.std:
            return jax.random.normal(keys[row.name], row.shape, jnp.float32) * row.std
        return jnp.full(row.shape, row.constant, jnp.float32)

    return as_tree(table, init)


def layer_matrices(config: Any) -> tuple[Parameter, ...]:
    """The matrices of layers."""
    return tuple(row for row in parameter_table(config) if row.stacked and row.num_inputs)
