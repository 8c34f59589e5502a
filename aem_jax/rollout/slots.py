"""Episodes assigned to the slots of one sampler state. Scheduling lives in `lockstep.py` and `continuous.py`."""

import logging
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from aem_jax.distributed import ProcessGroup
from aem_jax.envs.prompt import Prompt
from aem_jax.envs.protocol import StepResult
from aem_jax.rollout.batching import (
    Call,
    Cost,
    chunks_cost,
    cut_into_chunks,
    plan_calls,
    prefill,
    prefill_cost,
)
from aem_jax.rollout.config import RolloutConfig
from aem_jax.rollout.context import Chat
from aem_jax.rollout.episode import Attempt, EnvReply, Episode, observe
from aem_jax.rollout.prompt_cache import PromptCache
from aem_jax.rollout.sessions import SlotSessions
from aem_jax.rollout.sharing import Pass, plan_passes
from aem_jax.rollout.stats import DeviceClock, RolloutStats
from aem_jax.sampler import Decoded, Sampler
from aem_jax.trajectory import Ending, Trajectory

log = logging.getLogger(__name__)

_ROOM_S = 0.25
"""How often a process that waits for all of its environments looks whether they wait for room."""
_POLL_S = 0.02
"""How long a process waits for its own environments before it gathers the other processes' replies."""


@dataclass
class Job:
    """One call of the rollout, shared between its slot groups (mutable).

    Attributes:
        params: decode-layout parameters.
        queue: attempts that wait for a slot.
        finished: episodes that ended.
        version: training step whose parameters these are (`Turn.versions`).
        is_enough: finished episodes -> whether the call may end before all episodes have.
        stats: counts and seconds.
        clock: time in which the device had a program to run.
        skipped_tasks: ids of tasks that were over at their reset, each logged once.
    """

    params: Any
    queue: deque[Attempt]
    finished: list[Trajectory] | deque[Trajectory] = field(default_factory=list)
    version: int = 0
    is_enough: Callable[[Sequence[Trajectory]], bool] = lambda finished: False
    stats: RolloutStats = field(default_factory=RolloutStats)
    clock: DeviceClock = field(default_factory=DeviceClock)
    skipped_tasks: set[str] = field(default_factory=set)


