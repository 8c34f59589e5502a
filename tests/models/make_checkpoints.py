"""Writes golden/<family>/: random checkpoints saved by transformers (torch), its logits, greedy tokens and gradients.

python tests/models/make_checkpoints.py [NAME ...]     (needs torch and transformers; run from the repository's root)

Without names all are written. A gradient G is kept as G r, for r of random signs (`sketch`): an error of any element
changes it, and it takes a row less.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MinistralConfig,
    MinistralForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from transformers_logits import sketch, token_weights

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
LINEAR: dict[str, Any] = {"rope_type": "linear", "rope_theta": 2000.0, "factor": 4.0}
YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 500.0,
    "factor": 4.0,
    "original_max_position_embeddings": 24,
    "beta_fast": 4.0,
}
IDS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
DEEPER: dict[str, Any] = {**SIZES, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 4}


SEEDS = {"gemma3": 12, "qwen3-moe": 6, "mixtral": 7}
"""Seeds of some models; all others have their number in the list. With its number, Gemma would repeat a few words."""


def models() -> dict[str, PreTrainedModel]:
    """A model of each family; together they have tied and untied heads, and grouped queries of three ratios."""
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2}
    one, even = {**heads, "num_key_value_heads": 1}, {**heads, "num_key_value_heads": 4}
    experts: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
    narrow: dict[str, Any] = {"intermediate_size": 24}
    qwen: dict[str, Any] = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 20, "head_dim": 12}
    return {
        "qwen2-tied": Qwen2ForCausalLM(Qwen2Config(**SIZES, **heads, tie_word_embeddings=True)),
        "qwen2": Qwen2ForCausalLM(Qwen2Config(**SIZES, **one, rope_parameters=QUICK)),
        "qwen3": Qwen3ForCausalLM(Qwen3Config(**SIZES, **heads, head_dim=12, rms_norm_eps=1e-5)),
        "llama": LlamaForCausalLM(LlamaConfig(**SIZES, **even, rope_parameters=LLAMA3, head_dim=8)),
        "llama-tied": LlamaForCausalLM(LlamaConfig(**SIZES, **heads, tie_word_embeddings=True)),
        "olmo2": Olmo2ForCausalLM(Olmo2Config(**SIZES, **heads, rope_parameters=QUICK, pad_token_id=0, eos_token_id=1)),
        "gemma3": Gemma3ForCausalLM(
            Gemma3TextConfig(
                **DEEPER,
                **heads,
                head_dim=8,
                query_pre_attn_scalar=12,
                sliding_window=6,
                layer_types=["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
                rope_parameters={"full_attention": LINEAR, "sliding_attention": {**QUICK, "rope_theta": 100.0}},
            )
        ),
        "smollm3": SmolLM3ForCausalLM(
            SmolLM3Config(**DEEPER, **heads, no_rope_layer_interval=3, rope_parameters=YARN, **IDS)
        ),
        "mistral": MistralForCausalLM(
            MistralConfig(**SIZES, **heads, head_dim=12, sliding_window=5, rope_parameters=QUICK)
        ),
        "ministral": MinistralForCausalLM(
            MinistralConfig(
                **DEEPER,
                **heads,
                head_dim=8,
                sliding_window=7,
                layer_types=["full_attention", "sliding_attention", "sliding_attention", "sliding_attention"],
                rope_parameters=LINEAR,
            )
        ),
        "qwen3-yarn": Qwen3ForCausalLM(
            Qwen3Config(
                **DEEPER,
                **one,
                head_dim=12,
                rope_parameters={**YARN, "truncate": False, "attention_factor": 1.25},
                use_sliding_window=True,
                sliding_window=9,
                max_window_layers=2,
            )
        ),
        "qwen3-moe": Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, **heads, **qwen, norm_topk_prob=True)),
        "mixtral": MixtralForCausalLM(MixtralConfig(**SIZES | narrow, **heads, **experts, rope_parameters=QUICK)),
    }


def spread(model: PreTrainedModel) -> None:
    """Random weights with logits of order one. No norm is one and no bias zero, so a skipped one shows."""
    is_gemma = model.config.model_type == "gemma3_text"
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn_like(weight)
            if "norm" in name:
                weight.copy_((0 if is_gemma else 1) + 0.2 * noise)
                if is_gemma and name == "model.norm.weight":
                    weight += 3  # for logits of order one
            elif is_gemma and name == "model.embed_tokens.weight":
                # Small beside the sublayers' outputs: else a tied head would repeat the last token.
                weight.copy_(0.4 * noise / weight.shape[-1] ** 0.5)
            elif name.endswith("bias"):
                weight.copy_(0.5 * noise)
            else:
                weight.copy_(1.5 * noise / weight.shape[-1] ** 0.5)


def gradients(model: PreTrainedModel, tokens: torch.Tensor) -> dict[str, np.ndarray]:
    """Tensor's name in the files -> the sketch of its gradient, of a weighted mean of the tokens' log-probabilities.

    The gradients replace the weights: the names in the files are known to `save_pretrained` alone.
    """
    model.get_input_embeddings().padding_idx = None  # its row would get no gradient
    logprobs = torch.log_softmax(model(tokens).logits[:, :-1], -1)
    of_tokens = torch.take_along_dim(logprobs, tokens[:, 1:, None], -1)[..., 0]
    model.zero_grad()
    (of_tokens * torch.from_numpy(token_weights(of_tokens.shape))).mean().backward()
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        for weight in model.parameters():
            weight.copy_(weight.grad)
        model.save_pretrained(folder)
        return {name: sketch(gradient) for name, gradient in load_file(Path(folder) / "model.safetensors").items()}


def main() -> None:
    """Writes those that are named, or all."""
    for seed, (name, model) in enumerate(models().items()):
        if sys.argv[1:] and name not in sys.argv[1:]:
            continue
        torch.manual_seed(SEEDS.get(name, seed))
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
        arrays: dict[str, Any] = gradients(model, tokens)
        np.savez_compressed(folder / "gradients.npz", **arrays)
        print(name, f"logits' std {logits.std():.2f}, greedy words {len(set(greedy[0, 8:].tolist()))}")


if __name__ == "__main__":
    main()
