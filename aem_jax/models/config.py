"""Sizes and options of a decoder, and the table of known sizes."""

import reprlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import jax.numpy as jnp
from jax.typing import DTypeLike

from aem_jax.models.parameters import Mixture, parameter_table
from aem_jax.models.rotary import LinearScaling, Llama3Scaling, Rope, RopeScaling, YarnScaling

DTYPES = ("bfloat16", "float32")
"""Dtypes of activations."""

_brief = reprlib.Repr()
_brief.maxstring = _brief.maxother = 100
brief: Callable[[Any], str] = _brief.repr
"""Repr of a value for an error message, shortened where it is long or deep."""


def dtype_name(dtype: DTypeLike, accepted: Sequence[str] = DTYPES, field: str = "dtype") -> str:
    """The name of a dtype: "bfloat16" of "bfloat16", `jnp.bfloat16` or `np.dtype("bfloat16")`.

    Args:
        dtype: a jax or numpy dtype, or an accepted name.
        accepted: names.
        field: named in the error.

    Raises:
        ValueError: a dtype that is not accepted.
    """
    if isinstance(dtype, str) and dtype in accepted:
        return dtype
    try:
        name = jnp.dtype(dtype).name
    except (TypeError, ValueError):
        name = ""
    if name not in accepted:
        names = ", ".join(accepted[:-1]) + " or " + accepted[-1]
        raise ValueError(f"expected {field} {names} (a name, a jax or a numpy dtype), got {brief(dtype)}")
    return name


class DTypeName:
    """A dataclass field that takes any spelling of a dtype and holds its name."""

    def __get__(self, instance: Any, owner: type) -> str:
        return "float32" if instance is None else vars(instance)["dtype"]  # on the class: the default

    def __set__(self, instance: Any, value: DTypeLike) -> None:
        vars(instance)["dtype"] = dtype_name(value)


NormPlacement = Literal["pre", "post", "both"]
QKNorm = Literal["head", "projection"]
Activation = Literal["silu", "gelu_tanh"]

OPTIONS: dict[str, tuple[Any, ...]] = {
    "norm_placement": get_args(NormPlacement),
    "qk_norm": (*get_args(QKNorm), None),
    "activation": get_args(Activation),
}
"""Fields of `ModelConfig` that are choices, and their values."""

SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim"),
    "max_positions",
)
"""Fields of `ModelConfig` that are counts."""


