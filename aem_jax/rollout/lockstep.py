"""Turn by turn: a cohort hears all its environments, computes, and decodes until every response has ended.

While one cohort waits for its environments, the next has the device. Who decodes with whom never depends on timing,
so a run is a function of its seed, to the last bit.
"""

from collections.abc import Iterator, Sequence

import jax
import numpy as np

from aem_jax.rollout.config import RolloutConfig
from aem_jax.rollout.table import Run, Table
from aem_jax.sampler import Sampler


def converse(run: Run, tables: Sequence[Table], sampler: Sampler, config: RolloutConfig) -> None:
    """Plays the queue to its end, each table a cohort."""
    talks = [_talk(run, table, tables, sampler, config) for table in tables]
    while talks:
        talks = [talk for talk in talks if next(talk, "over") != "over"]


def _talk(run: Run, table: Table, tables: Sequence[Table], sampler: Sampler, config: RolloutConfig) -> Iterator[str]:
    """One cohort's conversation; yields whenever it waits for its environments."""
    while True:
        table.seat(run, tables)
        if not any(table.episodes):
            return
        yield "waiting"
        table.hear(run, everybody=True)
        table.compute(run)
        _speak(run, table, sampler, config.decode_chunk)
        for slot, _ in table.seated():
            table.send(slot)


def _speak(run: Run, table: Table, sampler: Sampler, chunk: int) -> None:
    """Decodes until every response has ended by a stop id or its budget."""
    while speaking := {slot: episode for slot, episode in table.seated() if episode.budget}:
        budgets = np.zeros(len(table.episodes), np.int32)
        for slot, episode in speaking.items():
            budgets[slot] = episode.budget
        window = sampler.window_for(max(len(episode.ids) + episode.said_count for episode in speaking.values()))
        run.clock.called()
        table.state, decoded = sampler.decode(run.params, table.state, budgets, chunk, window=window)
        run.clock.watch(decoded.counts)
        out = jax.device_get(decoded)
        for slot in speaking:
            table.said(run, slot, slot, out)
