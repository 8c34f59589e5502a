"""Continuous batching over turns: whoever has something to say decodes, whoever has heard something joins them.

Each round takes the answers that are here, computes them, and calls the next chunk for all slots that speak; then it
reads the chunk before it. So the device always has a program waiting, and the host reads, tokenises and talks to
environments meanwhile. Of a slot in a chunk that was not read yet the host does not know whether it still speaks:
it gets the budget `GO_ON`, and says nothing if its response has ended.

Who decodes with whom depends on timing, hence the shapes of calls, hence the last bits of logprobs: the same seed
samples the same tokens unless two of them are as likely as each other to the last bits.
"""

from collections import deque
from dataclasses import dataclass

import jax
import numpy as np

from aem_jax.rollout.config import RolloutConfig
from aem_jax.rollout.episode import Episode
from aem_jax.rollout.table import Run, Table
from aem_jax.sampler import GO_ON, Decoded, Sampler


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
    unread: deque[_Chunk] = deque()
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
            unread.append(_call(run, table, sampler, config.decode_chunk, speaking))
        while len(unread) > bool(speaking):
            _read(run, table, unread.popleft())


def _call(run: Run, table: Table, sampler: Sampler, chunk: int, speaking: dict[int, Episode]) -> _Chunk:
    """Calls the next chunk of those who speak, as far as the host knows."""
    num_slots = len(table.episodes)
    slots = sampler.place(list(speaking), num_slots, table.sizes)
    places = range(num_slots) if slots is None else slots.tolist()
    budgets, rows = np.zeros(len(places), np.int32), []
    for row, slot in enumerate(places):
        if (episode := speaking.get(slot)) is not None:
            budgets[row] = GO_ON if episode.unread else episode.budget
            rows.append((row, slot, episode, len(episode.turns)))
    # What was not read yet may be as long as its chunks.
    longest = max(len(e.ids) + e.said_count + min(e.unread * chunk, e.budget) for e in speaking.values())
    run.clock.called()
    table.state, decoded = sampler.decode(run.params, table.state, budgets, chunk, slots, window=sampler.cover(longest))
    run.clock.watch(decoded.counts)
    for episode in speaking.values():
        episode.unread += 1
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
