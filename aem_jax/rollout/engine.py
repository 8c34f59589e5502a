"""The conversation: episodes <-> slots <-> environments. The only room that sees both text and tokens.

Slots are divided into cohorts. A cohort's turn is: hear what its environments answered, compute those ids, decode until
every response of the cohort has ended, send the responses off. While it waits for its environments, the next cohort has
the device. Who decodes with whom never depends on timing, so a run is a function of its seed; refilled slots and
retried episodes take keys of their own.
"""

import logging
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol

import jax
import numpy as np

from aem_jax.envs.protocol import EnvError, LostError, StepResult
from aem_jax.rollout.config import RolloutConfig
from aem_jax.rollout.episode import Chat, Episode, appended_ids, first_messages, windowed_ids
from aem_jax.sampler import Sampler, SamplerState
from aem_jax.trajectory import Ending, Task, Trajectory, Turn

log = logging.getLogger(__name__)


class Pool(Protocol):
    """Environment sessions; a failed call raises `EnvError` in its future."""

    @property
    def capacity(self) -> int:
        """Number of sessions."""
        ...

    def server_of(self, session: int) -> int:
        """Which server a session lives on: sessions of one server are lost together."""
        ...

    def reset(self, session: int, payload: Mapping[str, Any]) -> Future[StepResult]:
        """Begins an episode in a session."""
        ...

    def step(self, session: int, text: str) -> Future[StepResult]:
        """Sends a response."""
        ...


@dataclass
class RolloutStats:
    """Counts and seconds of one rollout."""

    episodes: int = 0
    sampled_tokens: int = 0
    heard_tokens: int = 0
    retries: int = 0
    env_errors: int = 0
    overlong_prompts: int = 0
    device_s: float = 0.0
    environment_s: float = 0.0
    total_s: float = 0.0


@dataclass(eq=False)
class _Cohort:
    state: SamplerState
    first_session: int
    slots: list[Episode | None]


@dataclass
class _Run:
    """What one call of the rollout shares between its cohorts."""

    params: Any
    queue: deque[Episode]
    done: list[Trajectory] = field(default_factory=list)
    rows: dict[tuple[int, ...], int] = field(default_factory=dict)
    stats: RolloutStats = field(default_factory=RolloutStats)


