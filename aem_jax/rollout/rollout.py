"""A rollout: tasks → trajectories, and the memory of its KV caches.

With several processes, each has a rollout of all slots, and environments for its own. Replies are gathered before any
decision, so all processes make the same calls.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from aem_jax.distributed import SINGLE_PROCESS, ProcessGroup
from aem_jax.envs.prompt import Prompt
from aem_jax.envs.protocol import Task
from aem_jax.rollout import continuous, lockstep
from aem_jax.rollout.carry import Carried, GroupAttempts
from aem_jax.rollout.config import RolloutConfig
from aem_jax.rollout.context import Chat
from aem_jax.rollout.episode import Attempt, Episode
from aem_jax.rollout.prompt_cache import PromptCache, prompt_rows
from aem_jax.rollout.replay import replay
from aem_jax.rollout.sessions import Pool, SlotSessions
from aem_jax.rollout.slots import Job, SlotGroup
from aem_jax.rollout.stats import RolloutStats
from aem_jax.sampler import Sampler
from aem_jax.trajectory import Trajectory

GIB = 2**30


class Rollout:
    """Plays groups of episodes. Its KV caches are allocated once and live across steps.

    Args:
        sampler: the jitted sampler.
        chat: the tokenizer.
        pool: environment sessions, one for each slot that this process plays.
        config: settings.
        processes: the processes of the run; each constructs and calls a rollout with the same arguments.
        compose: the environment's `TaskSuite.prompt`, for `rollout.prompt_style = "single"`.

    Raises:
        ValueError: the pool has fewer sessions than there are slots, or there is no `compose` where one is needed.
    """

    def __init__(
        self,
        sampler: Sampler,
        chat: Chat,
        pool: Pool,
        config: RolloutConfig,
        processes: ProcessGroup = SINGLE_PROCESS,
        compose: Prompt | None = None,
    ) -> None:
        if config.prompt_style == "single" and compose is None:
            raise ValueError("expected compose with rollout.prompt_style 'single', got None; pass TaskSuite.prompt")
        self._sampler, self.config = sampler, config
        sessions = self._sessions = SlotSessions(pool, processes, config.num_slots, config.num_cohorts)
        size = config.num_slots // config.num_cohorts
        sizes = config.slot_sizes(sampler.slot_shards)
        self._prompts = PromptCache(sampler, config, size)
        self._groups = [
            SlotGroup(sampler, chat, sessions, processes, config, self._prompts, first, size, sizes, compose)
            for first in range(0, config.num_slots, size)
        ]
        self._live: Mapping[int, Episode] = {}  # `Carried.episodes` that are in the slots, with their environments

    def warm_up(self, params: Any) -> None:
        """Compiles every program that a rollout can call; afterwards nothing compiles."""
        config, sampler, group = self.config, self._sampler, self._groups[0]
        num_slots = len(group.episodes)
        group.state = self._prompts.warm_up(params, group.state)
        for size in (*group.sizes, num_slots):
            slots = None if size == num_slots else sampler.pad_slots([], num_slots, [size])
            zeros = np.zeros(size, np.int32)
            for window in sampler.windows:
                for bucket in config.extend_buckets:
                    tokens = np.zeros((size, bucket), np.int32)
                    group.state = sampler.extend(params, group.state, tokens, zeros, slots, window=window)
                # A ragged decode and one of a cohort are made on all slots.
                if slots is None or not (sampler.is_ragged or config.mode == "lockstep"):
                    group.state, _ = sampler.decode(
                        params, group.state, zeros, config.decode_chunk, slots, window=window
                    )
        zeros = np.zeros(num_slots, np.int32)
        for window in sampler.windows if config.context != "append" else ():  # see `SlotGroup._plan_passes`
            group.state = sampler.copy_prefix(group.state, zeros - 1, zeros, window=window)
        group.state = sampler.rewind(group.state, zeros)
        if sampler.records_experts:
            sampler.read_experts(group.state, 0)
        if config.carry_min_groups:
            group.state = sampler.restart(group.state, zeros > 0, np.zeros((num_slots, 2), np.uint32), zeros)

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
        size = group_size or self.config.group_size
        prng = np.asarray(jax.random.key_data(jax.random.split(key, len(tasks) * size)))
        attempts = [Attempt(task, i, j, prng[i * size + j]) for i, task in enumerate(tasks) for j in range(size)]
        job = Job(params, deque(attempts))
        self._run(job, {})
        return _ordered(job.finished), job.stats

    def carry_on(
        self, params: Any, carried: Carried, attempts: GroupAttempts, step: int
    ) -> tuple[list[Trajectory], Carried, RolloutStats]:
        """Plays groups until enough of them are complete (`Carried.is_enough`); new ones take the free places.

        Episodes under way stay in their slots and environments, unless something else has been played since, or the run
        was resumed: then their environments get the recorded responses again.

        Args:
            params: decode-layout parameters.
            carried: the groups under way.
            attempts: the episodes of a new group.
            step: training step, the version of the parameters.

        Returns:
            Trajectories of complete groups, ordered by group and member; the groups under way; and the call's counts.
        """
        config = self.config
        carried = carried.fill(config.groups_per_step, attempts, step)
        is_enough = partial(carried.is_enough, config=config, step=step)
        job = Job(params, deque(carried.queue), list(carried.finished), version=step, is_enough=is_enough)
        self._run(job, carried.episodes)
        complete = carried.complete(job.finished, config.group_size)
        size = config.num_slots // config.num_cohorts
        self._live = {
            first * size + slot: episode for first, group in enumerate(self._groups) for slot, episode in group.active()
        }
        carried = Carried(
            started=carried.started,
            groups={number: start for number, start in carried.groups.items() if number not in complete},
            finished=_ordered(t for t in job.finished if t.group not in complete),
            episodes=self._live,
            queue=list(job.queue),
        )
        return _ordered(t for t in job.finished if t.group in complete), carried, job.stats

    def serve(self, params: Any, attempts: Any, should_stop: Callable[[], bool]) -> None:
        """Plays attempts until it is told to stop, and keeps no trajectories.

        Args:
            params: decode-layout parameters.
            attempts: a queue, as `Job.queue`; it need not end.
            should_stop: asked after replies of the pool.
        """
        self._run(Job(params, attempts, deque(maxlen=0), is_enough=lambda finished: should_stop()), {})

    def _run(self, job: Job, episodes: Mapping[int, Episode]) -> None:
        """Plays the job's queue and these episodes under way, by slot."""
        start, finished = time.perf_counter(), len(job.finished)
        live, self._live = self._live, {}
        self._prompts.clear()
        if episodes is not live:
            self._resume(job, episodes)
        for group in self._groups:
            group.expire()
        try:
            if self.config.mode == "continuous":
                continuous.run(job, self._groups[0], self._sampler, self.config)
            else:
                lockstep.run(job, self._groups, self._sampler, self.config)
        finally:
            job.stats.device_busy_s = job.clock.stop()
        job.stats.total_s = time.perf_counter() - start
        job.stats.episodes = len(job.finished) - finished

    def _resume(self, job: Job, episodes: Mapping[int, Episode]) -> None:
        """Frees all slots, assigns the episodes to theirs, and brings their environments to where they were.

        The slots of all groups at once: a call of one group may wait for room that episodes of another one hold.
        """
        pending = {slot: call for group in self._groups for slot, call in group.reset().items()}
        self._sessions.release_when_done(pending)
        if episodes:
            replies, resets = replay(self._sessions, episodes)
            for group in self._groups:
                group.resume(job, episodes, replies, resets)


