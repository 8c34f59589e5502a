"""Ids into slots, in as few bucketed calls as they need."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from aem_jax.sampler import Sampler, SamplerState


def compute(
    sampler: Sampler,
    params: Any,
    state: SamplerState,
    ids: Mapping[int, Sequence[int]],
    buckets: Sequence[int],
    *,
    window: int,
    sizes: Sequence[int] = (),
) -> SamplerState:
    """Extends slots by their ids.

    Args:
        sampler: the jitted sampler.
        params: decode-layout parameters.
        state: the slots; donated.
        ids: slot -> what is appended.
        buckets: chunk lengths; each call takes the smallest that fits, or several of the largest.
        window: covers the longest slot, with what is appended.
        sizes: numbers of slots, below all, that a call may be made on.
    """
    buckets, done, longest = sorted(buckets), 0, max(map(len, ids.values()))
    num_slots = state.lengths.shape[0]
    while done < longest:
        bucket = next((b for b in buckets if b >= longest - done), buckets[-1])
        slots = sampler.place([slot for slot in ids if len(ids[slot]) > done], num_slots, sizes)
        places = range(num_slots) if slots is None else slots.tolist()
        tokens, counts = np.zeros((len(places), bucket), np.int32), np.zeros(len(places), np.int32)
        for row, slot in enumerate(places):
            part = ids.get(slot, ())[done : done + bucket]
            tokens[row, : len(part)], counts[row] = part, len(part)
        state = sampler.extend(params, state, tokens, counts, slots, window=window)
        done += bucket
    return state
