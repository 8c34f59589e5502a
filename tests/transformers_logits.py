"""Hugging Face transformers (torch) with our parameters: the reference for logits, and what is kept of gradients.

torch is imported late.
"""

from typing import Any

import numpy as np


def logits(config, params, tokens: np.ndarray) -> np.ndarray:
    """float32 logits [B,T,V] with our parameters: of OLMo2 where norms are placed after a sublayer, else of Qwen3."""
    import torch
    from transformers import Olmo2Config, Olmo2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

    is_post = config.norm_placement == "post"
    classes: tuple[Any, Any] = (Olmo2Config, Olmo2ForCausalLM) if is_post else (Qwen3Config, Qwen3ForCausalLM)
    make_config, make_model = classes
    windows = config.sliding_windows  # 0, or the same for all layers
    theirs = make_config(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        rms_norm_eps=config.norm_eps,
        tie_word_embeddings=config.tied_head,
        hidden_act={"silu": "silu", "gelu_tanh": "gelu_pytorch_tanh"}[config.activation],
        pad_token_id=None,
        use_sliding_window=bool(windows),
        sliding_window=max(windows, default=None),
        layer_types=["sliding_attention" if size else "full_attention" for size in windows] or None,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        attn_implementation="eager",  # pyright: ignore[reportCallIssue]
    )
    model = make_model(theirs).to(torch.float32).eval()
    weights = {"model.embed_tokens.weight": params["base"]["embed"], "model.norm.weight": params["base"]["norm"]}
    weights["lm_head.weight"] = params["base"]["embed"] if config.tied_head else np.asarray(params["base"]["head"]).T
    layers = {name: np.asarray(value) for name, value in params["base"]["layers"].items()}
    for i in range(config.num_layers):
        at = f"model.layers.{i}"
        groups = layers["qkv"][i]  # [D, KV, queries + key + value, Dh]
        for name, part in {"q": groups[:, :, :-2], "k": groups[:, :, -2], "v": groups[:, :, -1]}.items():
            weights[f"{at}.self_attn.{name}_proj.weight"] = part.reshape(config.hidden_size, -1).T
        weights[f"{at}.self_attn.o_proj.weight"] = layers["o"][i].reshape(-1, config.hidden_size).T
        for name, part in {"gate": layers["gate_up"][i, :, 0], "up": layers["gate_up"][i, :, 1]}.items():
            weights[f"{at}.mlp.{name}_proj.weight"] = part.T
        weights[f"{at}.mlp.down_proj.weight"] = layers["down"][i].T
        weights[f"{at}.self_attn.q_norm.weight"] = layers["q_norm"][i]
        weights[f"{at}.self_attn.k_norm.weight"] = layers["k_norm"][i]
        norms = ("post_attention", "post_feedforward") if is_post else ("input", "post_attention")
        weights[f"{at}.{norms[0]}_layernorm.weight"] = layers["attention_norm"][i]
        weights[f"{at}.{norms[1]}_layernorm.weight"] = layers["mlp_norm"][i]
    model.load_state_dict({name: torch.tensor(np.array(value)) for name, value in weights.items()}, strict=True)
    with torch.no_grad():
        return model(torch.tensor(tokens, dtype=torch.int64)).logits.numpy()


def token_weights(shape: tuple[int, ...]) -> np.ndarray:
    """Weights f32 of the tokens in the loss whose gradients are recorded: advantages of both signs."""
    return np.random.RandomState(7).standard_normal(shape).astype(np.float32)


def sketch(gradient: np.ndarray) -> np.ndarray:
    """A gradient [..., n] times n random signs."""
    signs = np.random.RandomState(gradient.shape[-1]).choice((-1.0, 1.0), gradient.shape[-1])
    return (np.asarray(gradient, np.float64) @ signs).astype(np.float32)
