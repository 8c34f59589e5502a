"""Slots that share a call, compared with all partitions by length; cuts into buckets, compared with all cuts."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aem_jax.rollout.batching import cut_into_buckets, decode_cost, plan_calls, prefill_cost

WINDOWS, SIZES, NUM_SLOTS = (8, 32, 128), (1, 2, 4), 8


def window_for(length: int) -> int:
    return next(window for window in WINDOWS if length <= window)


def pad_slots(slots):
    size = next((size for size in SIZES if size >= len(slots)), None)
    return None if size is None else np.array([*slots, *(s for s in range(NUM_SLOTS) if s not in slots)][:size])


def plan(contexts, cost):
    return plan_calls(contexts, NUM_SLOTS, 1, window_for, pad_slots, cost)


def price(parts, contexts, cost):
    """The cost of calls on these parts, each with the window of its longest slot."""
    rows = [pad_slots(part) for part in parts]
    windows = [window_for(max(contexts[slot] for slot in part)) for part in parts]
    costs = [cost(NUM_SLOTS if on is None else len(on), window) for on, window in zip(rows, windows, strict=True)]
    return tuple(map(sum, zip(*costs, strict=True)))


def cuts(classes):
    """All ways to cut a list into runs."""
    for ends in itertools.product([False, True], repeat=len(classes) - 1):
        runs = [[classes[0]]]
        for end, slots in zip(ends, classes[1:], strict=True):
            runs.append([slots]) if end else runs[-1].append(slots)
        yield [list(itertools.chain(*run)) for run in runs]


contexts = st.dictionaries(st.integers(0, NUM_SLOTS - 1), st.integers(1, WINDOWS[-1]), min_size=1, max_size=6)


@given(contexts, st.sampled_from([0.0, 3.0, 1e6]))
def test_every_slot_is_in_one_call_whose_window_covers_it(contexts, weights):
    calls = plan(contexts, decode_cost(weights, 1.0, NUM_SLOTS, 4))
    assert sorted(itertools.chain(*(call.targets for call in calls))) == sorted(contexts)
    for call in calls:
        assert call.window == window_for(max(contexts[slot] for slot in call.targets))
        assert call.slots is None or set(call.targets) <= set(call.slots)


@given(contexts, st.sampled_from([0.0, 40.0, 400.0]))
def test_no_other_partition_by_length_is_cheaper(contexts, weights):
    cost = decode_cost(weights, 1.0, NUM_SLOTS, 4)
    cheapest = price([call.targets for call in plan(contexts, cost)], contexts, cost)
    by_window = [[s for s in contexts if window_for(contexts[s]) == window] for window in WINDOWS]
    for parts in cuts([slots for slots in by_window if slots]):
        assert cheapest <= price(parts, contexts, cost)


def test_golden_calls():
    """Six short slots and one long: separate calls read 8·8 + 1·128 positions per step, one call 8·128."""
    contexts = {**dict.fromkeys(range(6), 5), 6: 100}
    calls = plan(contexts, decode_cost(0.0, 1.0, NUM_SLOTS, 4))
    assert [(call.targets, None if call.slots is None else call.slots.tolist(), call.window) for call in calls] == [
        ((0, 1, 2, 3, 4, 5), None, 8),
        ((6,), [6], 128),
    ]
    # A second read of the weights saves 8·128 − 8·8 − 128 = 832 positions, less two copies of 128 in four steps.
    assert len(plan(contexts, decode_cost(767.0, 1.0, NUM_SLOTS, 4))) == 2
    assert len(plan(contexts, decode_cost(769.0, 1.0, NUM_SLOTS, 4))) == 1


def test_prefill_splits_only_where_no_more_slots_are_computed():
    assert len(plan({0: 5, 1: 5, 2: 5, 3: 5, 4: 100}, prefill_cost)) == 2  # 4 + 1 slots, not all 8
    assert len(plan({0: 5, 1: 5, 2: 5, 3: 100}, prefill_cost)) == 1  # 4 + 1 slots, not 4
    assert len(plan({0: 5, 1: 100}, prefill_cost)) == 2  # 1 + 1 slots, as 2, and less of the cache


@pytest.mark.parametrize(
    ("length", "buckets", "expected"),
    [
        (1, (32, 128), (32,)),
        (34, (32, 128), (32, 32)),  # 2·(32 + 16) < 128 + 16
        (100, (32, 128), (128,)),  # 4·(32 + 16) > 128 + 16
        (300, (64, 256, 1024), (256, 64)),
        (1000, (64, 256, 1024), (1024,)),
        (5000, (1024,), (1024,) * 5),
        (0, (64,), ()),
    ],
)
def test_golden_cuts(length, buckets, expected):
    assert cut_into_buckets(length, buckets) == expected


@given(st.data(), st.sets(st.integers(1, 24), min_size=1, max_size=3))
def test_no_other_cut_is_cheaper(data, buckets):
    length = data.draw(st.integers(1, 2 * max(buckets) - 1))
    buckets, price = tuple(sorted(buckets)), lambda cut: sum(cut) + 16 * len(cut)
    cut = cut_into_buckets(length, buckets)
    assert sum(cut) >= length and set(cut) <= set(buckets)
    for count in range(1, 5):
        for other in itertools.combinations_with_replacement(buckets, count):
            assert sum(other) < length or price(cut) <= price(other)
