"""Sampling from a small Qwen3 with random weights: prefill of B prompts of P tokens, then G sampled tokens each.

    python -m benchmarks.sampler [B P G]

The shape, the model and the timing (prefill and decoding together, one call from host to host) match the peers' scripts
in docs/benchmarks.md, so that they can run in turn. Sampling is at temperature 1 and records the log-probability and
the entropy of every token. One call warms up; five are timed. The last line is JSON.
"""

import json
import statistics
import sys
import time
from importlib.metadata import version

import jax
import numpy as np

from aem_jax.models import ModelConfig, Policy
from aem_jax.sampler import Sampler, SamplingConfig

MODEL = ModelConfig(4096, 256, 768, 4, 8, 4, 32)
NEVER = -1  # a stop id that matches no token


def measure(slots: int, prompt: int, new: int, calls: int = 5) -> dict[str, float]:
    """Returns best and median sampled tokens per second over `calls` warm calls with different prompts and keys."""
    policy = Policy(MODEL)
    params = jax.jit(policy.init)(jax.random.key(0))
    sampler = Sampler(
        policy, SamplingConfig(), [NEVER], capacity=prompt + new, slack=max(prompt, new), windows=[prompt]
    )
    state, rng, rates = sampler.init(slots), np.random.default_rng(0), []
    prompts, zeros = sampler.init(slots, prompt), np.zeros(slots, np.int32)
    for _ in range(calls + 1):
        tokens = rng.integers(3, MODEL.vocab_size, (slots, prompt), dtype=np.int32)
        prng = rng.integers(0, 2**32, (slots, 2), dtype=np.uint32)
        start = time.perf_counter()
        prompts = sampler.rewind(prompts, zeros)
        prompts = sampler.extend(params, prompts, tokens, np.full(slots, prompt, np.int32), window=prompt)
        state = sampler.fork(state, prompts, np.arange(slots, dtype=np.int32), prng, window=prompt)
        state, chunk = sampler.decode(params, state, np.full(slots, new, np.int32), new, window=prompt)
        sampled = jax.device_get(chunk)
        rates.append(slots * new / (time.perf_counter() - start))
        assert (sampled.counts == new).all() and np.isfinite(sampled.logprobs).all()
    return {"best": max(rates[1:]), "median": statistics.median(rates[1:])}


def main() -> None:
    """Measures one shape and prints it."""
    slots, prompt, new = (int(word) for word in (sys.argv[1:4] or (8, 64, 128)))
    line = {
        "system": "aem_jax",
        "device": jax.devices()[0].device_kind,
        "jax": version("jax"),
        "params": MODEL.num_parameters,
        "batch": slots,
        "prompt": prompt,
        "new_tokens": new,
        "decode_tokens_per_s": measure(slots, prompt, new),
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