def _ordered(trajectories: Iterable[Trajectory]) -> list[Trajectory]:
    return sorted(trajectories, key=lambda t: (t.group, t.member))


def cache_bytes(sampler: Sampler, config: RolloutConfig, num_slots: int) -> int:
    """Bytes of a rollout's KV caches on each device: all slots, and the rows for first prompts.

    Args:
        sampler: the sampler of the rollout.
        config: cohorts, group size and lengths.
        num_slots: replaces the configured number; a multiple of the cohorts and of the sampler's `slot_shards`.
    """
    size = num_slots // config.num_cohorts
    rows = prompt_rows(size, config, sampler.slot_shards)
    states = [sampler.abstract(size)] * config.num_cohorts + [sampler.abstract(rows, config.prompt_tokens)]
    return sum(map(_device_bytes, jax.tree.leaves(states)))


def check_cache_memory(sampler: Sampler, config: RolloutConfig, device_bytes: int | None) -> str:
    """Checks that the KV caches of a rollout fit, before any is allocated.

    Args:
        sampler: the sampler of the rollout.
        config: settings; `cache_gib` is the budget, if it is set.
        device_bytes: memory of a device; None if it is unknown.

    Returns:
        A sentence that states the caches' size.

    Raises:
        ValueError: the caches do not fit; names the number of slots that would.
    """
    limit = config.cache_gib * GIB or device_bytes or math.inf
    needed = cache_bytes(sampler, config, config.num_slots)
    if needed > limit:
        step = config.num_cohorts * sampler.slot_shards
        fits = [n for n in range(step, config.num_slots, step) if cache_bytes(sampler, config, n) <= limit]
        most = f"at most {fits[-1]}" if fits else f"none: even {step} do not fit, lower rollout.context_tokens"
        whose = "rollout.cache_gib" if config.cache_gib else "the device's memory"
        raise ValueError(
            f"--rollout.num-slots: expected {most} with KV caches of {limit / GIB:.4g} GiB on a device ({whose}), got "
            f"{config.num_slots}, which take {needed / GIB:.4g} GiB"
        )
    return (
        f"KV caches take {needed / GIB:.4g} GiB of each device: {config.num_slots} slots of {sampler.capacity} tokens, "
        f"and first prompts of {config.prompt_tokens}"
    )


def _device_bytes(leaf: jax.ShapeDtypeStruct) -> int:
    shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
    return math.prod(shape) * leaf.dtype.itemsize
