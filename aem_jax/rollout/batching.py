"""How slots are batched: which slots share a call, and how prompts fill its buckets.

A call attends over one window, that of its longest slot, for all its slots. Several calls on slots of similar length
read less of the cache. But each call reads the weights, and a call on a subset of the slots copies their windows once.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np

from aem_jax.rollout.stats import RolloutStats
from aem_jax.sampler import Sampler, SamplerState

_CALL_COST = 16
"""Fixed cost of a prefill call (its launch, and reading the weights), in tokens of a slot."""


PadSlots = Callable[[Sequence[int]], np.ndarray | None]
"""Slots -> the slots that a call on them computes (`Sampler.pad_slots`); None means all."""

Cost = Callable[[int, int], tuple[float, ...]]
"""(slots on each device, window) -> cost of a call. Costs add up element by element, and compare lexicographically."""


def decode_cost(weights: float, token: float, num_slots: int, steps: int) -> Cost:
    """Bytes read by a decode call, which is bound by memory.

    Args:
        weights: bytes of the parameters, read in every step.
        token: bytes of the cache of one slot's token.
        num_slots: slots of the state, on each device.
        steps: decode steps of a call.
    """

    def cost(slots: int, window: int) -> tuple[float, ...]:
        cached = slots * window * token
        return (steps * (weights + cached) + (2 * cached if slots < num_slots else 0.0),)

    return cost


def prefill_cost(slots: int, window: int) -> tuple[float, ...]:
    """Slots of a prefill call, padding included, since it is bound by arithmetic; then positions of the cache."""
    return float(slots), float(slots * window)


@dataclass(frozen=True)
class Call:
    """One call on some slots.

    Attributes:
        targets: slots that the call is for.
        slots: i32[n], the slots that the call computes: the targets, padded by `Sampler.pad_slots`; None means all.
        window: covers the longest target.
    """

    targets: tuple[int, ...]
    slots: np.ndarray | None
    window: int


def plan_calls(
    contexts: Mapping[int, int],
    num_slots: int,
    shards: int,
    window_for: Callable[[int], int],
    pad_slots: PadSlots,
    cost: Cost,
) -> list[Call]:
    """The cheapest calls, of all partitions of the slots, sorted by window, into contiguous parts.

    Args:
        contexts: slot -> tokens that the window has to cover; not empty.
        num_slots: slots of the state.
        shards: devices that the slots are split over.
        window_for: tokens -> the window that covers them.
        pad_slots: slots -> the slots that a call on them computes; None means all.
        cost: cost of a call.

    Returns:
        Calls by rising window; every slot is a target of one. Ties go to the fewest calls.
    """
    window_of = lambda slot: window_for(contexts[slot])
    by_window = [(window, list(slots)) for window, slots in groupby(sorted(contexts, key=window_of), key=window_of)]
    num_borders = len(by_window) - 1

    def partition(borders: int) -> tuple[tuple[float, ...], list[Call]]:
        """The cost and the calls where bit i of `borders` separates windows i and i + 1."""
        calls, costs, targets = [], [], list[int]()
        for index, (window, slots) in enumerate(by_window):
            targets = targets + slots
            if index == num_borders or borders >> index & 1:
                padded = pad_slots(targets)
                calls.append(Call(tuple(targets), padded, window))
                costs.append(cost((num_slots if padded is None else len(padded)) // shards, window))
                targets = []
        return tuple(map(sum, zip(*costs, strict=True))), calls

    fewest_first = sorted(range(2**num_borders), key=int.bit_count)
    return min(map(partition, fewest_first), key=lambda plan: plan[0])[1]


def cut_into_buckets(length: int, buckets: tuple[int, ...]) -> tuple[int, ...]:
    """The buckets (ascending), repeated where needed, that hold `length` tokens at the least Σ (bucket + 16).

    Returns:
        Buckets, largest first. A length beyond twice the largest bucket is cut into largest buckets first, which need
        not be the optimum.
    """
    largest = buckets[-1]
    leading = max(length // largest - 1, 0)
    return (largest,) * leading + _optimal_cuts(buckets)[length - leading * largest]


@lru_cache
def _optimal_cuts(buckets: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The optimal buckets of every length below twice the largest bucket."""
    costs, cuts = [0], [()]
    for length in range(1, 2 * buckets[-1]):
        options = [(bucket + _CALL_COST + costs[max(length - bucket, 0)], bucket) for bucket in buckets]
        cost, bucket = min(options)
        costs.append(cost)
        cuts.append(tuple(sorted((bucket, *cuts[max(length - bucket, 0)]), reverse=True)))
    return cuts


class Chunk(NamedTuple):
    """One `extend` call of a prefill.

    Attributes:
        bucket: most tokens that it appends to a slot.
        slots: i32[n], the slots that it computes; None means all.
    """

    bucket: int
    slots: np.ndarray | None

    def num_rows(self, num_slots: int) -> int:
        """Slots that the call computes, of `num_slots`."""
        return num_slots if self.slots is None else len(self.slots)


def cut_into_chunks(lengths: Mapping[int, int], buckets: Sequence[int], pad_slots: PadSlots) -> list[Chunk]:
    """The calls that append `lengths` tokens to slots."""
    chunks, done = [], 0
    for bucket in cut_into_buckets(max(lengths.values(), default=0), tuple(sorted(buckets))):
        chunks.append(Chunk(bucket, pad_slots([slot for slot, length in lengths.items() if length > done])))
        done += bucket
    return chunks


def chunks_cost(chunks: Iterable[Chunk], num_slots: int) -> int:
    """Cost of the calls on a state of `num_slots` slots, in computed tokens, padding included."""
    return sum(chunk.num_rows(num_slots) * (chunk.bucket + _CALL_COST) for chunk in chunks)


def prefill(
    sampler: Sampler,
    params: Any,
    state: SamplerState,
    ids: Mapping[int, Sequence[int]],
    buckets: Sequence[int],
    *,
    window: int,
    sizes: Sequence[int] = (),
    stats: RolloutStats | None = None,
) -> SamplerState:
    """Appends ids to slots, in bucketed calls.

    Args:
        sampler: the jitted sampler.
        params: decode-layout parameters.
        state: the slots; donated.
        ids: slot -> ids to append.
        buckets: chunk lengths, see `cut_into_buckets`.
        window: covers the longest slot, appended ids included.
        sizes: numbers of slots, below all, that a call may be made on.
        stats: counts the tokens.
    """
    done, num_slots = 0, state.lengths.shape[0]
    lengths = {slot: len(tokens) for slot, tokens in ids.items()}
    pad_slots = partial(sampler.pad_slots, num_slots=num_slots, sizes=sizes)
    for chunk in cut_into_chunks(lengths, buckets, pad_slots):
        bucket, padded = chunk
        row_slots = range(num_slots) if padded is None else padded.tolist()
        tokens, counts = np.zeros((len(row_slots), bucket), np.int32), np.zeros(len(row_slots), np.int32)
        for row, slot in enumerate(row_slots):
            part = ids.get(slot, ())[done : done + bucket]
            tokens[row, : len(part)], counts[row] = part, len(part)
        state = sampler.extend(params, state, tokens, counts, padded, window=window)
        done += bucket
        if stats is not None:
            stats.prefill_tokens += int(counts.sum())
            stats.padded_tokens += tokens.size
    return state
