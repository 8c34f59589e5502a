"""`ModelConfig` from Hugging Face's `config.json`, and back. The families are options of one decoder, listed here.

The reader follows the pinned transformers, including the defaults, or refuses a field by its name. It ignores no field
that changes the model. `tests/models/test_families.py` compares the two.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from jax.typing import DTypeLike

from aem_jax.models.config import Activation, ModelConfig, NormPlacement, QKNorm, RopeScaling, brief, dtype_name

SAVED_DTYPES = ("bfloat16", "float32", "float16")
"""Dtypes of saved weights."""


class Family(NamedTuple):
    """The differences between families.

    Attributes:
        architecture: entry of `architectures`.
        model_type: `model_type`.
        num_kv_heads: default for a file without it; None is the number of query heads.
        head_dim: default for a file without it; None is hidden size / query heads.
        norm_placement: as in `ModelConfig`.
        qk_norm: as in `ModelConfig`.
        qkv_bias: as in `ModelConfig`.
        sliding_windows: as in `ModelConfig`; a `config.json` that has some is refused.
    """

    architecture: str
    model_type: str
    num_kv_heads: int | None
    head_dim: int | None
    norm_placement: NormPlacement = "pre"
    qk_norm: QKNorm | None = None
    qkv_bias: bool = False
    sliding_windows: tuple[int, ...] = ()


FAMILIES = (
    Family("Qwen2ForCausalLM", "qwen2", num_kv_heads=32, head_dim=None, qkv_bias=True),
    Family("Qwen3ForCausalLM", "qwen3", num_kv_heads=32, head_dim=128, qk_norm="head"),
    Family("LlamaForCausalLM", "llama", num_kv_heads=None, head_dim=None),
    Family(
        *("Olmo2ForCausalLM", "olmo2"),
        num_kv_heads=None,
        head_dim=None,
        norm_placement="post",
        qk_norm="projection",
    ),
)


def _options(of: Family | ModelConfig) -> dict[str, Any]:
    """The options that a family determines."""
    return {name: getattr(of, name) for name in ("norm_placement", "qk_norm", "qkv_bias", "sliding_windows")}


_ACTIVATIONS: Mapping[str, Activation] = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
"""Hugging Face's `hidden_act` -> `ModelConfig.activation`; the first name of an activation is the written one."""

_SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "max_positions": "max_position_embeddings",
}
"""Field of `ModelConfig` -> required field of `config.json`."""

_ONE_FORM: Mapping[str, Sequence[Any]] = {
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "use_sliding_window": (False,),
    "partial_rotary_factor": (1.0, 1, None),
    "quantization_config": (None,),
    "per_layer_config": (None,),
    "text_config": (None,),
    "transformers_weights": (None,),
    "configuration_files": (None,),
}
"""Options that the decoder supports in one form only, and their accepted values; an absent field means the first."""

_LLAMA3 = {
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_context": "original_max_position_embeddings",
}

_REQUIRED: Any = object()


def config_from_hf(theirs: Mapping[str, Any], dtype: DTypeLike = "bfloat16") -> ModelConfig:
    """The `ModelConfig` of a `config.json`.

    Args:
        theirs: its content, as transformers 4 or 5 writes it.
        dtype: of activations and of weights as used.

    Raises:
        ValueError: the decoder does not support the family or an option, or a field is missing or has the wrong type;
            the error names it.
    """
    if not isinstance(theirs, Mapping):
        raise ValueError(f"expected an object, got {brief(theirs)}")
    family = _family(theirs)
    theirs = {"num_key_value_heads": family.num_kv_heads, "head_dim": family.head_dim, **theirs}
    for name, values in _ONE_FORM.items():
        _one_of(theirs, name, values)
    sizes = {ours: _take(theirs, name, _SIZE) for ours, name in _SIZES.items()}
    hidden, heads = sizes["hidden_size"], sizes["num_heads"]
    _take(theirs, "layer_types", _full_attention(sizes["num_layers"]), None)
    if family.model_type == "llama" and hidden % heads:
        raise ValueError(f"expected hidden_size divisible by num_attention_heads, got {hidden} and {heads}")
    if family.head_dim and theirs["head_dim"] is None:
        raise ValueError(f"expected head_dim to be {_SIZE.words}, got null (model_type {family.model_type})")
    theta, scaling = _rope(theirs, sizes["max_positions"])
    filled = {"num_key_value_heads": heads, "head_dim": hidden // heads} | {
        name: value for name, value in theirs.items() if value is not None
    }
    return ModelConfig(
        **sizes,
        num_kv_heads=_take(filled, "num_key_value_heads", _SIZE),
        head_dim=_take(filled, "head_dim", _SIZE),
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=_take(theirs, "rms_norm_eps", _FRACTION),
        tied_head=_take(theirs, "tie_word_embeddings", _FLAG, False),
        activation=_ACTIVATIONS[_take(theirs, "hidden_act", _ACTIVATION, "silu")],
        **_options(family),
        dtype=dtype_name(dtype),
    )


