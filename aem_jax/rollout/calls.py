"""Which slots share a call: those that look back on little don't pay for those that look back on much.

A call attends over one window, that of its longest slot, for all its slots. Several calls, each on slots of about one
length, look at less of the cache. But each of them reads the weights, and a call on a part of the slots copies their
windows once.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

Cost = Callable[[int, int], tuple[float, ...]]
"""(slots on each device, window) -> what a call costs. Costs of calls add up, and the first number counts first."""


def decoding_cost(weights: float, token: float, num_slots: int, steps: int) -> Cost:
    """Bytes read: decoding is bound by memory.

    Args:
        weights: bytes of the parameters, read in every step.
        token: bytes of the cache of one slot's token.
        num_slots: of the state, on each device.
        steps: of a call.
    """

    def cost(slots: int, window: int) -> tuple[float, ...]:
        cached = slots * window * token
        return (steps * (weights + cached) + (2 * cached if slots < num_slots else 0.0),)

    return cost


def extending_cost(slots: int, window: int) -> tuple[float, ...]:
    """Slots computed, padding included: extending is bound by arithmetic. Then positions of the cache."""
    return float(slots), float(slots * window)


@dataclass(frozen=True)
class Call:
    """One call.

    Attributes:
        meant: slots that have something to do.
        slots: i32[n], the slots that the call is on (`Sampler.place`); None means all.
        window: covers the longest of those that are meant.
    """

    meant: tuple[int, ...]
    slots: np.ndarray | None
    window: int


def plan_calls(
    contexts: Mapping[int, int],
    num_slots: int,
    shards: int,
    cover: Callable[[int], int],
    place: Callable[[Sequence[int]], np.ndarray | None],
    cost: Cost,
) -> list[Call]:
    """The cheapest calls, of all ways to cut the slots, ordered by length, where their window changes.

    Args:
        contexts: slot -> tokens that the window has to cover; not empty.
        num_slots: of the state.
        shards: devices that they are split over.
        cover: tokens -> the window that covers them.
        place: slots -> those that a call on them is on, None for all.
        cost: of a call.

    Returns:
        Calls by rising window; every slot is in one. Of plans that cost the same, one with the fewest.
    """
    window = lambda slot: cover(contexts[slot])
    classes = [(each, list(slots)) for each, slots in groupby(sorted(contexts, key=window), key=window)]
    borders = len(classes) - 1

    def cut(cuts: int) -> tuple[tuple[float, ...], list[Call]]:
        """With a call's end at each border whose bit is set."""
        calls, costs, meant = [], [], list[int]()
        for at, (window, slots) in enumerate(classes):
            meant = meant + slots
            if at == borders or cuts >> at & 1:
                on = place(meant)
                calls.append(Call(tuple(meant), on, window))
                costs.append(cost((num_slots if on is None else len(on)) // shards, window))
                meant = []
        return tuple(map(sum, zip(*costs, strict=True))), calls

    fewest_first = sorted(range(2**borders), key=int.bit_count)
    return min(map(cut, fewest_first), key=lambda found: found[0])[1]
