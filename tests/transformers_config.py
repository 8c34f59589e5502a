"""A config.json as transformers reads it. Its config classes load without torch."""

import copy
import math
from typing import Any

from transformers import CONFIG_MAPPING

from aem_jax.models import LinearScaling, Llama3Scaling, RopeScaling, YarnScaling
from aem_jax.models.parameters import Mixture


def in_transformers(theirs: dict[str, Any]) -> dict[str, Any]:
    """The values that transformers' decoder uses. Raises transformers' errors, and for decoders of another form."""
    config: Any = CONFIG_MAPPING[theirs["model_type"]].from_dict(copy.deepcopy(theirs))
    if config.model_type == "gemma3":
        config.text_config.tie_word_embeddings = config.tie_word_embeddings
        config = config.text_config
    config.standardize_rope_params()  # again, as in the rotary embedding, now that the other fields are set
    kind, layers = config.model_type, config.num_hidden_layers
    rope, sliding_theta = config.rope_parameters, None
    if kind == "gemma3_text":
        sliding, rope = rope["sliding_attention"], rope["full_attention"]
        assert sliding["rope_type"] == "default" and sliding.get("partial_rotary_factor", 1) == 1
        sliding_theta = sliding["rope_theta"]
        assert config.attn_logit_softcapping is config.final_logit_softcapping is None
        assert not config.use_bidirectional_attention
    assert rope.get("partial_rotary_factor", 1) == 1
    assert getattr(config, "is_causal", True)  # null means bidirectional, too
    types = getattr(config, "layer_types", None) or ["full_attention"] * layers
    if kind in ("mistral", "qwen3_moe", "mixtral"):  # their decoders do not read the types
        types = ["full_attention" if config.sliding_window is None else "sliding_attention"] * layers
    assert {*types} <= {"full_attention", "sliding_attention"} and len(types) == layers
    is_sliding = [name == "sliding_attention" for name in types]
    if any(is_sliding):  # else the mask fails
        assert (config.sliding_window or 0) > 0 and (
            kind not in ("qwen2", "qwen3", "smollm3") or config.use_sliding_window
        )
    mixture = None
    if kind in ("qwen3_moe", "mixtral"):
        if kind == "qwen3_moe":
            assert not config.mlp_only_layers and config.decoder_sparse_step == 1
        else:
            assert not config.router_jitter_noise
        norm_topk, names = (config.norm_topk_prob, "qwen") if kind == "qwen3_moe" else (True, "mixtral")
        mixture = Mixture(config.num_local_experts, config.num_experts_per_tok, norm_topk, names)  # pyright: ignore
    is_qwen2 = kind == "qwen2"  # its decoder reads neither
    assert is_qwen2 or not (getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False))
    is_gemma = kind == "gemma3_text"
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    placement = {"olmo2": "post", "gemma3_text": "both"}.get(kind, "pre")
    activation = config.hidden_activation if is_gemma else config.hidden_act
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.moe_intermediate_size if kind == "qwen3_moe" else config.intermediate_size,
        "mixture": mixture,
        "num_layers": layers,
        "num_heads": config.num_attention_heads,
        "num_kv_heads": config.num_key_value_heads,
        "head_dim": head_dim,
        "rope_theta": rope["rope_theta"],
        "rope_scaling": _scaling(rope, config.max_position_embeddings),
        "sliding_rope_theta": sliding_theta,
        "unrotated_layers": tuple(i for i in range(layers) if kind == "smollm3" and not config.no_rope_layers[i]),
        "sliding_windows": tuple(config.sliding_window if sliding else 0 for sliding in is_sliding),
        "max_positions": config.max_position_embeddings,
        "norm_eps": config.rms_norm_eps,
        "tied_head": config.tie_word_embeddings,
        "qkv_bias": is_qwen2,
        "qk_norm": {"qwen3": "head", "qwen3_moe": "head", "gemma3_text": "head", "olmo2": "projection"}.get(kind),
        "norm_placement": placement,
        "zero_centered_norms": is_gemma,
        "scaled_embedding": is_gemma,
        "score_dim": config.query_pre_attn_scalar if is_gemma else None,
        "activation": {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}[activation],
    }


def _scaling(rope: dict[str, Any], max_positions: int) -> RopeScaling | None:
    context = "original_max_position_embeddings"
    match rope["rope_type"]:
        case "llama3":
            return Llama3Scaling(*(rope[name] for name in ("factor", "low_freq_factor", "high_freq_factor", context)))
        case "linear":
            return LinearScaling(rope["factor"])
        case "yarn":
            # transformers computes the attention factor together with the frequencies, which needs torch.
            factor, grown = (
                rope["factor"],
                lambda scale: 0.1 * scale * math.log(rope["factor"]) + 1 if factor > 1 else 1.0,
            )
            whole, part = rope.get("mscale"), rope.get("mscale_all_dim")
            magnitude = grown(whole) / grown(part) if whole and part else grown(1)
            given = rope.get("attention_factor")
            fast, slow = rope.get("beta_fast") or 32, rope.get("beta_slow") or 1
            magnitude = magnitude if given is None else given
            return YarnScaling(factor, rope[context], magnitude, fast, slow, rope.get("truncate", True))
    assert rope["rope_type"] == "default"
    return None
