"""Prefixes of prompts that one slot of a group computes and the others copy.

The episodes of a group have the same first observation, and often the same first turns. So a prompt often begins like
one that another slot of the group holds, or like one that it is about to compute. The longest such prefix is copied,
where it is longer than the prefix that the slot keeps of its own previous prompt.

The same ids behind the same prefix have the same keys and values, so a copy changes nothing but the rounding. Ids that
are the same but moved, as the turns of a window that slides, have other positions and attend to other tokens: they
are computed again.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

_COPY_COST = 8
"""Cost of copying a prefix, in computed tokens: shorter gains are left."""


@dataclass(frozen=True)
class Pass:
    """Copies between slots, and the prefills that follow them.

    Attributes:
        source: slot -> slot whose prefix is copied to it, of the slots that copy.
        keep: slot -> leading ids of the prompt that the slot then holds, of all slots of the pass.
    """

    source: dict[int, int] = field(default_factory=dict)
    keep: dict[int, int] = field(default_factory=dict)


def plan_passes(
    prompts: Mapping[int, Sequence[int]],
    own: Mapping[int, int],
    held: Mapping[int, Sequence[int]],
    family: Callable[[int], object],
    cost: Callable[[Mapping[int, int]], float],
) -> list[Pass]:
    """One or two passes that prefill prompts; in the second, slots copy from those of the first.

    Slots with equal prompts always share. Slots that share a part of their prompts do where that is cheaper, because
    the second pass then computes tokens, too.

    Args:
        prompts: slot -> ids of its prompt, of the slots to prefill.
        own: slot -> leading ids that it holds already.
        held: slot -> ids that it holds, of all slots that may be copied from.
        family: slot -> group and shard; only slots of one family share.
        cost: {slot: ids to compute} of a pass -> cost.

    Returns:
        Passes that contain each slot of `prompts` once.
    """
    ids = {slot: np.asarray(prompt, np.int32) for slot, prompt in prompts.items()}
    cached = {slot: np.asarray(prompt, np.int32) for slot, prompt in held.items()}
    families: dict[object, list[int]] = {}
    for slot in sorted({*prompts, *held}):
        families.setdefault(family(slot), []).append(slot)

    def plan(partial: bool) -> list[Pass]:
        first, second = Pass(), Pass()
        for slots in families.values():
            _share(slots, ids, own, cached, partial, first, second)
        return [first, second] if second.keep else [first]

    def total(passes: list[Pass]) -> float:
        return sum(cost({s: len(ids[s]) - keep for s, keep in p.keep.items() if keep < len(ids[s])}) for p in passes)

    return min((plan(partial=False), plan(partial=True)), key=total)


def _share(
    slots: Sequence[int],
    ids: Mapping[int, np.ndarray],
    own: Mapping[int, int],
    cached: Mapping[int, np.ndarray],
    partial: bool,
    first: Pass,
    second: Pass,
) -> None:
    """Adds the slots of one family to the passes."""
    leaders: list[int] = []
    for slot in (slot for slot in slots if slot in ids):
        prompt = ids[slot]
        keep = own[slot]
        # A prompt that is held in part ends with a token to compute: its hidden state is not held.
        standing = [
            (min(common_prefix(prompt, cached[other]), len(prompt) - 1), other)
            for other in slots
            if other != slot and other in cached and other not in first.source
        ]
        longest, source = max(standing, default=(0, slot))
        if longest < keep + _COPY_COST or slot in first.source.values():
            longest, source = keep, slot
        shared, leader = max(((common_prefix(prompt, ids[other]), other) for other in leaders), default=(0, slot))
        equal = leader != slot and shared == len(prompt) == len(ids[leader])
        shared = shared if equal else min(shared, len(prompt) - 1)
        if equal or (partial and shared >= longest + _COPY_COST):
            second.source[slot], second.keep[slot] = leader, shared
            continue
        leaders.append(slot)
        first.keep[slot] = longest
        if source != slot:
            first.source[slot] = source


def common_prefix(one: np.ndarray, other: np.ndarray) -> int:
    """Length of the common prefix of two rows of ids."""
    length = min(len(one), len(other))
    differs = one[:length] != other[:length]
    first = int(differs.argmax()) if length else 0
    return first if length and differs[first] else length
