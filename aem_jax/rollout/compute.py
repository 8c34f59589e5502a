"""Ids into slots, in as few bucketed calls as they need."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from aem_jax.sampler import Sampler, SamplerState

_CALL = 16
"""What a call costs beside its tokens, in tokens of a slot: reading the weights, and being made."""


def cut(length: int, buckets: tuple[int, ...]) -> tuple[int, ...]:
    """Which of the buckets (ascending) hold `length` for the least Σ (bucket + 16), largest first.

    Of what is longer than two of the largest, those come first, cheapest or not.
    """
    largest = buckets[-1]
    whole = max(length // largest - 1, 0)
    return (largest,) * whole + _cuts(buckets)[length - whole * largest]


@lru_cache
def _cuts(buckets: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Of all lengths below twice the largest."""
    cost, cuts = [0], [()]
    for length in range(1, 2 * buckets[-1]):
        found = [(bucket + _CALL + cost[max(length - bucket, 0)], bucket) for bucket in buckets]
        least, bucket = min(found)
        cost.append(least)
        cuts.append(tuple(sorted((bucket, *cuts[max(length - bucket, 0)]), reverse=True)))
    return cuts


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
        buckets: chunk lengths, see `cut`.
        window: covers the longest slot, with what is appended.
        sizes: numbers of slots, below all, that a call may be made on.
    """
    done, num_slots = 0, state.lengths.shape[0]
    for bucket in cut(max(map(len, ids.values())), tuple(sorted(buckets))):
        slots = sampler.pad_slots([slot for slot in ids if len(ids[slot]) > done], num_slots, sizes)
        places = range(num_slots) if slots is None else slots.tolist()
        tokens, counts = np.zeros((len(places), bucket), np.int32), np.zeros(len(places), np.int32)
        for row, slot in enumerate(places):
            part = ids.get(slot, ())[done : done + bucket]
            tokens[row, : len(part)], counts[row] = part, len(part)
        state = sampler.extend(params, state, tokens, counts, slots, window=window)
        done += bucket
    return state