@dataclass(frozen=True)
class ModelConfig:
    """A decoder with grouped queries, rotary positions, a gated MLP and RMS norm.

    The families differ in the options; `families.FAMILIES` lists those of each.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    """Width of the MLP's hidden layer; of each expert's in a mixture."""
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float = 1_000_000.0
    norm_eps: float = 1e-6
    tied_head: bool = True
    norm_placement: NormPlacement = "pre"
    """Norm of the input of attention and MLP (pre), of their output before it is added to the residual (post), or of
    both."""
    zero_centered_norms: bool = False
    """Whether norms multiply by 1 + w instead of w."""
    qk_norm: QKNorm | None = "head"
    """Norm of queries and keys: of each head (head), or of all heads together (projection); None for none."""
    qkv_bias: bool = False
    """Whether queries, keys and values have a bias."""
    activation: Activation = "silu"
    """Activation of the MLP's gate: SiLU, or GELU in the tanh approximation."""
    scaled_embedding: bool = False
    """Whether embeddings are multiplied by √hidden_size, rounded to the activations' dtype."""
    score_dim: int | None = None
    """Scores of attention are divided by the root of this number; None for head_dim."""
    sliding_windows: tuple[int, ...] = ()
    """Tokens that the queries of each layer attend to, their own included; 0 for all. Empty: all, in every layer."""
    rope_scaling: RopeScaling | None = None
    """Scaling of rotary positions; None for none."""
    sliding_rope_theta: float | None = None
    """Base of the rotary positions of layers with a sliding window, which are not scaled; None: as other layers."""
    unrotated_layers: tuple[int, ...] = ()
    """Indices of the layers without rotary positions, in ascending order."""
    mixture: Mixture | None = None
    """The mixture of experts of every layer; None for one MLP."""
    max_positions: int = 32_768
    """Longest context that the weights were trained for, in tokens."""
    dtype: DTypeName = DTypeName()
    """Dtype of activations and of the weights as used; masters are float32. A jax or numpy dtype becomes its name."""
    architecture: str = field(default="", compare=False)
    """Architecture that the config was read from and is written as; empty: the first family with these options."""

    def __post_init__(self) -> None:
        for name in SIZES:
            value = getattr(self, name)
            if not hasattr(value, "__index__") or value < 1:
                raise ValueError(f"expected {name} to be a whole number of at least 1, got {value!r}")
            object.__setattr__(self, name, int(value))  # JSON does not know the integers of numpy
        for name, values in OPTIONS.items():
            if getattr(self, name) not in values:
                raise ValueError(f"expected {name} to be one of {values}, got {brief(getattr(self, name))}")
        windows = tuple(self.sliding_windows)
        if windows and (
            len(windows) != self.num_layers or not all(type(size) is int and size >= 0 for size in windows)
        ):
            raise ValueError(
                f"expected sliding_windows to be a whole number for each of {self.num_layers} layers, 0 for no window, "
                f"got {brief(self.sliding_windows)}"
            )
        object.__setattr__(self, "sliding_windows", windows if any(windows) else ())
        unrotated = tuple(self.unrotated_layers)
        if not all(type(layer) is int for layer in unrotated) or list(unrotated) != sorted(
            {layer for layer in unrotated if 0 <= layer < self.num_layers}
        ):
            raise ValueError(
                f"expected unrotated_layers to be indices of {self.num_layers} layers in ascending order, "
                f"got {brief(self.unrotated_layers)}"
            )
        object.__setattr__(self, "unrotated_layers", unrotated)
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"expected num_heads divisible by num_kv_heads, got {self.num_heads} and {self.num_kv_heads}; "
                "every key/value head serves the same number of query heads"
            )
        if self.score_dim is not None and (not hasattr(self.score_dim, "__index__") or self.score_dim < 1):
            raise ValueError(f"expected score_dim to be a whole number of at least 1, got {self.score_dim!r}")
        if not self.rope_theta > 0 or not (self.sliding_rope_theta is None or self.sliding_rope_theta > 0):
            raise ValueError(
                f"expected rotary bases above 0, got {self.rope_theta!r} and {self.sliding_rope_theta!r} (rope_theta, "
                "sliding_rope_theta)"
            )
        if self.score_dim == self.head_dim:
            object.__setattr__(self, "score_dim", None)
        if self.head_dim % 2:
            raise ValueError(f"expected an even head_dim (rotary positions turn pairs), got {self.head_dim}")

    @property
    def windows(self) -> tuple[int, ...]:
        """The sliding window of each layer; 0 for none."""
        return self.sliding_windows or (0,) * self.num_layers

    @property
    def ropes(self) -> tuple[Rope | None, ...]:
        """The rotary positions of each layer; None for a layer without them."""
        of_all = Rope(self.rope_theta, self.rope_scaling)
        sliding = of_all if self.sliding_rope_theta is None else Rope(self.sliding_rope_theta)
        return tuple(
            None if layer in self.unrotated_layers else sliding if window else of_all
            for layer, window in enumerate(self.windows)
        )

    def with_layers(self, num_layers: int) -> "ModelConfig":
        """The same decoder with another number of layers: the first ones, and after the last one the first again."""
        layers = [layer % self.num_layers for layer in range(num_layers)]
        return replace(
            self,
            num_layers=num_layers,
            sliding_windows=tuple(self.windows[layer] for layer in layers),
            unrotated_layers=tuple(i for i, layer in enumerate(layers) if layer in self.unrotated_layers),
        )

    @property
    def num_parameters(self) -> int:
        """Parameters, the embedding counted once when the head is tied."""
        return sum(row.size for row in parameter_table(self))

    @property
    def longest_context(self) -> int:
        """Most tokens of a context in which the weights work: those they were trained for, or more with YaRN."""
        scaling = self.rope_scaling
        scaled = int(scaling.factor * scaling.original_context) if isinstance(scaling, YarnScaling) else 0
        return max(self.max_positions, scaled)

    @property
    def num_active_parameters(self) -> int:
        """Parameters that one token uses: of a mixture, k experts of each layer."""
        table, mixture = parameter_table(self), self.mixture
        if mixture is None:
            return self.num_parameters
        used = lambda row: row.size * mixture.experts_per_token // mixture.num_experts if row.has_experts else row.size
        return sum(map(used, table))


def _qwen2(hidden: int, intermediate: int, layers: int, heads: int, kv: int, head_dim: int, vocab: int) -> ModelConfig:
    tied = vocab == 151_936  # from 7B on the head is untied, and the vocabulary is padded further
    sizes = (vocab, hidden, intermediate, layers, heads, kv, head_dim)
    return ModelConfig(*sizes, tied_head=tied, qk_norm=None, qkv_bias=True, dtype="bfloat16")


