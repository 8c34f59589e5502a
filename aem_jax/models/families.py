"""Hugging Face's `config.json` and ours, both ways. The families differ by options of one decoder, listed here."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from aem_jax.models.config import ModelConfig, RopeScaling


class Family(NamedTuple):
    """What tells one family from another.

    Attributes:
        architecture: entry of `architectures`.
        model_type: `model_type`.
        qkv_bias: option of `ModelConfig`.
        qk_norm: option of `ModelConfig`.
    """

    architecture: str
    model_type: str
    qkv_bias: bool
    qk_norm: bool


FAMILIES = (
    Family("Qwen2ForCausalLM", "qwen2", qkv_bias=True, qk_norm=False),
    Family("Qwen3ForCausalLM", "qwen3", qkv_bias=False, qk_norm=True),
    Family("LlamaForCausalLM", "llama", qkv_bias=False, qk_norm=False),
)

_SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "max_positions": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
}
"""Ours -> theirs, always there."""

_MUST_BE = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "use_sliding_window": False}
"""Options that the decoder has one form of; absent means that form."""

_LLAMA3 = {
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_context": "original_max_position_embeddings",
}


def config_from_hf(theirs: Mapping[str, Any], dtype: str = "bfloat16") -> ModelConfig:
    """Our config of a `config.json`.

    Args:
        theirs: its content, as transformers 4 or 5 writes it.
        dtype: of activations and of weights as used.

    Raises:
        ValueError: a family or an option that the decoder does not have, or a field that is missing; names it.
    """
    family = _family(theirs)
    for name, value in _MUST_BE.items():
        if theirs.get(name, value) != value:
            raise ValueError(f"expected {name} = {value!r}, got {theirs[name]!r}; the decoder has no other form")
    if odd := {kind for kind in theirs.get("layer_types") or () if kind != "full_attention"}:
        raise ValueError(f"expected layer_types of full_attention, got {sorted(odd)}; the decoder has no other form")
    missing = [name for name in _SIZES.values() if name not in theirs]
    if missing:
        raise ValueError(f"expected {', '.join(missing)}, got {sorted(theirs)}")
    sizes = {ours: theirs[name] for ours, name in _SIZES.items()}
    theta, scaling = _rope(theirs)
    return ModelConfig(
        **sizes,
        num_kv_heads=theirs.get("num_key_value_heads") or sizes["num_heads"],
        head_dim=theirs.get("head_dim") or sizes["hidden_size"] // sizes["num_heads"],
        rope_theta=theta,
        rope_scaling=scaling,
        tied_head=bool(theirs.get("tie_word_embeddings", False)),
        qk_norm=family.qk_norm,
        qkv_bias=family.qkv_bias,
        dtype=dtype,
    )


def config_to_hf(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """A `config.json` that transformers reads as the same model.

    Args:
        config: ours.
        dtype: of the saved weights.

    Raises:
        ValueError: options that no family has together.
    """
    options = (config.qkv_bias, config.qk_norm)
    family = next((each for each in FAMILIES if (each.qkv_bias, each.qk_norm) == options), None)
    if family is None:
        raise ValueError(f"expected qkv_bias or qk_norm, got both; families are {_names()}")
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling:
        stretched = {name: getattr(config.rope_scaling, ours) for ours, name in _LLAMA3.items()}
        rope |= {"rope_type": "llama3", **stretched}
    return {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        **{name: getattr(config, ours) for ours, name in _SIZES.items()},
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rope_theta": config.rope_theta,
        "rope_parameters": rope,
        "tie_word_embeddings": config.tied_head,
        "dtype": dtype,
    }


def _names() -> str:
    return ", ".join(family.architecture for family in FAMILIES)


def _family(theirs: Mapping[str, Any]) -> Family:
    named = theirs.get("architectures") or ()
    for family in FAMILIES:
        if family.architecture in named or (not named and theirs.get("model_type") == family.model_type):
            return family
    got = list(named) or theirs.get("model_type")
    raise ValueError(f"expected one of {_names()} in architectures, got {got}")


def _rope(theirs: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """(theta, scaling), from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (4)."""
    rope = dict(theirs.get("rope_parameters") or theirs.get("rope_scaling") or {})
    theta = rope.get("rope_theta", theirs.get("rope_theta", 10_000.0))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return float(theta), None
    if kind != "llama3":
        raise ValueError(f"expected rope_type 'default' or 'llama3', got {kind!r}")
    missing = [name for name in _LLAMA3.values() if name not in rope]
    if missing:
        raise ValueError(f"expected {', '.join(missing)} with rope_type 'llama3', got {sorted(rope)}")
    return float(theta), RopeScaling(**{ours: rope[name] for ours, name in _LLAMA3.items()})
