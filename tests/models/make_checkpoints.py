"""Writes golden/<family>/: small random checkpoints saved by transformers (torch), its logits and greedy tokens.

python tests/models/make_checkpoints.py        (needs torch and transformers; run from the repository's root)
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

HERE = Path(__file__).resolve().parent
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "use_cache": True,
}
QUICK: dict[str, Any] = {"rope_type": "default", "rope_theta": 1000.0}
LLAMA3: dict[str, Any] = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def models() -> dict[str, PreTrainedModel]:
    """A model of each family; together they have tied and untied heads, and grouped queries of three ratios."""
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2}
    one, even = {**heads, "num_key_value_heads": 1}, {**heads, "num_key_value_heads": 4}
    return {
        "qwen2-tied": Qwen2ForCausalLM(Qwen2Config(**SIZES, **heads, tie_word_embeddings=True)),
        "qwen2": Qwen2ForCausalLM(Qwen2Config(**SIZES, **one, rope_parameters=QUICK)),
        "qwen3": Qwen3ForCausalLM(Qwen3Config(**SIZES, **heads, head_dim=12, rms_norm_eps=1e-5)),
        "llama": LlamaForCausalLM(LlamaConfig(**SIZES, **even, rope_parameters=LLAMA3, head_dim=8)),
        "llama-tied": LlamaForCausalLM(LlamaConfig(**SIZES, **heads, tie_word_embeddings=True)),
        "olmo2": Olmo2ForCausalLM(Olmo2Config(**SIZES, **heads, rope_parameters=QUICK, pad_token_id=0, eos_token_id=1)),
    }


def spread(model: PreTrainedModel) -> None:
    """Random weights with logits of order one. No norm is one and no bias zero, so a skipped one shows."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn_like(weight)
            if "norm" in name:
                weight.copy_(1 + 0.2 * noise)
            elif name.endswith("bias"):
                weight.copy_(0.5 * noise)
            else:
                weight.copy_(1.5 * noise / weight.shape[-1] ** 0.5)


def main() -> None:
    """Writes all of them."""
    for seed, (name, model) in enumerate(models().items()):
        torch.manual_seed(seed)
        spread(model)
        model = model.to(torch.float32).eval()
        folder = HERE / "golden" / name
        model.save_pretrained(folder)
        tokens = torch.randint(0, SIZES["vocab_size"], (2, 72))
        with torch.no_grad():
            logits = model(tokens).logits
            greedy = model.generate(
                tokens[:, :8],
                attention_mask=torch.ones(2, 8),
                max_new_tokens=64,
                do_sample=False,
                pad_token_id=0,
                eos_token_id=-1,
            )
        np.savez_compressed(
            folder / "outputs.npz", tokens=tokens.numpy(), logits=logits.numpy(), greedy=greedy[:, 8:].numpy()
        )
        print(name, f"logits' std {logits.std():.2f}, greedy words {len(set(greedy[0, 8:].tolist()))}")


if __name__ == "__main__":
    main()