def _llama3(hidden: int, intermediate: int, layers: int, heads: int, head_dim: int, factor: float) -> ModelConfig:
    return ModelConfig(
        *(128_256, hidden, intermediate, layers, heads, 8, head_dim),
        rope_theta=500_000.0,
        norm_eps=1e-5,
        tied_head=factor == 32.0,
        qk_norm=None,
        rope_scaling=Llama3Scaling(factor, 1.0, 4.0, 8192),
        max_positions=131_072,
        dtype="bfloat16",
    )


def _qwen3(hidden: int, intermediate: int, layers: int, heads: int, kv: int, tied: bool) -> ModelConfig:
    return ModelConfig(151_936, hidden, intermediate, layers, heads, kv, 128, tied_head=tied, dtype="bfloat16")


def _olmo2(hidden: int, intermediate: int, layers: int, heads: int, kv: int) -> ModelConfig:
    return ModelConfig(
        *(100_352, hidden, intermediate, layers, heads, kv, 128),
        rope_theta=500_000.0,
        tied_head=False,
        norm_placement="post",
        qk_norm="projection",
        max_positions=4096,
        dtype="bfloat16",
    )


def _gemma3(
    hidden: int, intermediate: int, layers: int, heads: int, kv: int, window: int = 1024, head_dim: int = 256
) -> ModelConfig:
    small = window == 512  # text alone, and a shorter context
    return ModelConfig(
        *(262_144 if small else 262_208, hidden, intermediate, layers, heads, kv, head_dim),
        norm_placement="both",
        zero_centered_norms=True,
        activation="gelu_tanh",
        scaled_embedding=True,
        score_dim=168 if head_dim == 128 else None,
        sliding_windows=tuple(window if (layer + 1) % 6 else 0 for layer in range(layers)),
        rope_scaling=None if small else LinearScaling(8.0),
        sliding_rope_theta=10_000.0,
        max_positions=32_768 if small else 131_072,
        dtype="bfloat16",
        architecture="Gemma3ForCausalLM",
    )


def _mistral(intermediate: int, layers: int, vocab: int, theta: float, windows: tuple[int, ...]) -> ModelConfig:
    return ModelConfig(
        *(vocab, 4096, intermediate, layers, 32, 8, 128),
        rope_theta=theta,
        norm_eps=1e-5,
        tied_head=False,
        qk_norm=None,
        sliding_windows=windows,
        dtype="bfloat16",
        architecture="MinistralForCausalLM" if any(windows) else "MistralForCausalLM",
    )


_SMOLLM3 = ModelConfig(
    *(128_256, 2048, 11_008, 36, 16, 4, 128),
    rope_theta=5_000_000.0,
    qk_norm=None,
    unrotated_layers=tuple(range(3, 36, 4)),
    max_positions=65_536,
    dtype="bfloat16",
    architecture="SmolLM3ForCausalLM",
)


def _qwen3_moe(hidden: int, expert: int, layers: int, heads: int) -> ModelConfig:
    return ModelConfig(
        *(151_936, hidden, expert, layers, heads, 4, 128),
        tied_head=False,
        mixture=Mixture(128, 8),
        max_positions=40_960,
        dtype="bfloat16",
    )


TINY = ("tiny", "tiny-gemma", "tiny-moe")
"""Known sizes whose vocabulary is replaced by that of the tokenizer trained for the run."""

