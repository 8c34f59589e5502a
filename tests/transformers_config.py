"""A config.json as transformers reads it. Its config classes load without torch."""

import copy
from typing import Any

from transformers import CONFIG_MAPPING

from aem_jax.models import Llama3Scaling


def in_transformers(theirs: dict[str, Any]) -> dict[str, Any]:
    """The values that transformers' decoder uses. Raises transformers' errors, and for decoders of another form."""
    config = CONFIG_MAPPING[theirs["model_type"]].from_dict(copy.deepcopy(theirs))
    config.standardize_rope_params()  # again, as in the rotary embedding, now that the other fields are set
    rope = config.rope_parameters
    assert rope["rope_type"] in ("default", "llama3") and rope.get("partial_rotary_factor", 1) == 1
    assert set(getattr(config, "layer_types", None) or ["full_attention"]) == {"full_attention"}
    is_qwen2 = config.model_type == "qwen2"  # its decoder reads neither
    assert is_qwen2 or not (config.attention_bias or getattr(config, "mlp_bias", False))
    scaling = None
    if rope["rope_type"] == "llama3":
        names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        scaling = Llama3Scaling(*(rope[name] for name in names))
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_layers": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "num_kv_heads": config.num_key_value_heads,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        "rope_theta": rope["rope_theta"],
        "rope_scaling": scaling,
        "max_positions": config.max_position_embeddings,
        "norm_eps": config.rms_norm_eps,
        "tied_head": config.tie_word_embeddings,
        "qkv_bias": is_qwen2,
        "qk_norm": {"qwen3": "head", "olmo2": "projection"}.get(config.model_type),
        "norm_placement": "post" if config.model_type == "olmo2" else "pre",
        "activation": {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}[config.hidden_act],
    }
