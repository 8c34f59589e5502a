"""Peer: Hugging Face `generate` (torch) on a model at its real depth; the counterpart of benchmarks/depth.py.

python -m venv hf && hf/bin/pip install torch==2.13.0 transformers numpy
hf/bin/python hf_depth.py MODEL [B P G [DTYPE]]
"""

import hashlib
import json
import statistics
import sys
import time

import numpy as np
import torch
from transformers import AutoModelForCausalLM

folder, *words = sys.argv[1:]
B, P, G = (int(word) for word in (words[:3] or (8, 64, 64)))
dtype = words[3] if len(words) > 3 else "float32"
device = "cuda" if torch.cuda.is_available() else "cpu"
model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
model = torch.nn.Module.to(model, device)
model.generation_config.eos_token_id = None  # every row samples G tokens
rng, rates, tokens = np.random.default_rng(0), [], []
with torch.no_grad():
    for _ in range(4):
        prompts = rng.integers(3, model.config.vocab_size, (B, P), dtype=np.int32)
        rng.integers(0, 2**32, (B, 2), dtype=np.uint32)  # the keys of the other program
        start = time.perf_counter()
        x = torch.from_numpy(prompts).long().to(device)
        out = model.generate(x, attention_mask=torch.ones_like(x), do_sample=False, max_new_tokens=G, pad_token_id=0)
        tokens.append(out[:, P:].cpu().numpy())
        rates.append(B * G / (time.perf_counter() - start))
        assert tokens[-1].shape == (B, G)
line = {
    "system": "transformers",
    "device": device,
    "threads": torch.get_num_threads(),
    "params": sum(p.numel() for p in model.parameters()),
    "batch": B,
    "prompt": P,
    "new_tokens": G,
    "dtype": dtype,
    "decode_tokens_per_s": {"best": max(rates[1:]), "median": statistics.median(rates[1:])},
    "tokens": hashlib.sha256(np.asarray(tokens).astype("<i4").tobytes()).hexdigest()[:16],
}
print(json.dumps(line))