CONFIGS: dict[str, ModelConfig] = {
    "tiny": ModelConfig(512, 128, 384, 4, 4, 2, 32, rope_theta=10_000.0),
    "tiny-gemma": replace(
        _gemma3(128, 384, 4, 4, 2, head_dim=32),
        vocab_size=512,
        rope_theta=10_000.0,
        sliding_windows=(64, 64, 0, 64),
        rope_scaling=None,
        sliding_rope_theta=1000.0,
        dtype="float32",
    ),
    "tiny-moe": ModelConfig(512, 128, 128, 4, 4, 2, 32, rope_theta=10_000.0, mixture=Mixture(8, 2)),
    "qwen3-0.6b": _qwen3(1024, 3072, 28, 16, 8, True),
    "qwen3-1.7b": _qwen3(2048, 6144, 28, 16, 8, True),
    "qwen3-4b": _qwen3(2560, 9728, 36, 32, 8, True),
    "qwen3-8b": _qwen3(4096, 12288, 36, 32, 8, False),
    "qwen3-14b": _qwen3(5120, 17408, 40, 40, 8, False),
    "qwen3-32b": _qwen3(5120, 25600, 64, 64, 8, False),
    "qwen2.5-0.5b": _qwen2(896, 4864, 24, 14, 2, 64, 151_936),
    "qwen2.5-1.5b": _qwen2(1536, 8960, 28, 12, 2, 128, 151_936),
    "qwen2.5-3b": _qwen2(2048, 11008, 36, 16, 2, 128, 151_936),
    "qwen2.5-7b": _qwen2(3584, 18944, 28, 28, 4, 128, 152_064),
    "qwen2.5-14b": _qwen2(5120, 13824, 48, 40, 8, 128, 152_064),
    "qwen2.5-32b": _qwen2(5120, 27648, 64, 40, 8, 128, 152_064),
    "llama-3.2-1b": _llama3(2048, 8192, 16, 32, 64, 32.0),
    "llama-3.2-3b": _llama3(3072, 8192, 28, 24, 128, 32.0),
    "llama-3.1-8b": _llama3(4096, 14336, 32, 32, 128, 8.0),
    "llama-3.1-70b": _llama3(8192, 28672, 80, 64, 128, 8.0),
    "olmo-2-0425-1b": _olmo2(2048, 8192, 16, 16, 16),
    "olmo-2-1124-7b": _olmo2(4096, 11008, 32, 32, 32),
    "olmo-2-1124-13b": _olmo2(5120, 13824, 40, 40, 40),
    "olmo-2-0325-32b": _olmo2(5120, 27648, 64, 40, 8),
    "gemma-3-270m": _gemma3(640, 2048, 18, 4, 1, window=512),
    "gemma-3-1b": _gemma3(1152, 6912, 26, 4, 1, window=512),
    "gemma-3-4b": _gemma3(2560, 10_240, 34, 8, 4),
    "gemma-3-12b": _gemma3(3840, 15_360, 48, 16, 8),
    "gemma-3-27b": _gemma3(5376, 21_504, 62, 32, 16, head_dim=128),
    "smollm3-3b": _SMOLLM3,
    "mistral-7b-v0.3": _mistral(14_336, 32, 32_768, 1_000_000.0, ()),
    "ministral-8b-2410": _mistral(12_288, 36, 131_072, 100_000_000.0, (0, 32_768, 32_768, 32_768) * 9),
    "qwen3-30b-a3b": _qwen3_moe(2048, 768, 48, 32),
    "qwen3-235b-a22b": _qwen3_moe(4096, 1536, 94, 64),
    "mixtral-8x7b": ModelConfig(
        *(32_000, 4096, 14_336, 32, 32, 8, 128),
        norm_eps=1e-5,
        tied_head=False,
        qk_norm=None,
        mixture=Mixture(8, 2, names="mixtral"),
        dtype="bfloat16",
    ),
}
"""Known sizes by name: those of the published models (of Qwen2.5, Llama 3, OLMo 2, Mistral and Mixtral the instruct
models; of Gemma 3 the part for text), and those of `TINY`."""


def published(repository: str) -> ModelConfig | None:
    """The known size of a model on the Hub, by its name: Qwen/Qwen2.5-7B-Instruct has that of qwen2.5-7b."""
    name = repository.rpartition("/")[2].lower().removesuffix("-it").replace("-instruct", "").removeprefix("meta-")
    return CONFIGS.get(name) if "/" in repository else None


@dataclass(frozen=True)
class ModelChoice:
    """Which decoder: a model in files, or random weights of a known size, with any size overridden."""

    path: str = ""
    """Folder of a model in Hugging Face's files, its name on the Hub, or a GGUF file, to start training from, with its
    tokenizer. Families: Qwen2.5, Qwen3, Llama 3; not as GGUF: OLMo 2, Gemma 3, SmolLM3, Mistral, Ministral, Qwen3-MoE,
    Mixtral. Empty: random weights of the size below."""
    name: str = "tiny"
    """Known size: tiny, tiny-gemma, tiny-moe or a published one; "?" lists all."""
    hidden_size: int | None = None
    """Width of the residual stream; none, here and below: the named size's."""
    intermediate_size: int | None = None
    """Width of the MLP's hidden layer."""
    num_layers: int | None = None
    """Number of layers."""
    num_heads: int | None = None
    """Query heads."""
    num_kv_heads: int | None = None
    """Key/value heads; must divide num_heads."""
    head_dim: int | None = None
    """Width of a head; even."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Dtype of activations and of weights as used; masters are always float32."""

    def __post_init__(self) -> None:
        if self.dtype is not None:
            object.__setattr__(self, "dtype", dtype_name(self.dtype))

    def with_values(self, **values: Any) -> "ModelChoice":
        """A copy with other values. If they name another model, this one's path and sizes are not copied."""
        named = values.get("path") or values.get("name")
        is_other = bool(named) and named != (self.path or self.name)
        return replace(ModelChoice(name=self.name, dtype=self.dtype) if is_other else self, **values)
