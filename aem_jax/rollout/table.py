"""Episodes in the slots of one sampler state: seated, heard, begun, continued. When is another room's to say."""

import logging
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from aem_jax.distributed import Hosts
from aem_jax.rollout.answer import Answer, exchange
from aem_jax.rollout.calls import Call, Cost, extending_cost, plan_calls
from aem_jax.rollout.compute import compute
from aem_jax.rollout.config import RolloutConfig
from aem_jax.rollout.episode import Chat, Episode
from aem_jax.rollout.hearing import listen, record
from aem_jax.rollout.prompts import Prompts
from aem_jax.rollout.seats import Seats
from aem_jax.rollout.stats import DeviceClock, RolloutStats
from aem_jax.sampler import Decoded, Sampler
from aem_jax.trajectory import Ending, Trajectory

log = logging.getLogger(__name__)

_POLL_S = 0.02
"""How long a process waits for its own environments before it hears of the other processes'."""


@dataclass
class Run:
    """What one call of the rollout shares between its tables; `left_out` are tasks that nobody can act in."""

    params: Any
    queue: deque[Episode]
    done: list[Trajectory] = field(default_factory=list)
    stats: RolloutStats = field(default_factory=RolloutStats)
    clock: DeviceClock = field(default_factory=DeviceClock)
    left_out: set[str] = field(default_factory=set)


