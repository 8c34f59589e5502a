"""`ModelConfig` from Hugging Face's `config.json`, and back. The families are options of one decoder, listed here.

The reader follows the pinned transformers, including the defaults, or refuses a field by its name. It ignores no field
that changes the model. `tests/models/test_families.py` compares the two.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from jax.typing import DTypeLike

from aem_jax.models.config import Activation, ModelConfig, NormPlacement, QKNorm, brief, dtype_name
from aem_jax.models.hf_fields import FLAG, FRACTION, INDEX, SIZE, STRINGS, Kind, one_of, take
from aem_jax.models.hf_rope import rope_to_hf, ropes_from_hf
from aem_jax.models.parameters import ExpertNames, Mixture
from aem_jax.models.rotary import Rope

SAVED_DTYPES = ("bfloat16", "float32", "float16")
"""Dtypes of saved weights."""


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
    windows: Literal["none", "all", "layers"] = "none"
    slides: Callable[[Mapping[str, Any], int], bool] = lambda theirs, layer: theirs.get("sliding_window") is not None
    window_flag: bool = False
    unrotated: bool = False
    sliding_rope: bool = False
    score_dim: bool = False
    activation: str = "hidden_act"
    not_null: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = {}
    experts: ExpertNames | None = None


def _last_layers(theirs: Mapping[str, Any], layer: int) -> bool:
    return theirs.get("sliding_window") is not None and layer >= take(theirs, "max_window_layers", INDEX, 28)


def _unrotated_layers(theirs: Mapping[str, Any], layer: int) -> bool:
    return theirs.get("sliding_window") is not None and layer in _unrotated(theirs, layer + 1)


def _all_but_each_sixth(theirs: Mapping[str, Any], layer: int) -> bool:
    return (layer + 1) % take(theirs, "sliding_window_pattern", SIZE, 6) != 0


_QWEN: Mapping[str, Any] = {
    "windows": "layers",
    "slides": _last_layers,
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
        slides=_unrotated_layers,
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
        slides=_all_but_each_sixth,
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
    "partial_rotary_factor": (1.0, 1, None),
    "quantization_config": (None,),
    "per_layer_config": (None,),
    "text_config": (None,),
    "transformers_weights": (None,),
    "configuration_files": (None,),
}
"""Options that the decoder supports in one form only, and their accepted values; an absent field means the first."""


_SPARSE: Mapping[ExpertNames, Mapping[str, Sequence[Any]]] = {
    "qwen": {"mlp_only_layers": ([], None), "decoder_sparse_step": (1,)},
    "mixtral": {"router_jitter_noise": (0.0, 0)},
}
"""The same for a mixture of experts, by its names: every layer is one."""


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
        mixture, sizes["intermediate_size"] = _mixture(theirs, family.experts)
    hidden, heads = sizes["hidden_size"], sizes["num_heads"]
    windows = _windows(theirs, family, sizes["num_layers"])
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
        unrotated_layers=_unrotated(theirs, sizes["num_layers"]) if family.unrotated else (),
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


def config_to_hf(config: ModelConfig, dtype: DTypeLike) -> dict[str, Any]:
    """A `config.json` that transformers reads as the same model.

    Args:
        config: config of the model.
        dtype: dtype of the saved weights.

    Raises:
        ValueError: no family combines these options.
    """
    families = [family for family in FAMILIES if _options(family) == _options(config) and _can_express(family, config)]
    family = next((row for row in families if row.architecture == config.architecture), (*families, None)[0])
    if family is None:
        layers = {name: getattr(config, name) for name in ("sliding_windows", "unrotated_layers", "score_dim")}
        raise ValueError(f"expected the options of a family ({_names()}), got {_options(config) | layers}")
    rope = rope_to_hf(Rope(config.rope_theta, config.rope_scaling))
    written = {"rope_theta": config.rope_theta, "rope_parameters": rope}
    if family.sliding_rope:
        sliding = rope_to_hf(Rope(config.sliding_rope_theta or config.rope_theta))
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
        **_windows_to_hf(family, config),
        **({"query_pre_attn_scalar": config.score_dim or config.head_dim} if family.score_dim else {}),
        "tie_word_embeddings": config.tied_head,
        **(_mixture_to_hf(config.mixture, config.intermediate_size) if config.mixture else {}),
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
    )


def _windows_to_hf(family: Family, config: ModelConfig) -> dict[str, Any]:
    """The fields that say which layers have a sliding window, and which have no rotary positions."""
    size = max(config.windows) or None
    kinds = ["sliding_attention" if window else "full_attention" for window in config.windows]
    unrotated = [int(layer not in config.unrotated_layers) for layer in range(config.num_layers)]
    fields: dict[str, Any] = {"no_rope_layers": unrotated} if family.unrotated else {}
    if family.windows == "none" or (family.window_flag and size is None):
        return fields
    fields |= {"sliding_window": size} | ({"use_sliding_window": True} if family.window_flag else {})
    return fields if family.windows == "all" else fields | {"layer_types": kinds}


def _mixture(theirs: Mapping[str, Any], names: ExpertNames) -> tuple[Mixture, int]:
    """The mixture of a `config.json`, and the width of an expert."""
    for name, values in _SPARSE[names].items():
        one_of(theirs, name, values)
    # In transformers these are one field.
    counts = [name for name in ("num_experts", "num_local_experts") if name in theirs]
    if len({theirs[name] for name in counts if type(theirs[name]) is int}) > 1:
        raise ValueError(f"expected num_experts or num_local_experts, got both: {brief([theirs[n] for n in counts])}")
    default, k, width = {"qwen": (128, 8, 768), "mixtral": (8, 2, None)}[names]
    width_of = {"qwen": "moe_intermediate_size", "mixtral": "intermediate_size"}[names]
    return Mixture(
        num_experts=min(take(theirs, name, SIZE, default) for name in counts or ("num_experts",)),
        experts_per_token=take(theirs, "num_experts_per_tok", SIZE, k),
        norm_topk=names == "mixtral" or take(theirs, "norm_topk_prob", FLAG, False),
        names=names,
    ), take(theirs, width_of, SIZE, width)


def _mixture_to_hf(mixture: Mixture, width: int) -> dict[str, Any]:
    common = {"num_experts_per_tok": mixture.experts_per_token, "output_router_logits": False}
    if mixture.names == "mixtral":
        if not mixture.norm_topk:
            raise ValueError(
                "expected norm_topk True of Mixtral's mixture, got False; no family combines these options"
            )
        return common | {"num_local_experts": mixture.num_experts}
    return common | {
        "num_experts": mixture.num_experts,
        "moe_intermediate_size": width,
        "norm_topk_prob": mixture.norm_topk,
        "mlp_only_layers": [],
        "decoder_sparse_step": 1,
    }


def _names() -> str:
    return ", ".join(family.architecture for family in FAMILIES)


def _text_part(theirs: Mapping[str, Any]) -> Mapping[str, Any]:
    """The `config.json` of the text part of a model that reads images, too; any other as it is."""
    kind = theirs.get("model_type")
    if not isinstance(kind, str) or kind not in _TEXT_PARTS:
        return theirs
    part = theirs.get("text_config")
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
        f"{brief(kind)}; a family is a row of FAMILIES in aem_jax/models/families.py"
    )


def _windows(theirs: Mapping[str, Any], family: Family, layers: int) -> tuple[int, ...]:
    """The sliding window of each layer; 0 for none."""
    flag = take(theirs, "use_sliding_window", FLAG, False)
    if family.windows == "none" or (family.window_flag and not flag):
        if not family.window_flag:
            one_of(theirs, "use_sliding_window", (False,))
        take(theirs, "layer_types", _layer_types(layers, "full_attention"), None)
        return ()
    if not family.window_flag:
        one_of(theirs, "use_sliding_window", (False,))
    if family.windows == "all":
        one_of(theirs, "layer_types", (None,))
    kinds = take(theirs, "layer_types", _layer_types(layers, "full_attention", "sliding_attention"), None)
    if kinds is None:
        slides = (family.slides(theirs, layer) for layer in range(layers))
        kinds = ["sliding_attention" if sliding else "full_attention" for sliding in slides]
    if "sliding_attention" not in kinds:
        return ()
    size = take(theirs, "sliding_window", SIZE)
    return tuple(size if kind == "sliding_attention" else 0 for kind in kinds)


def _unrotated(theirs: Mapping[str, Any], layers: int) -> tuple[int, ...]:
    """Indices of the first `layers` layers that have no rotary positions."""
    rotated = take(theirs, "no_rope_layers", _rotated(layers), None)
    if rotated is None:
        interval = take(theirs, "no_rope_layer_interval", SIZE, 4)
        rotated = [(layer + 1) % interval != 0 for layer in range(layers)]
    return tuple(layer for layer in range(layers) if not rotated[layer])


_ACTIVATION = Kind(" or ".join(map(repr, _ACTIVATIONS)), lambda x: isinstance(x, str) and x in _ACTIVATIONS)


def _layer_types(layers: int, *kinds: str) -> Kind:
    fits = lambda x: isinstance(x, list) and len(x) == layers and all(layer in kinds for layer in x)
    return Kind(f"{' or '.join(map(repr, kinds))} for each of {layers} layers", lambda x: x is None or fits(x))


def _rotated(layers: int) -> Kind:
    fits = lambda x: (
        isinstance(x, list) and len(x) >= layers and all(type(flag) is int and flag in (0, 1) for flag in x)
    )
    return Kind(f"0 or 1 for each of {layers} layers", lambda x: x is None or fits(x))
