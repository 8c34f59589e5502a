"""Peer: Tunix's native sampler on a Llama at its real depth; the counterpart of benchmarks/depth.py.

python -m venv peer && peer/bin/pip install google-tunix==0.1.7 jax==0.10.2 flax==0.12.8
peer/bin/python tunix_depth.py MODEL [B P G [DTYPE]]
"""

import hashlib
import json
import statistics
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tunix.generate.sampler import CacheConfig, Sampler
from tunix.models.llama3 import model as llama3
from tunix.models.llama3 import params as llama3_params

folder, *words = sys.argv[1:]
B, P, G = (int(word) for word in (words[:3] or (8, 64, 64)))
dtype = words[3] if len(words) > 3 else "float32"
theirs = json.loads((Path(folder) / "config.json").read_text())
config = llama3.ModelConfig(
    num_layers=theirs["num_hidden_layers"],
    vocab_size=theirs["vocab_size"],
    embed_dim=theirs["hidden_size"],
    hidden_dim=theirs["intermediate_size"],
    num_heads=theirs["num_attention_heads"],
    head_dim=theirs["head_dim"],
    num_kv_heads=theirs["num_key_value_heads"],
    rope_theta=theirs["rope_theta"],
    norm_eps=theirs["rms_norm_eps"],
    weight_tying=theirs["tie_word_embeddings"],
)


class Ids:
    """A tokenizer whose text is a list of ids. Id 0 pads, and no id ends a response."""

    def bos_id(self):
        return None

    def eos_id(self):
        return config.vocab_size

    def pad_id(self):
        return 0

    def encode(self, text, **_):
        return [int(word) for word in text.split()]

    def decode(self, ids, **_):
        return " ".join(map(str, ids))


mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
with mesh:
    model = llama3_params.create_model_from_safe_tensors(folder, config, mesh, jnp.dtype(dtype))
    cache = CacheConfig(
        cache_size=P + G + 8,
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
    )
    sampler = Sampler(model, Ids(), cache)
    rng, rates, tokens = np.random.default_rng(0), [], []
    for _ in range(4):
        prompts = rng.integers(3, config.vocab_size, (B, P), dtype=np.int32)
        rng.integers(0, 2**32, (B, 2), dtype=np.uint32)  # the keys of the other program
        texts = [" ".join(map(str, row)) for row in prompts]
        start = time.perf_counter()
        out = sampler(texts, max_generation_steps=G, max_prompt_length=P, temperature=0.0)
        tokens.append(np.stack([np.asarray(row)[:G] for row in out.tokens]))
        rates.append(B * G / (time.perf_counter() - start))
        assert tokens[-1].shape == (B, G), tokens[-1].shape
line = {
    "system": "tunix",
    "device": jax.devices()[0].device_kind,
    "params": sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))),
    "batch": B,
    "prompt": P,
    "new_tokens": G,
    "dtype": dtype,
    "decode_tokens_per_s": {"best": max(rates[1:]), "median": statistics.median(rates[1:])},
    "tokens": hashlib.sha256(np.asarray(tokens).astype("<i4").tobytes()).hexdigest()[:16],
}
print(json.dumps(line))