def config_to_hf(config: ModelConfig, dtype: DTypeLike) -> dict[str, Any]:
    """A `config.json` that transformers reads as the same model.

    Args:
        config: config of the model.
        dtype: dtype of the saved weights.

    Raises:
        ValueError: no family combines these options.
    """
    family = next((row for row in FAMILIES if _options(row) == _options(config)), None)
    if family is None:
        raise ValueError(f"expected the options of a family ({_names()}), got {_options(config)}")
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling:
        stretched = {name: getattr(config.rope_scaling, ours) for ours, name in _LLAMA3.items()}
        rope |= {"rope_type": "llama3", **stretched}
    return {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        **{name: getattr(config, ours) for ours, name in _SIZES.items()},
        "rms_norm_eps": config.norm_eps,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": next(name for name, ours in _ACTIVATIONS.items() if ours == config.activation),
        "rope_theta": config.rope_theta,
        "rope_parameters": rope,
        "tie_word_embeddings": config.tied_head,
        "dtype": dtype_name(dtype, SAVED_DTYPES),
    }


def _names() -> str:
    return ", ".join(family.architecture for family in FAMILIES)


def _family(theirs: Mapping[str, Any]) -> Family:
    """The family of `model_type`, as in transformers; `architectures` must not name another one."""
    architectures, kind = _take(theirs, "architectures", _STRINGS, None) or [], theirs.get("model_type")
    if architectures or kind is not None:
        for family in FAMILIES:
            if kind in (None, family.model_type) and (not architectures or family.architecture in architectures):
                return family
    raise ValueError(
        f"expected one of {_names()} in architectures and its model_type, got {brief(architectures)} and {brief(kind)}"
    )


def _rope(theirs: Mapping[str, Any], max_positions: int) -> tuple[float, RopeScaling | None]:
    """(theta, scaling), from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (4).

    As in transformers, `rope_scaling` replaces `rope_parameters`, and a `rope_theta` inside either object takes
    precedence over the one outside.
    """
    objects = {name: _take(theirs, name, _OBJECT, None) for name in ("rope_scaling", "rope_parameters")}
    source = "rope_scaling" if objects["rope_scaling"] else "rope_parameters"
    rope = objects[source] or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise ValueError(f"expected {source}.rope_type 'default' or 'llama3', got {brief(kind)}")
    known = ["rope_type", "type", "rope_theta", "partial_rotary_factor"]
    known += _LLAMA3.values() if kind == "llama3" else ()
    if unknown := [name for name in rope if name not in known]:
        raise ValueError(
            f"expected {source} of rope_type {kind!r} to have {', '.join(known)} alone, got {brief(unknown)}"
        )
    _one_of(rope, "partial_rotary_factor", (1.0, 1))
    theta = _take({"rope_theta": theirs.get("rope_theta", 10_000.0), **rope}, "rope_theta", _POSITIVE)
    if kind == "default":
        return float(theta), None
    name = "original_max_position_embeddings"  # in transformers the field outside the object takes precedence
    context = _take(theirs if name in theirs else {name: max_positions, **rope}, name, _SIZE)
    factors = (float(_take(rope, name, _POSITIVE)) for name in ("factor", "low_freq_factor", "high_freq_factor"))
    return float(theta), RopeScaling(*factors, original_context=context)


class _Kind(NamedTuple):
    """The required type of a value: a description and a test."""

    words: str
    holds: Callable[[Any], bool]


_SIZE = _Kind("a whole number from 1 to 2147483647", lambda x: type(x) is int and 0 < x < 2**31)
_POSITIVE = _Kind("a number above 0", lambda x: type(x) in (int, float) and 0 < x < 1e38)
_FRACTION = _Kind("a fraction between 0 and 1", lambda x: type(x) is float and 0 < x < 1)
_FLAG = _Kind("true or false", lambda x: type(x) is bool)
_OBJECT = _Kind("an object or null", lambda x: x is None or isinstance(x, Mapping))
_ACTIVATION = _Kind(" or ".join(map(repr, _ACTIVATIONS)), lambda x: isinstance(x, str) and x in _ACTIVATIONS)
_STRINGS = _Kind(
    "a list of strings or null", lambda x: x is None or (isinstance(x, list) and all(type(item) is str for item in x))
)


def _full_attention(layers: int) -> _Kind:
    is_full = lambda x: isinstance(x, list) and len(x) == layers and all(layer == "full_attention" for layer in x)
    return _Kind(f"'full_attention' for each of {layers} layers", lambda x: x is None or is_full(x))


def _take(fields: Mapping[str, Any], name: str, kind: _Kind, default: Any = _REQUIRED) -> Any:
    """The value of a field, checked."""
    value = fields.get(name, default)
    if value is _REQUIRED:
        raise ValueError(f"expected {name} to be {kind.words}, got no such field")
    if not kind.holds(value):
        raise ValueError(f"expected {name} to be {kind.words}, got {brief(value)}")
    return value


def _one_of(fields: Mapping[str, Any], name: str, values: Sequence[Any]) -> None:
    """Checks that a field is absent or equals one of `values`, type included: true is not 1."""
    value = fields.get(name, values[0])
    if not any(type(value) is type(accepted) and value == accepted for accepted in values):
        raise ValueError(f"expected {name} = {values[0]!r}, got {brief(value)}; the decoder has no other form")
