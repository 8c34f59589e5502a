"""Continuous batching over turns: whoever has something to say decodes, whoever has heard something joins them.

Each round takes the answers that are here, computes them, and calls the next chunk for all slots that speak; then it
reads the chunk before it. So the device always has a program waiting, and the host reads, tokenises and talks to
environments meanwhile. Of a slot in a chunk that was not read yet the host does not know whether it still speaks:
it gets the budget `CONTINUE`, and says nothing if its response has ended.

Slots of very different length decode in calls of their own (`calls`). Who decodes with whom depends on timing, hence
the shapes of calls, hence the last bits of logprobs: the same seed samples the same tokens unless two of them are as
likely as each other to the last bits.
"""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from aem_jax.rollout.calls import Call, decoding_cost
from aem_jax.rollout.config import RolloutConfig
from aem_jax.rollout.episode import Episode
from aem_jax.rollout.table import Run, Table
from aem_jax.sampler import CONTINUE, Decoded, Sampler


@dataclass(frozen=True)
class _Chunk:
    """A call that was made and not read.

    Attributes:
        decoded: what was said, perhaps not yet there.
        rows: of each row, the slot, who speaks, and in which turn.
    """

    decoded: Decoded
    rows: list[tuple[int, int, Episode, int]]


def converse(run: Run, table: Table, sampler: Sampler, config: RolloutConfig) -> None:
    """Plays the queue to its end."""
    unread: deque[list[_Chunk]] = deque()
    state, num_slots = table.state, len(table.episodes)
    # A tensor axis splits weights and cache alike, so it is left out.
    cost = decoding_cost(
        weights=_num_bytes(run.params),
        token=state.cache.token_bytes,
        num_slots=num_slots // sampler.slot_shards,
        steps=config.decode_chunk,
    )
    while True:
        table.seat(run, [table])
        if not any(table.episodes):
            return
        idle = not unread and not any(episode.budget for _, episode in table.seated())
        table.hear(run, everybody=False, patient=idle)
        table.compute(run)
        # Calls that were not read may cover a whole budget: then nothing is left to be said.
        speaking = {slot: e for slot, e in table.seated() if e.budget > e.unread * config.decode_chunk}
        if speaking:
            # What was not read yet may be as long as its chunks.
            contexts = {
                slot: len(e.ids) + e.said_count + min(e.unread * config.decode_chunk, e.budget)
                for slot, e in speaking.items()
            }
            calls = table.plan(contexts, cost)
            unread.append([_call(run, table, sampler, config.decode_chunk, speaking, call) for call in calls])
        while len(unread) > bool(speaking):
            for chunk in unread.popleft():
                _read(run, table, chunk)


def _num_bytes(tree: Any) -> float:
    return float(sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)))


def _call(run: Run, table: Table, sampler: Sampler, chunk: int, speaking: Mapping[int, Episode], call: Call) -> _Chunk:
    """Calls the next chunk of some of those who speak, as far as the host knows."""
    places = range(len(table.episodes)) if call.slots is None else call.slots.tolist()
    meant = set(call.meant)
    budgets, rows = np.zeros(len(places), np.int32), []
    for row, slot in enumerate(places):
        if slot in meant:
            episode = speaking[slot]
            budgets[row] = CONTINUE if episode.unread else episode.budget
            rows.append((row, slot, episode, len(episode.turns)))
            episode.unread += 1
    run.clock.called()
    table.state, decoded = sampler.decode(run.params, table.state, budgets, chunk, call.slots, window=call.window)
    run.clock.watch(decoded.counts)
    return _Chunk(decoded, rows)


def _read(run: Run, table: Table, chunk: _Chunk) -> None:
    """Waits for a chunk; responses that ended in it go to their environments."""
    out = jax.device_get(chunk.decoded)
    for row, slot, episode, turn in chunk.rows:
        # Else the response had ended in the chunk before; by now the next one may be under way.
        if episode.budget and turn == len(episode.turns):
            episode.unread -= 1
            table.said(run, slot, row, out)
            if not episode.budget:
                table.send(slot)
