"""Many sampled responses to the same state, by the rollout's own sampler, with its keys and token budgets."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from aem_jax.analysis.states import State
from aem_jax.rollout.batching import prefill
from aem_jax.rollout.config import RolloutConfig
from aem_jax.sampler import Sampler


class Draws(NamedTuple):
    """D responses to each of N states.

    Attributes:
        surprisal: f64[N, D], −log π(a|s), nats.
        predictable: f64[N, D], Σ_t H_t over the response's tokens, nats. Its mean also estimates H_resp(s), with less
            noise than the mean surprisal, since it has no sampling noise of the tokens themselves.
        tokens: i64[N, D], lengths in tokens.
    """

    surprisal: np.ndarray
    predictable: np.ndarray
    tokens: np.ndarray


def draw_responses(
    sampler: Sampler,
    params: Any,
    states: Sequence[State],
    key: jax.Array,
    draws: int,
    config: RolloutConfig,
    report: Callable[[int], None] = lambda done: None,
) -> Draws:
    """Samples D responses to each state.

    Draw d of state i has the key fold_in(fold_in(key, i), d), so two policies with the same key use the same random
    numbers, and the noise of their difference is small.

    Args:
        sampler: the jitted sampler.
        params: decode-layout parameters.
        states: the states.
        key: PRNG key.
        draws: D, a multiple of the sampler's `slot_shards`.
        config: chunks and buckets.
        report: called with the number of finished states.
    """
    prompts, slots = sampler.init(sampler.slot_shards), sampler.init(draws)
    keys = jax.vmap(lambda i: jax.vmap(lambda d: jax.random.fold_in(jax.random.fold_in(key, i), d))(np.arange(draws)))
    prng = np.asarray(jax.random.key_data(keys(np.arange(len(states)))))
    drawn = Draws(*(np.zeros((len(states), draws), dtype) for dtype in (np.float64, np.float64, np.int64)))
    source = np.zeros(draws, np.int32)
    for i, state in enumerate(states):
        prompts = sampler.rewind(prompts, np.zeros(sampler.slot_shards, np.int32))
        window = sampler.window_for(len(state.context))
        ids = {0: state.context.tolist()}
        prompts = prefill(sampler, params, prompts, ids, config.extend_buckets, window=window)
        slots = sampler.fork(slots, prompts, source, prng[i], window=window)
        left = np.full(draws, state.budget, np.int32)
        while left.any():
            window = sampler.window_for(len(state.context) + int(drawn.tokens[i].max()))
            slots, out = sampler.decode(params, slots, left, config.decode_chunk, window=window)
            out = jax.device_get(out)
            sampled = np.arange(out.tokens.shape[1]) < out.counts[:, None]
            drawn.surprisal[i] -= np.where(sampled, out.logprobs, 0).sum(axis=1, dtype=np.float64)
            drawn.predictable[i] += np.where(sampled, out.entropies, 0).sum(axis=1, dtype=np.float64)
            drawn.tokens[i] += out.counts
            left = np.where(out.finished, 0, left - out.counts).astype(np.int32)
        report(i + 1)
    return drawn
