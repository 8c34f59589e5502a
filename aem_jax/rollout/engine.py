"""The conversation: episodes <-> slots <-> environments. The only room that sees both text and tokens.

On several hosts every process holds this whole conversation, but plays only its own slots with environments. Their
answers are exchanged before anything follows from them; so all processes make the same calls.
"""

import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from aem_jax.distributed import ALONE, Hosts
from aem_jax.rollout import continuous, lockstep
from aem_jax.rollout.config import RolloutConfig
from aem_jax.rollout.episode import Chat, Episode
from aem_jax.rollout.prompts import Prompts
from aem_jax.rollout.seats import Pool, Seats
from aem_jax.rollout.stats import RolloutStats
from aem_jax.rollout.table import Run, Table
from aem_jax.sampler import Sampler
from aem_jax.trajectory import Task, Trajectory


class Rollout:
    """Plays groups of episodes. Its KV caches are allocated once and live across steps.

    Args:
        sampler: the jitted sampler.
        chat: the tokenizer.
        pool: environment sessions, one for each slot that this process plays.
        config: settings.
        hosts: the processes that play; each has a rollout like this one, and calls it with the same arguments.

    Raises:
        ValueError: the pool has fewer sessions than there are slots.
    """

    def __init__(self, sampler: Sampler, chat: Chat, pool: Pool, config: RolloutConfig, hosts: Hosts = ALONE) -> None:
        self._sampler, self.config = sampler, config
        seats = Seats(pool, hosts, config.num_slots, config.num_cohorts)
        size = config.num_slots // config.num_cohorts
        sizes = config.slot_sizes(sampler.slot_shards)
        self._prompts = Prompts(sampler, config, size)
        self._tables = [
            Table(sampler, chat, seats, hosts, config, self._prompts, first, size, sizes)
            for first in range(0, config.num_slots, size)
        ]

    def warm_up(self, params: Any) -> None:
        """Compiles every program that a rollout can call; afterwards nothing compiles."""
        c, sampler, table = self.config, self._sampler, self._tables[0]
        num_slots = len(table.episodes)
        table.state = self._prompts.warm_up(params, table.state)
        for size in (*table.sizes, num_slots):
            slots = None if size == num_slots else sampler.pad_slots([], num_slots, [size])
            nothing = np.zeros(size, np.int32)
            for window in sampler.windows:
                for bucket in c.extend_buckets:
                    tokens = np.zeros((size, bucket), np.int32)
                    table.state = sampler.extend(params, table.state, tokens, nothing, slots, window=window)
                table.state, _ = sampler.decode(params, table.state, nothing, c.decode_chunk, slots, window=window)
        table.state = sampler.rewind(table.state, np.zeros(num_slots, np.int32))

    def __call__(
        self, params: Any, tasks: Sequence[Task], key: jax.Array, *, group_size: int | None = None
    ) -> tuple[list[Trajectory], RolloutStats]:
        """Plays `group_size` episodes of each task.

        Args:
            params: decode-layout parameters.
            tasks: one rollout group each.
            key: PRNG key; episode j of group i samples with split i * group_size + j of it, whatever its slot.
            group_size: the configured one by default.

        Returns:
            Trajectories ordered by group and member, and the rollout's counts.
        """
        start = time.perf_counter()
        size = group_size or self.config.group_size
        prng = np.asarray(jax.random.key_data(jax.random.split(key, len(tasks) * size)))
        episodes = [Episode(task, i, j, prng[i * size + j]) for i, task in enumerate(tasks) for j in range(size)]
        run = Run(params, deque(episodes))
        self._prompts.forget()
        for table in self._tables:
            table.clear()
        try:
            if self.config.mode == "continuous":
                continuous.converse(run, self._tables[0], self._sampler, self.config)
            else:
                lockstep.converse(run, self._tables, self._sampler, self.config)
        finally:
            run.stats.device_busy_s = run.clock.stop()
        run.stats.total_s = time.perf_counter() - start
        run.stats.episodes = len(run.done)
        return sorted(run.done, key=lambda t: (t.group, t.member)), run.stats
