"""Sampling from a small Qwen3 with random weights: prefill of B prompts of P tokens, then G sampled tokens each.

    python -m benchmarks.sampler [B P G]

The shape, the model and the timing (prefill and decoding together, one call from host to host) match the peers' scripts
in docs/benchmarks.md, so that they can run in turn. Sampling is at temperature 1 and records the log-probability and
the entropy of every token. One call warms up; five are timed. The last line is JSON.
"""

import statistics
import sys
import time

import jax
import numpy as np

from aem_jax.models import ModelConfig, Params, Policy
from aem_jax.sampler import Sampler, SamplingConfig
from aem_jax.sampler.reshard import make_reshard
from aem_jax.sharding import MeshConfig, make_mesh
from benchmarks.peers import print_measurement

MODEL = ModelConfig(4096, 256, 768, 4, 8, 4, 32)
NEVER = -1  # a stop id that matches no token


def measure(
    policy: Policy, params: Params, sampling: SamplingConfig, slots: int, prompt: int, new: int, calls: int = 5
) -> tuple[dict[str, float], np.ndarray]:
    """Times calls with different prompts and keys, all drawn with seed 0.

    Args:
        policy: the decoder.
        params: its parameters, as the learner has them; they are resharded once, outside of the timed calls.
        sampling: distribution of the tokens.
        slots: B, number of prompts.
        prompt: P, their length.
        new: G, sampled tokens of each.
        calls: number of timed calls, after one that warms up.

    Returns:
        Best and median sampled tokens per second, and the tokens of all calls, i32[calls + 1, B, G].
    """
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    params = jax.block_until_ready(make_reshard(policy, mesh, int8=sampling.weights == "int8")(params))
    policy = policy.quantized if sampling.weights == "int8" else policy.sampled
    sampler = Sampler(policy, sampling, [NEVER], capacity=prompt + new, slack=max(prompt, new), windows=[prompt])
    state, rng, rates, tokens = sampler.init(slots), np.random.default_rng(0), [], []
    prompts, zeros = sampler.init(slots, prompt), np.zeros(slots, np.int32)
    for _ in range(calls + 1):
        shown = rng.integers(3, policy.config.vocab_size, (slots, prompt), dtype=np.int32)
        prng = rng.integers(0, 2**32, (slots, 2), dtype=np.uint32)
        start = time.perf_counter()
        prompts = sampler.rewind(prompts, zeros)
        prompts = sampler.extend(params, prompts, shown, np.full(slots, prompt, np.int32), window=prompt)
        state = sampler.fork(state, prompts, np.arange(slots, dtype=np.int32), prng, window=prompt)
        state, chunk = sampler.decode(params, state, np.full(slots, new, np.int32), new, window=prompt)
        sampled = jax.device_get(chunk)
        rates.append(slots * new / (time.perf_counter() - start))
        assert (sampled.counts == new).all() and np.isfinite(sampled.logprobs).all()
        tokens.append(sampled.tokens)
    return {"best": max(rates[1:]), "median": statistics.median(rates[1:])}, np.asarray(tokens)


def main() -> None:
    """Measures one shape and prints it."""
    slots, prompt, new = (int(word) for word in (sys.argv[1:4] or (8, 64, 128)))
    policy = Policy(MODEL)
    params = jax.jit(policy.init)(jax.random.key(0))
    rate, _ = measure(policy, params, SamplingConfig(), slots, prompt, new)
    print_measurement(MODEL.num_parameters, batch=slots, prompt=prompt, new_tokens=new, decode_tokens_per_s=rate)


if __name__ == "__main__":
    main()
