"""Greedy sampling from a model at its real depth: prefill of B prompts of P random ids, then G tokens each.

    python -m benchmarks.depth MODEL [B P G [DTYPE [WEIGHTS]]]

MODEL is a folder with config.json and safetensors. DTYPE (float32 or bfloat16) is that of weights and activations, and
WEIGHTS may be int8. Prompts, timing and JSON line match those of benchmarks/peers/hf_depth.py; `tokens` is a digest of
all tokens of all calls, which is equal in float32 if both choose the same tokens.
"""

import hashlib
import sys
from pathlib import Path

from aem_jax.models import from_pretrained
from aem_jax.sampler import SamplingConfig
from benchmarks.peers import print_measurement
from benchmarks.sampler import measure


def main() -> None:
    """Measures one model and shape, and prints it."""
    folder, *words = sys.argv[1:]
    slots, prompt, new = (int(word) for word in (words[:3] or (8, 64, 64)))
    dtype, weights = (*words[3:], *("float32", "model")[len(words[3:]) :])
    model = from_pretrained(Path(folder), dtype=dtype)
    sampling = SamplingConfig(0.0, weights=weights)  # pyright: ignore[reportArgumentType]
    rate, tokens = measure(model.policy, model.params, sampling, slots, prompt, new, calls=3)
    print_measurement(
        model.config.num_parameters,
        batch=slots,
        prompt=prompt,
        new_tokens=new,
        dtype=dtype,
        weights=weights,
        decode_tokens_per_s=rate,
        tokens=hashlib.sha256(tokens.astype("<i4").tobytes()).hexdigest()[:16],
    )


if __name__ == "__main__":
    main()