class Rollout:
    """Plays groups of episodes. Its KV caches are allocated once and live across steps.

    Args:
        sampler: the jitted sampler.
        chat: the tokenizer.
        pool: environment sessions, at least `config.num_slots`.
        config: settings.

    Raises:
        ValueError: the pool has fewer sessions than there are slots.
    """

    def __init__(self, sampler: Sampler, chat: Chat, pool: Pool, config: RolloutConfig) -> None:
        if pool.capacity < config.num_slots:
            raise ValueError(
                f"expected an environment session for each of {config.num_slots} slots, got {pool.capacity};"
                " raise the pool's sessions or lower rollout.num_slots"
            )
        self._sampler, self._chat, self._pool, self.config = sampler, chat, pool, config
        size = config.num_slots // config.num_cohorts
        self._cohorts = [
            _Cohort(sampler.init(size), cohort * size, [None] * size) for cohort in range(config.num_cohorts)
        ]
        rows = -(-size // config.group_size)
        rows += -rows % sampler.slot_shards
        self._prompts = sampler.init(rows, config.prompt_tokens)

    def warm_up(self, params: Any) -> None:
        """Compiles every program that a rollout can call; afterwards nothing compiles."""
        c, sampler = self.config, self._sampler
        rows = self._prompts.lengths.shape[0]
        zeros = lambda n: np.zeros(n, np.int32)  # noqa: E731
        for bucket in c.extend_buckets:
            self._prompts = sampler.extend(
                params, self._prompts, np.zeros((rows, bucket), np.int32), zeros(rows), window=c.prompt_tokens
            )
        self._prompts = sampler.rewind(self._prompts, zeros(rows))
        for cohort in self._cohorts[:1]:
            n = len(cohort.slots)
            source, prng = np.full(n, -1, np.int32), np.zeros((n, 2), np.uint32)
            cohort.state = sampler.fork(cohort.state, self._prompts, source, prng, window=c.prompt_tokens)
            for window in sampler.windows:
                for bucket in c.extend_buckets:
                    cohort.state = sampler.extend(
                        params, cohort.state, np.zeros((n, bucket), np.int32), zeros(n), window=window
                    )
                cohort.state, _ = sampler.decode(params, cohort.state, zeros(n), c.decode_chunk, window=window)
            cohort.state = sampler.rewind(cohort.state, zeros(n))

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
        run = _Run(params, deque(episodes))
        talks = [self._converse(run, cohort) for cohort in self._cohorts]
        while talks:
            talks = [talk for talk in talks if next(talk, "over") != "over"]
        run.stats.total_s = time.perf_counter() - start
        run.stats.episodes = len(run.done)
        return sorted(run.done, key=lambda t: (t.group, t.member)), run.stats

    def _converse(self, run: _Run, cohort: _Cohort) -> Iterator[str]:
        """One cohort's conversation; yields whenever it waits for its environments."""
        cohort.slots = [None] * len(cohort.slots)
        while True:
            for slot, episode in enumerate(cohort.slots):
                if episode is None and (episode := self._next(run, cohort.first_session + slot)):
                    cohort.slots[slot] = episode
                    episode.future = self._pool.reset(cohort.first_session + slot, episode.task.payload)
            if not any(cohort.slots):
                return
            yield "waiting"
            self._hear(run, cohort)
            start = time.perf_counter()
            self._begin(run, cohort)
            self._append(run, cohort)
            self._speak(run, cohort)
            run.stats.device_s += time.perf_counter() - start
            for slot, episode in enumerate(cohort.slots):
                if episode is not None:
                    episode.future = self._answer(episode, cohort.first_session + slot)

    def _next(self, run: _Run, session: int) -> Episode | None:
        """The first episode in the queue that may begin in a session: on one server, one suspect at a time."""
        for place, episode in enumerate(run.queue):
            if not (episode.is_suspect and self._plays_a_suspect(self._pool.server_of(session))):
                del run.queue[place]
                return episode
        return None

    def _plays_a_suspect(self, server: int) -> bool:
        return any(
            episode is not None and episode.is_suspect and self._pool.server_of(cohort.first_session + slot) == server
            for cohort in self._cohorts
            for slot, episode in enumerate(cohort.slots)
        )

    def _hear(self, run: _Run, cohort: _Cohort) -> None:
        """Collects the environments' answers; episodes that end leave their slots."""
        start = time.perf_counter()
        for slot, episode in enumerate(cohort.slots):
            if episode is None:
                continue
            assert episode.future is not None
            try:
                result = episode.future.result()
            except EnvError as error:
                cohort.slots[slot] = None
                charged = episode.is_suspect or not isinstance(error, LostError)
                if not charged or episode.retries < self.config.max_retries:
                    log.warning("episode %s/%d begins again: %s", episode.task.id, episode.member, error)
                    run.stats.retries += 1
                    run.queue.appendleft(episode.again(charged=charged))
                else:
                    log.warning("episode %s/%d is masked: %s", episode.task.id, episode.member, error)
                    run.stats.env_errors += 1
                    run.done.append(episode.trajectory(Ending.ENV_ERROR, False, self.config.context))
                continue
            ending = self._take_answer(episode, result, run.stats)
            if ending is not None:
                cohort.slots[slot] = None
                run.done.append(episode.trajectory(ending, bool(result.info.get("won", False)), self.config.context))
        run.stats.environment_s += time.perf_counter() - start

    def _take_answer(self, episode: Episode, result: StepResult, stats: RolloutStats) -> Ending | None:
        """Records what the environment said; returns how the episode ended, or None while it goes on."""
        config = self.config
        if episode.said[0]:
            ids, logprobs, entropies = episode.take_response()
            closed = int(ids[-1]) in self._chat.stop_ids
            valid = bool(result.info.get("valid_action", True))
            heard_ids, heard_text = episode.heard
            text = self._chat.decode(ids.tolist())
            episode.turns.append(
                Turn(
                    np.asarray(heard_ids, np.int32),
                    ids,
                    logprobs,
                    entropies,
                    float(result.reward),
                    valid,
                    heard_text,
                    text,
                )
            )
            episode.ids.extend(ids.tolist())
            if result.terminated:
                return Ending.TERMINATED
            if result.truncated or len(episode.turns) >= config.max_turns:
                return Ending.TRUNCATED
            if config.context == "append":
                keep, new = appended_ids(self._chat, episode, result.observation, closed)
            else:
                keep, new = windowed_ids(
                    self._chat,
                    episode,
                    result.observation,
                    config.instruction,
                    config.window_turns,
                    thoughts=config.thoughts == "keep",
                )
            if keep + len(new) >= config.context_tokens:
                return Ending.TRUNCATED
        else:
            keep, new = 0, self._chat.prompt_ids(first_messages(config.instruction, result.observation))
            if len(new) > config.prompt_tokens:
                log.warning(
                    "task %s is left out: expected a first prompt of at most rollout.prompt_tokens = %d tokens, got %d;"
                    " raise rollout.prompt_tokens",
                    episode.task.id,
                    config.prompt_tokens,
                    len(new),
                )
                stats.overlong_prompts += 1
                return Ending.TRUNCATED
        heard = new if config.context == "append" else [*episode.ids[:keep], *new]
        episode.keep, episode.pending, episode.heard = keep, new, (heard, result.observation)
        return None

    def _begin(self, run: _Run, cohort: _Cohort) -> None:
        """Computes the prompts of episodes that begin, each distinct one once, and forks them to their slots."""
        new = [(slot, e) for slot, e in enumerate(cohort.slots) if e is not None and not e.ids]
        rows = self._prompts.lengths.shape[0]
        while new:
            batch: list[tuple[int, Episode]] = []
            wanted: dict[tuple[int, ...], int] = {}
            for slot, episode in new:
                prompt = tuple(episode.pending)
                if prompt in wanted or len(wanted) < rows:
                    wanted[prompt] = 0
                    batch.append((slot, episode))
            kept = {prompt: row for prompt, row in run.rows.items() if prompt in wanted}
            free = iter([row for row in range(rows) if row not in kept.values()])
            fresh = {prompt: next(free) for prompt in wanted if prompt not in kept}
            if fresh:
                keep = np.full(rows, self.config.prompt_tokens, np.int32)
                keep[list(fresh.values())] = 0
                self._prompts = self._sampler.rewind(self._prompts, keep)
                ids = {row: list(prompt) for prompt, row in fresh.items()}
                self._prompts = self._compute(run, self._prompts, ids, self.config.prompt_tokens)
                taken = set(fresh.values())
                run.rows = {p: row for p, row in run.rows.items() if row not in taken} | fresh
            source = np.full(len(cohort.slots), -1, np.int32)
            prng = np.zeros((len(cohort.slots), 2), np.uint32)
            for slot, episode in batch:
                source[slot], prng[slot] = run.rows[tuple(episode.pending)], episode.prng
                episode.ids, episode.pending = episode.pending, []
            cohort.state = self._sampler.fork(
                cohort.state, self._prompts, source, prng, window=self.config.prompt_tokens
            )
            begun = {slot for slot, _ in batch}
            new = [(slot, e) for slot, e in new if slot not in begun]

    def _append(self, run: _Run, cohort: _Cohort) -> None:
        """Computes what the episodes under way have heard."""
        ids: dict[int, list[int]] = {}
        keep = np.full(len(cohort.slots), self._sampler.capacity, np.int32)
        rewound = False
        for slot, episode in enumerate(cohort.slots):
            if episode is None or not episode.pending:
                continue
            if episode.keep < len(episode.ids):
                keep[slot], rewound = episode.keep, True
                del episode.ids[episode.keep :]
            ids[slot] = episode.pending
        if rewound:
            cohort.state = self._sampler.rewind(cohort.state, keep)
        if not ids:
            return
        longest = max(episode.keep + len(episode.pending) for episode in cohort.slots if episode is not None)
        cohort.state = self._compute(run, cohort.state, ids, self._sampler.cover(longest))
        for slot in ids:
            episode = cohort.slots[slot]
            assert episode is not None
            episode.ids.extend(episode.pending)
            episode.pending = []

    def _compute(self, run: _Run, state: SamplerState, ids: Mapping[int, list[int]], window: int) -> SamplerState:
        """Extends rows by their ids, in as few bucketed calls as they need."""
        buckets = sorted(self.config.extend_buckets)
        rows, done, longest = state.lengths.shape[0], 0, max(map(len, ids.values()))
        run.stats.heard_tokens += sum(map(len, ids.values()))
        while done < longest:
            bucket = next((b for b in buckets if b >= longest - done), buckets[-1])
            tokens, counts = np.zeros((rows, bucket), np.int32), np.zeros(rows, np.int32)
            for row, row_ids in ids.items():
                part = row_ids[done : done + bucket]
                tokens[row, : len(part)], counts[row] = part, len(part)
            state = self._sampler.extend(run.params, state, tokens, counts, window=window)
            done += bucket
        return state

    def _speak(self, run: _Run, cohort: _Cohort) -> None:
        """Decodes until every response of the cohort has ended by a stop id or its budget."""
        config, chunk = self.config, self.config.decode_chunk
        budgets = np.zeros(len(cohort.slots), np.int32)
        for slot, episode in enumerate(cohort.slots):
            if episode is not None:
                budgets[slot] = min(config.response_tokens, config.context_tokens - len(episode.ids))
        while budgets.any():
            longest = max(len(e.ids) + e.said_count for s, e in enumerate(cohort.slots) if e is not None and budgets[s])
            cohort.state, decoded = self._sampler.decode(
                run.params, cohort.state, budgets, chunk, window=self._sampler.cover(longest)
            )
            out = jax.device_get(decoded)
            run.stats.sampled_tokens += int(out.counts.sum())
            for slot, episode in enumerate(cohort.slots):
                if episode is None or not budgets[slot]:
                    continue
                count = int(out.counts[slot])
                for parts, values in zip(episode.said, (out.tokens, out.logprobs, out.entropies), strict=True):
                    parts.append(values[slot, :count])
                budgets[slot] = 0 if out.finished[slot] else budgets[slot] - count

    def _answer(self, episode: Episode, session: int) -> Future[StepResult]:
        """Sends the response's text to the environment."""
        return self._pool.step(session, self._chat.decode(np.concatenate(episode.said[0]).tolist()))
