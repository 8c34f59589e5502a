"""Plays scripted episodes on a sampler, one per slot, and compares them with a pass without a cache."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from small_policies import numpy_tokens

from aem_jax.models import Params, Policy
from aem_jax.sampler import Sampler, SamplerState


@dataclass
class Episode:
    """One episode: the observation (ids) and the response of each turn."""

    key: int
    observations: list[np.ndarray]
    budget: int = 12
    responses: list[np.ndarray] = field(default_factory=list)
    logprobs: list[np.ndarray] = field(default_factory=list)
    entropies: list[np.ndarray] = field(default_factory=list)

    @property
    def prng(self) -> np.ndarray:
        return np.asarray(jax.random.key_data(jax.random.key(self.key)))


def script(policy: Policy, key: int, lengths: Sequence[int] = (9, 4, 6), budget: int = 12) -> Episode:
    """An episode with random ids of these lengths as observations, one entry per turn."""
    return Episode(key, [numpy_tokens(policy.config, (n,), 100 * key + i) for i, n in enumerate(lengths)], budget)


def start_episodes(sampler: Sampler, state: SamplerState, episodes: dict[int, Episode]) -> SamplerState:
    """Assigns the slots the keys of their episodes; the caches are empty."""
    slots = len(state.lengths)
    source, prng = np.full(slots, -1, np.int32), np.zeros((slots, 2), np.uint32)
    for slot, episode in episodes.items():
        source[slot], prng[slot] = 0, episode.prng
    return sampler.fork(state, sampler.init(slots), jnp.asarray(source), jnp.asarray(prng))


def extend_slots(
    sampler: Sampler,
    params: Params,
    state: SamplerState,
    ids: dict[int, np.ndarray],
    chunk: int,
    window: int | None = None,
) -> SamplerState:
    """Extends each slot with its ids, `chunk` at a time."""
    slots = len(state.lengths)
    for at in range(0, max(map(len, ids.values())), chunk):
        tokens, counts = np.full((slots, chunk), 7, np.int32), np.zeros(slots, np.int32)
        for slot, row in ids.items():
            part = row[at : at + chunk]
            tokens[slot, : len(part)], counts[slot] = part, len(part)
        state = sampler.extend(params, state, jnp.asarray(tokens), jnp.asarray(counts), window=window)
    return state


def decode_responses(
    sampler: Sampler,
    params: Params,
    state: SamplerState,
    episodes: dict[int, Episode],
    chunk: int,
    window: int | None = None,
) -> SamplerState:
    """Decodes one response in each slot, `chunk` tokens at a time, until its stop id or budget."""
    slots = len(state.lengths)
    left = {slot: episode.budget for slot, episode in episodes.items()}
    sampled = {slot: ([], [], []) for slot in episodes}
    while any(left.values()):
        budgets = np.zeros(slots, np.int32)
        for slot, count in left.items():
            budgets[slot] = count
        state, out = sampler.decode(params, state, jnp.asarray(budgets), chunk, window=window)
        for slot in [slot for slot, count in left.items() if count]:
            count = int(out.counts[slot])
            for kept, new in zip(sampled[slot], (out.tokens, out.logprobs, out.entropies), strict=True):
                kept.append(np.asarray(new[slot, :count]))
            left[slot] = 0 if out.finished[slot] else left[slot] - count
    for slot, parts in sampled.items():
        episode = episodes[slot]
        for kept, new in zip((episode.responses, episode.logprobs, episode.entropies), parts, strict=True):
            kept.append(np.concatenate(new))
    return state


def play(
    sampler: Sampler,
    params: Params,
    episodes: dict[int, Episode],
    *,
    slots: int,
    chunks: tuple[int, int] = (16, 16),
    window: int | None = None,
    state: SamplerState | None = None,
) -> SamplerState:
    """Plays every turn of the episodes, keyed by slot, with chunks of (extend, decode) tokens."""
    state = start_episodes(sampler, sampler.init(slots) if state is None else state, episodes)
    for turn in range(max(len(episode.observations) for episode in episodes.values())):
        active = {slot: episode for slot, episode in episodes.items() if turn < len(episode.observations)}
        observations = {slot: episode.observations[turn] for slot, episode in active.items()}
        state = extend_slots(sampler, params, state, observations, chunks[0], window)
        state = decode_responses(sampler, params, state, active, chunks[1], window)
    return state


@partial(jax.jit, static_argnums=0)
def _padded_forward(policy: Policy, params: Params, tokens: Array) -> Array:
    return policy.forward(params, tokens)


def cacheless(policy: Policy, params: Params, ids: Sequence[int] | np.ndarray) -> np.ndarray:
    """Logits [len(ids),V] of one plain pass; padded to one length, so that it compiles once."""
    padded = np.zeros((1, 96), np.int32)
    padded[0, : len(ids)] = ids
    return np.asarray(_padded_forward(policy, params, jnp.asarray(padded))[0, : len(ids)])


def token_gaps(policy: Policy, params: Params, episode: Episode, temperature: float = 1.0) -> np.ndarray:
    """Logprob and entropy of each sampled token minus those of one cache-less pass over the episode, [tokens, 2]."""
    ids = np.concatenate([part for pair in zip(episode.observations, episode.responses, strict=True) for part in pair])
    logits = cacheless(policy, params, ids).astype(np.float64) / temperature
    table = logits - logits.max(1, keepdims=True)
    table -= np.log(np.exp(table).sum(1, keepdims=True))
    gaps, at = [], 0
    for observation, response, logprobs, entropies in zip(
        episode.observations, episode.responses, episode.logprobs, episode.entropies, strict=True
    ):
        at += len(observation)
        rows = table[at - 1 : at - 1 + len(response)]  # the state at t - 1 predicts token t
        own = rows[np.arange(len(response)), response], -(np.exp(rows) * rows).sum(1)
        gaps.append(np.stack([logprobs - own[0], entropies - own[1]], axis=1))
        at += len(response)
    return np.concatenate(gaps)


def cacheless_gap(policy: Policy, params: Params, episode: Episode, temperature: float = 1.0) -> tuple[float, float]:
    """Largest difference of the episode's logprobs and entropies from those of one cache-less pass over it."""
    logprobs, entropies = np.abs(token_gaps(policy, params, episode, temperature)).max(axis=0)
    return logprobs, entropies