class SlotGroup:
    """Some slots, their episodes, their environment calls and their KV caches.

    Args:
        sampler: the jitted sampler.
        chat: the tokenizer.
        sessions: environment sessions of all slots.
        processes: the processes of the run.
        config: settings.
        prompts: prefills first prompts; shared between groups.
        first_slot: number of the first slot, over all groups.
        num_slots: number of slots.
        sizes: numbers of slots, below all of them, that a call may be made on.
        compose: the environment's `TaskSuite.prompt`.

    Attributes:
        state: the sampler's state of the slots.
        episodes: the episode in each slot; None where the slot is free.
    """

    def __init__(
        self,
        sampler: Sampler,
        chat: Chat,
        sessions: SlotSessions,
        processes: ProcessGroup,
        config: RolloutConfig,
        prompts: PromptCache,
        first_slot: int,
        num_slots: int,
        sizes: Sequence[int],
        compose: Prompt | None,
    ) -> None:
        self._sampler, self._chat, self._sessions, self._processes = sampler, chat, sessions, processes
        self._compose = compose
        self._config, self._prompts, self._first, self.sizes = config, prompts, first_slot, sizes
        self.state = sampler.init(num_slots)
        self.episodes: list[Episode | None] = [None] * num_slots
        self._calls: dict[int, Future[StepResult]] = {}  # of this process's slots
        self._stale = set[int]()  # slots whose cache is of other parameters than the job's, or of another episode

    def reset(self) -> dict[int, Future[StepResult]]:
        """Frees all slots, and releases the sessions without a pending call.

        Returns:
            Slot, over all groups -> its pending call. The caller releases each slot when its call ends.
        """
        pending = {self._first + slot: call for slot, call in self._calls.items() if not call.done()}
        for slot, _ in self.active():
            if self._first + slot not in pending:
                self._sessions.release(self._first + slot)
        self._calls = {}
        self.episodes = [None] * len(self.episodes)
        return pending

    def expire(self) -> None:
        """Marks the caches of all episodes as out of date: they are computed again before the episodes go on."""
        self._stale = {slot for slot, _ in self.active()}

    def resume(
        self,
        job: Job,
        episodes: Mapping[int, Episode],
        replies: Mapping[int, EnvReply],
        resets: Mapping[int, Future[StepResult]],
    ) -> None:
        """Assigns episodes under way, whose environments were replayed, to free slots. Collective.

        Args:
            job: the call of the rollout.
            episodes: slot, over all groups -> episode.
            replies: errors of the replay in this process's slots.
            resets: pending resets of this process's slots (`replay`).
        """
        own = range(self._first, self._first + len(self.episodes))
        self.episodes = [episodes.get(slot) for slot in own]
        failed = {slot - self._first: reply for slot, reply in replies.items() if slot in own}
        for slot, reply in sorted(all_gather_replies(self._processes, failed, self.episodes).items()):
            self._apply(job, slot, reply)
        for slot, episode in self.active():
            if reset := resets.get(self._first + slot):
                self._calls[slot] = reset
            elif episode.response and not episode.budget:
                self._send(slot)

    def active(self) -> Iterable[tuple[int, Episode]]:
        """Slots that are taken, with their episodes."""
        return ((slot, episode) for slot, episode in enumerate(self.episodes) if episode is not None)

    def assign(self, job: Job, groups: Sequence["SlotGroup"]) -> None:
        """Assigns queued episodes to free slots, and resets their environments."""
        for slot, episode in enumerate(self.episodes):
            if episode is None and (attempt := self._next_attempt(job, self._first + slot, groups)):
                self.episodes[slot] = Episode(attempt)
                self._stale.discard(slot)
                if call := self._sessions.reset(self._first + slot, attempt.task.payload):
                    self._calls[slot] = call

    def _next_attempt(self, job: Job, slot: int, groups: Sequence["SlotGroup"]) -> Attempt | None:
        """Takes the first attempt from the queue that may start in a slot.

        A server plays one quarantined episode at a time.
        """
        server = self._sessions.server_of(slot)
        for index, attempt in enumerate(job.queue):
            if not (attempt.quarantined and any(group._plays_quarantined(server) for group in groups)):
                del job.queue[index]
                return attempt
        return None

    def _plays_quarantined(self, server: tuple[int, int]) -> bool:
        return any(
            episode.attempt.quarantined and self._sessions.server_of(self._first + slot) == server
            for slot, episode in self.active()
        )

    def collect(self, job: Job, *, wait_all: bool, block: bool = True) -> None:
        """Collects the environments' replies, and frees the slots of episodes that end.

        Args:
            job: the call of the rollout.
            wait_all: wait for all pending calls but those that wait for room; else collect those that are done.
            block: if none is done, wait for the first (with several processes: for a moment).
        """
        start = time.perf_counter()
        calls = self._calls
        if wait_all:
            waiting = self._wait_for_all()
            calls = {slot: call for slot, call in calls.items() if slot not in waiting}
        else:
            if block and calls:
                timeout = None if self._processes.count == 1 else _POLL_S
                wait(calls.values(), timeout=timeout, return_when=FIRST_COMPLETED)
            calls = {slot: call for slot, call in calls.items() if call.done()}
        own = {slot: self._observe(slot, call) for slot, call in sorted(calls.items())}
        for slot, reply in sorted(all_gather_replies(self._processes, own, self.episodes).items()):
            self._apply(job, slot, reply)
        if wait_all or block:
            job.stats.environment_s += time.perf_counter() - start

    def _wait_for_all(self) -> set[int]:
        """Waits for all pending calls but those that wait for room; returns the slots of these.

        What they wait for may be held by episodes of this group, or of another one that has its turn after this.
        """
        rest = self._calls
        while rest:
            wait(rest.values(), timeout=_ROOM_S)
            rest = {slot: call for slot, call in self._calls.items() if not call.done()}
            if all(self._sessions.waits(self._first + slot) for slot in rest):
                return set(rest)
        return set()

    def _observe(self, slot: int, call: Future[StepResult]) -> EnvReply:
        episode = self.episodes[slot]
        assert episode is not None
        return observe(episode, call, self._config, self._chat, self._compose)

    def _apply(self, job: Job, slot: int, reply: EnvReply) -> None:
        """Applies a reply to a slot's episode, and frees the slot if the episode ended or failed."""
        episode, config = self.episodes[slot], self._config
        assert episode is not None
        self._calls.pop(slot, None)
        if reply.restarted:
            log.warning("episode %s/%d begins again: %s", episode.attempt.task.id, episode.attempt.member, reply.error)
            job.stats.retries += 1
            self.episodes[slot] = Episode(episode.attempt)
            return
        if reply.error is not None:
            self.episodes[slot] = None
            self._retry_or_mask(job, episode, reply)
            return
        if reply.ending is not None and episode.observation is None:
            why = (
                f"expected a first prompt of at most rollout.prompt_tokens = {config.prompt_tokens} tokens, got "
                f"{len(reply.prefill_tokens)}; raise rollout.prompt_tokens"
            )
            task = episode.attempt.task.id
            if task not in job.skipped_tasks:
                log.warning("task %s is left out: %s", task, why)
                job.skipped_tasks.add(task)
            job.stats.first_error = job.stats.first_error or f"task {task}: {why}"
            job.stats.overlong_prompts += 1
        job.stats.branches += reply.branches
        job.stats.rematched += reply.rematched
        if reply.received and episode.response and episode.experts is None:
            # A client's stop text ended the response before its budget (context "tree"), so it was not submitted.
            episode = self._with_experts(slot, episode)
        episode = episode.apply_reply(reply, config.context)
        if reply.ending is None:
            self.episodes[slot] = episode
        else:
            self.episodes[slot] = None
            self._sessions.release(self._first + slot)  # the environment does not know of the rollout's limits
            job.finished.append(episode.trajectory(reply.ending, config.context, reply.success, reply.score))

    def _retry_or_mask(self, job: Job, episode: Episode, reply: EnvReply) -> None:
        """Queues another attempt at a failed episode, or ends it as an environment error."""
        attempt, stats = episode.attempt, job.stats
        task, error = attempt.task.id, " ".join((reply.error or "").split())
        stats.first_error = stats.first_error or f"task {task}: {error}"
        count_retry = attempt.quarantined or not reply.lost
        if reply.retryable and (not count_retry or attempt.retries < self._config.max_retries):
            log.warning("episode %s/%d is retried: %s", task, attempt.member, error)
            stats.retries += 1
            job.queue.appendleft(attempt.retry(count_retry=count_retry))
            return
        if reply.retryable:
            log.warning("episode %s/%d is masked: %s", task, attempt.member, error)
        elif task not in job.skipped_tasks:
            log.warning("task %s is left out: %s", task, error)
            job.skipped_tasks.add(task)
        stats.env_errors += 1
        job.finished.append(episode.trajectory(Ending.ENV_ERROR, self._config.context))

    def prefill(self, job: Job) -> None:
        """Prefills new observations, and caches that are out of date; responses may then be sampled."""
        outdated = lambda slot, episode: slot in self._stale and episode.budget > 0
        pending = [(slot, e) for slot, e in self.active() if e.needs_prefill or outdated(slot, e)]
        if not pending:
            return
        job.clock.before_call()
        limit = self._config.prompt_tokens
        new = [slot for slot, episode in pending if not episode.cached_ids]
        first = [(slot, _tokens(e)[:limit], e.attempt.prng) for slot, e in pending if not e.cached_ids]
        self.state = self._prompts.fork(job.params, self.state, first, job.stats)
        # The rest of a longer first prompt (context "tree") is appended.
        pending = [(slot, e.forked(limit) if slot in new and len(_tokens(e)) > limit else e) for slot, e in pending]
        self._append(job, {slot: episode for slot, episode in pending if episode.cached_ids})
        for slot, episode in pending:
            self._stale.discard(slot)
            if episode.needs_prefill:
                self.episodes[slot] = prefilled = episode.prefilled(self._config)
                job.stats.prompt_tokens += len(prefilled.cached_ids)
                if call := self._sessions.without_response(self._first + slot):
                    self._calls[slot] = call

    def _append(self, job: Job, pending: Mapping[int, Episode]) -> None:
        """Prefills the prompts of running episodes behind the ids that their slots keep, or copy from other slots.

        A slot that is out of date keeps none, and none are copied from it before it is computed again.
        """
        if not pending:
            return
        self._restart({slot: episode for slot, episode in pending.items() if slot in self._stale}, job)
        self._drop_surplus({slot: episode for slot, episode in pending.items() if episode.has_surplus})
        prompts = {slot: episode.context_ids for slot, episode in pending.items()}
        keep = {slot: 0 if slot in self._stale else episode.num_kept for slot, episode in pending.items()}
        for prefill_pass in self._plan_passes(prompts, keep):
            self._copy_or_rewind(prefill_pass)
            ids = {slot: prompts[slot][kept:] for slot, kept in prefill_pass.keep.items() if kept < len(prompts[slot])}
            for call in self.plan_calls({slot: len(prompts[slot]) for slot in ids}, prefill_cost) if ids else ():
                self.state = prefill(
                    self._sampler,
                    job.params,
                    self.state,
                    {slot: ids[slot] for slot in call.targets},
                    self._config.extend_buckets,
                    window=call.window,
                    sizes=self.sizes,
                    stats=job.stats,
                )

    def _plan_passes(self, prompts: Mapping[int, Sequence[int]], keep: Mapping[int, int]) -> list[Pass]:
        """What slots copy from one another; with appended contexts, nothing."""
        if self._config.context == "append":
            return [Pass(keep=dict(keep))]
        num_slots, buckets = len(self.episodes), self._config.extend_buckets
        cost = lambda lengths: chunks_cost(cut_into_chunks(lengths, buckets, self._pad_slots), num_slots)
        groups = {slot: episode.attempt.group for slot, episode in self.active()}
        held = {slot: e.cached_ids for slot, e in self.active() if e.cached_ids and slot not in self._stale}
        own = num_slots // self._sampler.slot_shards
        return plan_passes(prompts, keep, held, lambda slot: (groups[slot], slot // own), cost)

    def _copy_or_rewind(self, prefill_pass: Pass) -> None:
        """Brings the slots of a pass to the ids that they keep."""
        num_slots, sampler = len(self.episodes), self._sampler
        source, keep = np.full(num_slots, -1, np.int32), np.full(num_slots, sampler.capacity, np.int32)
        for slot, kept in prefill_pass.keep.items():
            episode = self.episodes[slot]
            assert episode is not None
            source[slot] = prefill_pass.source.get(slot, -1)
            if source[slot] >= 0 or kept < len(episode.cached_ids):
                keep[slot] = kept
        if prefill_pass.source:
            window = sampler.window_for(max(prefill_pass.keep[slot] for slot in prefill_pass.source))
            self.state = sampler.copy_prefix(self.state, source, keep, window=window)
        elif (keep < sampler.capacity).any():
            self.state = sampler.rewind(self.state, keep)

    def _drop_surplus(self, cut: Mapping[int, Episode]) -> None:
        """Truncates slots to the responses that were received; samples go on as if nothing more had been sampled."""
        if not cut:
            return
        num_slots = len(self.episodes)
        keep, sampled = np.full(num_slots, self._sampler.capacity, np.int32), np.full(num_slots, -1, np.int32)
        for slot, episode in cut.items():
            keep[slot], sampled[slot] = len(episode.cached_ids), episode.next_index(self._config.response_tokens)
        self.state = self._sampler.rewind(self.state, keep, sampled)

    def _restart(self, outdated: Mapping[int, Episode], job: Job) -> None:
        """Empties slots that are out of date."""
        if not outdated:
            return
        num_slots = len(self.episodes)
        chosen, sampled = np.zeros(num_slots, bool), np.zeros(num_slots, np.int32)
        prng = np.zeros((num_slots, 2), np.uint32)
        for slot, episode in outdated.items():
            chosen[slot], sampled[slot], prng[slot] = True, episode.num_sampled, episode.attempt.prng
            job.stats.recomputed_tokens += episode.num_kept
        self.state = self._sampler.restart(self.state, chosen, prng, sampled)

    def plan_calls(self, contexts: Mapping[int, int], cost: Cost) -> list[Call]:
        """Which slots share a call (`batching.plan_calls`)."""
        num_slots, sampler = len(self.episodes), self._sampler
        return plan_calls(contexts, num_slots, sampler.slot_shards, sampler.window_for, self._pad_slots, cost)

    def _pad_slots(self, slots: Sequence[int]) -> np.ndarray | None:
        return self._sampler.pad_slots(slots, len(self.episodes), self.sizes)

    def append_sampled(self, job: Job, slot: int, row: int, decoded: Decoded) -> None:
        """Appends row `row` of a decoded chunk to a slot's response; the budget becomes 0 when the response ends."""
        episode, count = self.episodes[slot], int(decoded.counts[row])
        assert episode is not None
        tokens, logprobs, entropies = (
            np.asarray(values[row, :count]) for values in (decoded.tokens, decoded.logprobs, decoded.entropies)
        )
        finished, versions = bool(decoded.finished[row]), np.full(count, job.version, np.int32)
        self.episodes[slot] = episode.append_sampled((tokens, logprobs, entropies, versions), finished=finished)
        self._sessions.sampled(self._first + slot, tokens, logprobs)
        job.stats.sampled_tokens += count

    def submit(self, slot: int) -> None:
        """Records the experts of a complete response, and sends it to its environment. Collective."""
        episode = self.episodes[slot]
        if episode is not None:
            self.episodes[slot] = self._with_experts(slot, episode)
        self._send(slot)

    def _with_experts(self, slot: int, episode: Episode) -> Episode:
        """Records the experts of a slot's tokens, if the sampler does. Collective."""
        if not self._sampler.records_experts:
            return episode
        # Copied while the device goes on; `Episode` waits for it when the environment has replied.
        experts = self._sampler.read_experts(self.state, slot)
        experts.copy_to_host_async()
        return replace(episode, experts=experts)

    def _send(self, slot: int) -> None:
        """Sends a complete response to its environment, if this process plays the slot."""
        episode = self.episodes[slot]
        if episode is not None and self._sessions.is_local(self._first + slot):
            text = self._chat.decode(episode.response_ids)
            self._calls[slot] = self._sessions.step(self._first + slot, text)


def _tokens(episode: Episode) -> tuple[int, ...]:
    """Ids of an observation that is to be prefilled."""
    assert episode.observation is not None
    return episode.observation.prefill_tokens


def all_gather_replies(
    processes: ProcessGroup, own: Mapping[int, EnvReply], episodes: Sequence[Episode | None]
) -> Mapping[int, EnvReply]:
    """Gathers the replies to the slots of all processes. Collective.

    Everything that a rollout decides follows from these replies and from the sampled tokens, which are the same in all
    processes; so all processes make the same calls.

    Args:
        processes: the processes of the run.
        own: slot -> reply, of this process's slots.
        episodes: episodes of all slots.

    Raises:
        RuntimeError: the processes hold different episodes, and would make different calls.
    """
    if processes.count == 1:
        return own
    replies = {slot: {**vars(reply), "ending": reply.ending and reply.ending.value} for slot, reply in own.items()}
    gathered = processes.gather_json({"episodes": _checksum(episodes), "replies": replies})
    for index, message in enumerate(gathered):
        if message["episodes"] != gathered[0]["episodes"]:
            raise RuntimeError(
                f"process {index} and process 0 no longer play the same episodes; have all the same code, packages "
                "and devices?"
            )
    return {
        int(slot): EnvReply(**{**fields, "ending": fields["ending"] and Ending(fields["ending"])})
        for message in gathered
        for slot, fields in message["replies"].items()
    }


def _checksum(episodes: Iterable[Episode | None]) -> int:
    """CRC-32 of which episode each slot holds, and of what it has sampled."""
    total = 0
    for episode in episodes:
        if episode is None:
            identity = (-1,)
        else:
            attempt = episode.attempt
            identity = (attempt.group, attempt.member, attempt.retries, len(episode.cached_ids))
        total = zlib.crc32(repr(identity).encode(), total)
        for ids, *_ in () if episode is None else episode.response:
            total = zlib.crc32(ids.tobytes(), total)
    return total
