"""`ModelConfig` from Hugging Face's `config.json`, and back. The families are options of one decoder, listed here.

The reader follows the pinned transformers, including the defaults, or refuses a field by its name. It ignores no field
that changes the model. `tests/models/test_families.py` compares the two.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jax.typing import DTypeLike

from aem_jax.models.config import Activation, ModelConfig, NormPlacement, QKNorm, brief, dtype_name
from aem_jax.models.hf_fields import FLAG, FRACTION, SIZE, STRINGS, Kind, one_of, take
from aem_jax.models.hf_layers import (
    Slides,
    Windows,
    all_but_each_sixth,
    every_layer,
    last_layers,
    layers_to_hf,
    layers_without_rope,
    unrotated_from_hf,
    windows_from_hf,
)
from aem_jax.models.hf_mixture import mixture_from_hf, mixture_to_hf
from aem_jax.models.hf_rope import rope_to_hf, ropes_from_hf
from aem_jax.models.parameters import ExpertNames
from aem_jax.models.rotary import Rope

SAVED_DTYPES = ("bfloat16", "float32", "float16")
"""Dtypes of saved weights."""

TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id")
"""Fields of a config.json with ids of the tokenizer."""


class Family(NamedTuple):
    """The differences between families.

    Attributes:
        architecture: entry of `architectures`.
        model_type: `model_type`.
        num_kv_heads: default for a file without it; None is the number of query heads.
        head_dim: default for a file without it; None is hidden size / query heads.
        norm_placement: as in `ModelConfig`, like the next four.
        qk_norm: see there.
        qkv_bias: see there.
        zero_centered_norms: see there.
        scaled_embedding: see there.
        windows: which layers can have a sliding window: none, all or none of them, or those of `layer_types`.
        slides: (config.json, layer) -> whether a layer has a window in a file without `layer_types`.
        window_flag: whether windows count with `use_sliding_window` alone.
        unrotated: whether `no_rope_layers` names layers without rotary positions.
        sliding_rope: whether layers with a window have rotary positions of their own, which are not scaled.
        score_dim: whether `query_pre_attn_scalar` sets `ModelConfig.score_dim`.
        activation: the field of the MLP's activation.
        not_null: fields that may be absent, but not null.
        defaults: values of further fields for a file without them.
        experts: names of the experts' tensors (`Mixture.names`); None without experts.
    """

    architecture: str
    model_type: str
    num_kv_heads: int | None
    head_dim: int | None
    norm_placement: NormPlacement = "pre"
    qk_norm: QKNorm | None = None
    qkv_bias: bool = False
    zero_centered_norms: bool = False
    scaled_embedding: bool = False
    windows: Windows = "none"
    slides: Slides = every_layer
    window_flag: bool = False
    unrotated: bool = False
    sliding_rope: bool = False
    score_dim: bool = False
    activation: str = "hidden_act"
    not_null: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = {}
    experts: ExpertNames | None = None


_QWEN: Mapping[str, Any] = {
    "windows": "layers",
    "slides": last_layers,
    "window_flag": True,
    "defaults": {"sliding_window": 4096},
}
FAMILIES = (
    Family("Qwen2ForCausalLM", "qwen2", num_kv_heads=32, head_dim=None, qkv_bias=True, **_QWEN),
    Family("Qwen3ForCausalLM", "qwen3", num_kv_heads=32, head_dim=128, qk_norm="head", not_null=("head_dim",), **_QWEN),
    Family("LlamaForCausalLM", "llama", num_kv_heads=None, head_dim=None),
    Family(
        *("Olmo2ForCausalLM", "olmo2"),
        num_kv_heads=None,
        head_dim=None,
        norm_placement="post",
        qk_norm="projection",
    ),
    Family(
        *("MistralForCausalLM", "mistral"),
        num_kv_heads=8,
        head_dim=None,
        windows="all",
        not_null=("num_key_value_heads",),
        defaults={"sliding_window": 4096},
    ),
    Family(
        *("MinistralForCausalLM", "ministral"),
        num_kv_heads=8,
        head_dim=None,
        windows="layers",
        not_null=("num_key_value_heads",),
        defaults={"sliding_window": 4096},
    ),
    Family(
        *("SmolLM3ForCausalLM", "smollm3"),
        num_kv_heads=4,
        head_dim=None,
        windows="layers",
        slides=layers_without_rope,
        window_flag=True,
        unrotated=True,
        defaults={"tie_word_embeddings": True, "rope_theta": 2_000_000.0},
    ),
    Family(
        *("Gemma3ForCausalLM", "gemma3_text"),
        num_kv_heads=4,
        head_dim=256,
        norm_placement="both",
        qk_norm="head",
        zero_centered_norms=True,
        scaled_embedding=True,
        windows="layers",
        slides=all_but_each_sixth,
        sliding_rope=True,
        score_dim=True,
        activation="hidden_activation",
        not_null=("num_key_value_heads", "head_dim"),
        defaults={
            "vocab_size": 262_208,
            "hidden_size": 2304,
            "intermediate_size": 9216,
            "num_hidden_layers": 26,
            "num_attention_heads": 8,
            "max_position_embeddings": 131_072,
            "rms_norm_eps": 1e-6,
            "hidden_activation": "gelu_pytorch_tanh",
            "tie_word_embeddings": True,
            "sliding_window": 4096,
            "query_pre_attn_scalar": 256,
            "rope_theta": 1_000_000.0,
            "rope_local_base_freq": 10_000.0,
        },
    ),
    Family(
        *("Qwen3MoeForCausalLM", "qwen3_moe"),
        num_kv_heads=4,
        head_dim=None,
        qk_norm="head",
        windows="all",
        window_flag=True,
        not_null=("num_key_value_heads",),
        defaults={"sliding_window": 4096},
        experts="qwen",
    ),
    Family(
        *("MixtralForCausalLM", "mixtral"),
        num_kv_heads=8,
        head_dim=None,
        windows="all",
        not_null=("num_key_value_heads",),
        defaults={"rope_theta": 1_000_000.0},
        experts="mixtral",
    ),
)
_TEXT_PARTS = {"gemma3": "gemma3_text"}
"""`model_type` of a model that reads images, too -> that of its text part, which is read."""


def _options(of: Family | ModelConfig) -> dict[str, Any]:
    """The options that a family determines."""
    names = ("norm_placement", "qk_norm", "qkv_bias", "zero_centered_norms", "scaled_embedding")
    experts = of.experts if isinstance(of, Family) else of.mixture and of.mixture.names
    return {name: getattr(of, name) for name in names} | {"experts": experts}


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
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "use_bidirectional_attention": (False, None),
    "is_causal": (True,),
    "partial_rotary_factor": (1.0, 1, None),
    "quantization_config": (None,),
    "per_layer_config": (None,),
    "text_config": (None,),
    "transformers_weights": (None,),
    "configuration_files": (None,),
}
"""Options that the decoder supports in one form only, and their accepted values; an absent field means the first."""


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
    family, theirs = _family(_text_part(theirs))
    theirs = {"num_key_value_heads": family.num_kv_heads, "head_dim": family.head_dim, **family.defaults, **theirs}
    for name, values in _ONE_FORM.items():
        one_of(theirs, name, values)
    sizes = {ours: take(theirs, name, SIZE) for ours, name in _SIZES.items()}
    mixture = None
    if family.experts is not None:
        mixture, sizes["intermediate_size"] = mixture_from_hf(theirs, family.experts)
    hidden, heads = sizes["hidden_size"], sizes["num_heads"]
    layers = {"windows": family.windows, "window_flag": family.window_flag}
    windows = windows_from_hf(theirs, sizes["num_layers"], **layers, slides=family.slides)
    if family.model_type in ("llama", "gemma3_text") and hidden % heads:
        raise ValueError(f"expected hidden_size divisible by num_attention_heads, got {hidden} and {heads}")
    for name in family.not_null:
        if theirs[name] is None:
            raise ValueError(f"expected {name} to be {SIZE.words}, got null (model_type {family.model_type})")
    of_all, sliding = ropes_from_hf(theirs, own_sliding=family.sliding_rope, max_positions=sizes["max_positions"])
    filled = {"num_key_value_heads": heads, "head_dim": hidden // heads} | {
        name: value for name, value in theirs.items() if value is not None
    }
    return ModelConfig(
        **sizes,
        num_kv_heads=take(filled, "num_key_value_heads", SIZE),
        head_dim=take(filled, "head_dim", SIZE),
        rope_theta=of_all.theta,
        rope_scaling=of_all.scaling,
        sliding_rope_theta=sliding,
        unrotated_layers=unrotated_from_hf(theirs, sizes["num_layers"]) if family.unrotated else (),
        sliding_windows=windows,
        norm_eps=take(theirs, "rms_norm_eps", FRACTION),
        tied_head=take(theirs, "tie_word_embeddings", FLAG, False),
        activation=_ACTIVATIONS[take(theirs, family.activation, _ACTIVATION, "silu")],
        score_dim=take(theirs, "query_pre_attn_scalar", SIZE) if family.score_dim else None,
        **{name: value for name, value in _options(family).items() if name != "experts"},
        mixture=mixture,
        dtype=dtype_name(dtype),
        architecture=family.architecture,
    )


def config_to_hf(config: ModelConfig, dtype: DTypeLike, token_ids: Mapping[str, int] = {}) -> dict[str, Any]:
    """A `config.json` that transformers reads as the same model.

    Args:
        config: config of the model.
        dtype: dtype of the saved weights.
        token_ids: ids of the tokenizer's `TOKENS`. Those that are missing are written as null: transformers has ids of
            its own for a file without them, which may lie beyond the vocabulary (SmolLM3's padding).

    Raises:
        ValueError: no family combines these options.
    """
    families = [family for family in FAMILIES if _options(family) == _options(config) and _can_express(family, config)]
    family = next((row for row in families if row.architecture == config.architecture), (*families, None)[0])
    if family is None:
        names = ("sliding_windows", "unrotated_layers", "score_dim", "rope_scaling")
        layers = {name: getattr(config, name) for name in names}
        raise ValueError(f"expected the options of a family ({_names()}), got {_options(config) | layers}")
    rope = rope_to_hf(Rope(config.rope_theta, config.rope_scaling))
    written = {"rope_theta": config.rope_theta, "rope_parameters": rope}
    if family.sliding_rope:
        sliding = rope_to_hf(Rope(config.sliding_rope_theta or config.rope_theta))
        rope.pop("truncate", None)  # transformers reads it outside of such an object alone; `_can_express` needs True
        written = {"rope_parameters": {"full_attention": rope, "sliding_attention": sliding}}
    return {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        **{name: getattr(config, ours) for ours, name in _SIZES.items()},
        "rms_norm_eps": config.norm_eps,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        family.activation: next(name for name, ours in _ACTIVATIONS.items() if ours == config.activation),
        **written,
        **layers_to_hf(config, windows=family.windows, window_flag=family.window_flag, unrotated=family.unrotated),
        **({"query_pre_attn_scalar": config.score_dim or config.head_dim} if family.score_dim else {}),
        "tie_word_embeddings": config.tied_head,
        **(mixture_to_hf(config.mixture, config.intermediate_size) if config.mixture else {}),
        **{name: token_ids.get(name) for name in TOKENS},
        "dtype": dtype_name(dtype, SAVED_DTYPES),
    }


def _can_express(family: Family, config: ModelConfig) -> bool:
    """Whether the fields of a family can say which layers have windows and rotary positions, and which."""
    windows = set(config.windows)
    one_window = {"none": windows == {0}, "all": len(windows) == 1, "layers": len(windows - {0}) < 2}[family.windows]
    ropes = {rope for rope in config.ropes if rope} | {Rope(config.rope_theta, config.rope_scaling)}
    sliding = Rope(config.sliding_rope_theta or config.rope_theta)
    return (
        one_window
        and (family.unrotated or not config.unrotated_layers)
        and (family.score_dim or config.score_dim is None)
        and (len(ropes) == 1 or family.sliding_rope)
        and (not family.sliding_rope or not any(windows) or sliding in ropes)
        and (not family.sliding_rope or getattr(config.rope_scaling, "truncate", True))
    )


def _names() -> str:
    return ", ".join(family.architecture for family in FAMILIES)


def reads_images(theirs: Mapping[str, Any]) -> bool:
    """Whether a `config.json` is that of a model that reads images, too, whose text part is the `ModelConfig`."""
    kind = theirs.get("model_type")
    return isinstance(kind, str) and kind in _TEXT_PARTS


def _text_part(theirs: Mapping[str, Any]) -> Mapping[str, Any]:
    """The `config.json` of the text part of a model that reads images, too; any other as it is."""
    if not reads_images(theirs):
        return theirs
    kind, part = theirs["model_type"], theirs.get("text_config")
    if not isinstance(part, Mapping):
        raise ValueError(f"expected text_config to be an object, got {brief(part)}")
    if part.get("model_type", _TEXT_PARTS[kind]) != _TEXT_PARTS[kind]:
        raise ValueError(f"expected text_config.model_type {_TEXT_PARTS[kind]!r}, got {brief(part['model_type'])}")
    one_of(theirs, "quantization_config", (None,))
    outer = {name: theirs[name] for name in ("tie_word_embeddings",) if name in theirs}
    return {**part, **outer, "model_type": _TEXT_PARTS[kind], "architectures": None}


def _family(theirs: Mapping[str, Any]) -> tuple[Family, Mapping[str, Any]]:
    """The family of `model_type`, as in transformers, and `theirs`; `architectures` must not name another one."""
    architectures, kind = take(theirs, "architectures", STRINGS, None) or [], theirs.get("model_type")
    if architectures or kind is not None:
        for family in FAMILIES:
            if kind in (None, family.model_type) and (not architectures or family.architecture in architectures):
                return family, theirs
    raise ValueError(
        f"expected one of {_names()} in architectures and its model_type, got {brief(architectures)} and "
        f"{brief(kind)}; a family is a row of FAMILIES in aem_jax/models/families.py: see "
        "docs/tutorials/add_a_family.md"
    )


_ACTIVATION = Kind(" or ".join(map(repr, _ACTIVATIONS)), lambda x: isinstance(x, str) and x in _ACTIVATIONS)
