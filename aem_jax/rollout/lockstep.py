"""Turn by turn: a cohort collects all its environments' replies, prefills, and decodes until every response has ended.

While one cohort waits for its environments, the next one uses the device. Which slots decode together never depends on
timing, so a rollout is a function of its key, bit by bit. Environments that wait for room on their host are the
exception: they are not waited for, because episodes of the same cohort may hold the room.
"""

from collections.abc import Iterator, Sequence

import jax
import numpy as np

from aem_jax.rollout.config import RolloutConfig
from aem_jax.rollout.slots import Job, SlotGroup
from aem_jax.sampler import Sampler


def run(job: Job, groups: Sequence[SlotGroup], sampler: Sampler, config: RolloutConfig) -> None:
    """Plays all queued episodes, or until there are enough; each group of slots is a cohort.

    A call that ends early leaves every episode with an observation, before its response.
    """
    cohorts = [_run_cohort(job, group, groups, sampler, config) for group in groups]
    while cohorts:
        cohorts = [cohort for cohort in cohorts if next(cohort, "over") != "over"]


def _run_cohort(
    job: Job, group: SlotGroup, groups: Sequence[SlotGroup], sampler: Sampler, config: RolloutConfig
) -> Iterator[str]:
    """Plays one cohort; yields whenever it waits for its environments.

    Episodes only end, so once one cohort finds that there are enough, so do the others after their replies.
    """
    while True:
        group.assign(job, groups)
        if not any(group.episodes):
            return
        yield "waiting"
        group.collect(job, wait_all=True)
        if job.is_enough(job.finished):
            return
        group.prefill(job)
        # Other slots wait for room. Each process knows this of its own slots alone, and `submit` is collective.
        responding = [slot for slot, episode in group.active() if episode.budget]
        _decode_responses(job, group, sampler, config.decode_chunk)
        for slot in responding:
            group.submit(slot)


def _decode_responses(job: Job, group: SlotGroup, sampler: Sampler, chunk: int) -> None:
    """Decodes until every response has ended by a stop id or its budget."""
    while decoding := {slot: episode for slot, episode in group.active() if episode.budget}:
        budgets = np.zeros(len(group.episodes), np.int32)
        for slot, episode in decoding.items():
            budgets[slot] = episode.budget
        window = sampler.window_for(max(episode.num_tokens for episode in decoding.values()))
        job.clock.before_call()
        group.state, decoded = sampler.decode(job.params, group.state, budgets, chunk, window=window)
        job.clock.after_call(decoded.counts)
        on_host = jax.device_get(decoded)
        for slot in decoding:
            group.append_sampled(job, slot, slot, on_host)