class Table:
    """Some slots, their episodes and their caches.

    Args:
        sampler: the jitted sampler.
        chat: the tokenizer.
        seats: which process plays which slot.
        hosts: the processes.
        config: settings.
        prompts: computes first prompts; shared between tables.
        first_slot: number of the first slot, over all tables.
        num_slots: how many.
        sizes: numbers of slots that a call may be made on, besides all of them.
    """

    def __init__(
        self,
        sampler: Sampler,
        chat: Chat,
        seats: Seats,
        hosts: Hosts,
        config: RolloutConfig,
        prompts: Prompts,
        first_slot: int,
        num_slots: int,
        sizes: Sequence[int] = (),
    ) -> None:
        self._sampler, self._chat, self._seats, self._hosts = sampler, chat, seats, hosts
        self._config, self._prompts, self._first, self.sizes = config, prompts, first_slot, sizes
        self.state = sampler.init(num_slots)
        self.episodes: list[Episode | None] = [None] * num_slots

    def clear(self) -> None:
        """Everybody gets up. Answers that are still out, of a rollout that was broken off, are waited for."""
        wait([episode.future for _, episode in self.seated() if episode.future])
        self.episodes = [None] * len(self.episodes)

    def seated(self) -> Iterable[tuple[int, Episode]]:
        """Slots that are taken, and who sits there."""
        return ((slot, episode) for slot, episode in enumerate(self.episodes) if episode is not None)

    def seat(self, run: Run, tables: Sequence["Table"]) -> None:
        """Gives free slots to episodes from the queue, whose environments are reset."""
        for slot, episode in enumerate(self.episodes):
            if episode is None and (episode := self._next(run, self._first + slot, tables)):
                self.episodes[slot] = episode
                episode.future = self._seats.reset(self._first + slot, episode.task.payload)

    def _next(self, run: Run, slot: int, tables: Sequence["Table"]) -> Episode | None:
        """The first episode in the queue that may begin in a slot: on one server, one suspect at a time."""
        server = self._seats.server_of(slot)
        for place, episode in enumerate(run.queue):
            if not (episode.is_suspect and any(table._plays_a_suspect(server) for table in tables)):
                del run.queue[place]
                return episode
        return None

    def _plays_a_suspect(self, server: tuple[int, int]) -> bool:
        return any(
            episode.is_suspect and self._seats.server_of(self._first + slot) == server
            for slot, episode in self.seated()
        )

    def hear(self, run: Run, *, everybody: bool, patient: bool = True) -> None:
        """Collects environments' answers; episodes that end leave their slots.

        Args:
            run: the run.
            everybody: wait for all answers that are out; else take those that are here.
            patient: if none is here, wait for the first (where there are several processes: for a moment).
        """
        start = time.perf_counter()
        out = {slot: e for slot, e in self.seated() if e.future is not None and self._seats.is_ours(self._first + slot)}
        if not everybody:
            if patient and out:
                futures = [episode.future for episode in out.values() if episode.future]
                wait(futures, timeout=None if self._hosts.count == 1 else _POLL_S, return_when=FIRST_COMPLETED)
            out = {slot: episode for slot, episode in out.items() if episode.future and episode.future.done()}
        own = {slot: listen(episode, self._config, self._chat) for slot, episode in out.items()}
        for slot, answer in sorted(exchange(self._hosts, own, self.episodes).items()):
            self._take(run, slot, answer)
        if everybody or patient:
            run.stats.environment_s += time.perf_counter() - start

    def _take(self, run: Run, slot: int, answer: Answer) -> None:
        episode, config, stats = self.episodes[slot], self._config, run.stats
        assert episode is not None
        episode.future = None
        if answer.error is not None:
            self.episodes[slot] = None
            task, error = episode.task.id, " ".join(answer.error.split())
            stats.first_error = stats.first_error or f"task {task}: {error}"
            charged = episode.is_suspect or not answer.lost
            if answer.retry and (not charged or episode.retries < config.max_retries):
                log.warning("episode %s/%d begins again: %s", task, episode.member, error)
                stats.retries += 1
                run.queue.appendleft(episode.again(charged=charged))
            else:
                if answer.retry:
                    log.warning("episode %s/%d is masked: %s", task, episode.member, error)
                elif task not in run.left_out:
                    log.warning("task %s is left out: %s", task, error)
                    run.left_out.add(task)
                stats.env_errors += 1
                run.done.append(episode.trajectory(Ending.ENV_ERROR, config.context))
            return
        record(episode, answer, config, stats)
        if answer.ending is not None:
            self.episodes[slot] = None
            run.done.append(episode.trajectory(answer.ending, config.context, answer.won, answer.score))

    def compute(self, run: Run) -> None:
        """Computes what was heard; those whose ids all lie in their slots may then speak."""
        pending = [(slot, episode) for slot, episode in self.seated() if episode.pending]
        if not pending:
            return
        run.clock.called()
        begun = [(slot, tuple(episode.pending), episode.prng) for slot, episode in pending if not episode.ids]
        self.state = self._prompts.fork(run.params, self.state, begun, run.stats)
        self._append(run, [(slot, episode) for slot, episode in pending if episode.ids])
        for _, episode in pending:
            episode.ids.extend(episode.pending)
            episode.pending = []
            episode.unread = 0
            episode.budget = min(self._config.response_tokens, self._config.context_tokens - len(episode.ids))

    def _append(self, run: Run, pending: Sequence[tuple[int, Episode]]) -> None:
        """Computes what the episodes under way have heard."""
        if not pending:
            return
        keep = np.full(len(self.episodes), self._sampler.capacity, np.int32)
        for slot, episode in pending:
            if episode.keep < len(episode.ids):
                keep[slot] = episode.keep
                del episode.ids[episode.keep :]
        if (keep < self._sampler.capacity).any():
            self.state = self._sampler.rewind(self.state, keep)
        ids = {slot: episode.pending for slot, episode in pending}
        contexts = {slot: len(episode.ids) + len(episode.pending) for slot, episode in pending}
        for call in self.plan(contexts, extending_cost):
            self.state = compute(
                self._sampler,
                run.params,
                self.state,
                {slot: ids[slot] for slot in call.meant},
                self._config.extend_buckets,
                window=call.window,
                sizes=self.sizes,
            )
        run.stats.heard_tokens += sum(map(len, ids.values()))

    def plan(self, contexts: Mapping[int, int], cost: Cost) -> list[Call]:
        """Which slots share a call; in lock-step all do."""
        num_slots, sampler = len(self.episodes), self._sampler
        place = partial(sampler.pad_slots, num_slots=num_slots, sizes=self.sizes)
        return plan_calls(contexts, num_slots, sampler.slot_shards, sampler.window_for, place, cost)

    def said(self, run: Run, slot: int, row: int, out: Decoded) -> None:
        """Notes what a slot said in row `row` of a chunk; its budget is 0 when that ends its response."""
        episode, count = self.episodes[slot], int(out.counts[row])
        assert episode is not None
        for parts, values in zip(episode.said, (out.tokens, out.logprobs, out.entropies), strict=True):
            parts.append(np.asarray(values[row, :count]))
        episode.budget = 0 if out.finished[row] else episode.budget - count
        run.stats.sampled_tokens += count

    def send(self, slot: int) -> None:
        """Sends a response that has ended to its environment."""
        episode = self.episodes[slot]
        if episode is not None and self._seats.is_ours(self._first + slot):
            text = self._chat.decode(np.concatenate(episode.said[0]).tolist())
            episode.future = self._seats.step(self._first + slot, text)
