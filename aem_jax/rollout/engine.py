"""The conversation: episodes <-> slots <-> environments. The only room that sees both text and tokens.

Slots are divided into cohorts. A cohort's turn is: hear what its environments answered, compute those ids, decode until
every response of the cohort has ended, send the responses off. While it waits for its environments, the next cohort has
the device. Who decodes with whom never depends on timing, so a run is a function of its seed; refilled slots and
retried episodes take keys of their own.

On several hosts every process holds this whole conversation, but plays only its own slots with environments. Their
answers are exchanged once a turn, before anything follows from them; so all processes make the same calls.
"""

import logging
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import numpy as np

from aem_jax.envs.protocol import EnvError, LostError
from aem_jax.hosts import ALONE, Hosts
from aem_jax.rollout.answer import Answer, exchange
from aem_jax.rollout.config import RolloutConfig
from aem_jax.rollout.episode import Chat, Episode, first_messages, windowed_ids
from aem_jax.rollout.seats import Pool, Seats
from aem_jax.sampler import Sampler, SamplerState
from aem_jax.trajectory import Ending, Task, Trajectory, Turn

log = logging.getLogger(__name__)


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
    first_slot: int
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
        pool: environment sessions, one for each slot that this process plays.
        config: settings.
        hosts: the processes that play; each has a rollout like this one, and calls it with the same arguments.

    Raises:
        ValueError: the pool has fewer sessions than there are slots.
    """

    def __init__(self, sampler: Sampler, chat: Chat, pool: Pool, config: RolloutConfig, hosts: Hosts = ALONE) -> None:
        self._seats = Seats(pool, hosts, config.num_slots, config.num_cohorts)
        self._sampler, self._chat, self._hosts, self.config = sampler, chat, hosts, config
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
                if episode is None and (episode := self._next(run, cohort.first_slot + slot)):
                    cohort.slots[slot] = episode
                    episode.future = self._seats.reset(cohort.first_slot + slot, episode.task.payload)
            if not any(cohort.slots):
                return
            yield "waiting"
            self._hear(run, cohort)
            start = time.perf_counter()
            self._begin(run, cohort)
            self._append(run, cohort)
            self._speak(run, cohort)
            run.stats.device_s += time.perf_counter() - start
            for slot, episode in enumerate(cohort.slots, start=cohort.first_slot):
                if episode is not None and self._seats.is_ours(slot):
                    text = self._chat.decode(np.concatenate(episode.said[0]).tolist())
                    episode.future = self._seats.step(slot, text)

    def _next(self, run: _Run, slot: int) -> Episode | None:
        """The first episode in the queue that may begin in a slot: on one server, one suspect at a time."""
        for place, episode in enumerate(run.queue):
            if not (episode.is_suspect and self._plays_a_suspect(self._seats.server_of(slot))):
                del run.queue[place]
                return episode
        return None

    def _plays_a_suspect(self, server: tuple[int, int]) -> bool:
        return any(
            episode is not None and episode.is_suspect and self._seats.server_of(cohort.first_slot + slot) == server
            for cohort in self._cohorts
            for slot, episode in enumerate(cohort.slots)
        )

    def _hear(self, run: _Run, cohort: _Cohort) -> None:
        """Collects the environments' answers; episodes that end leave their slots."""
        start = time.perf_counter()
        ours = self._seats.is_ours
        own = {
            slot: self._listen(episode)
            for slot, episode in enumerate(cohort.slots)
            if episode is not None and ours(cohort.first_slot + slot)
        }
        answers = exchange(self._hosts, own, cohort.slots)
        for slot, episode in enumerate(cohort.slots):
            if episode is None:
                continue
            answer = answers[slot]
            if answer.error is not None:
                cohort.slots[slot] = None
                charged = episode.is_suspect or not answer.lost
                if not charged or episode.retries < self.config.max_retries:
                    log.warning("episode %s/%d begins again: %s", episode.task.id, episode.member, answer.error)
                    run.stats.retries += 1
                    run.queue.appendleft(episode.again(charged=charged))
                else:
                    log.warning("episode %s/%d is masked: %s", episode.task.id, episode.member, answer.error)
                    run.stats.env_errors += 1
                    run.done.append(episode.trajectory(Ending.ENV_ERROR, False, self.config.context))
                continue
            self._take(episode, answer, run.stats)
            if answer.ending is not None:
                cohort.slots[slot] = None
                run.done.append(episode.trajectory(answer.ending, answer.won, self.config.context))
        run.stats.environment_s += time.perf_counter() - start

    def _listen(self, episode: Episode) -> Answer:
        """Waits for the environment's answer and says what follows from it; the episode stays as it is."""
        assert episode.future is not None
        try:
            result = episode.future.result()
        except EnvError as error:
            return Answer(str(error), isinstance(error, LostError))
        config, chat = self.config, self._chat
        heard = partial(Answer, won=bool(result.info.get("won", False)), observation=result.observation)
        if not episode.said[0]:
            ids = chat.prompt_ids(first_messages(config.instruction, result.observation))
            return heard(ids=ids, ending=Ending.TRUNCATED if len(ids) > config.prompt_tokens else None)
        said = np.concatenate(episode.said[0]).tolist()
        valid = bool(result.info.get("valid_action", True))
        heard = partial(heard, reward=float(result.reward), valid_action=valid, response=chat.decode(said))
        if result.terminated:
            return heard(ending=Ending.TERMINATED)
        if result.truncated or len(episode.turns) + 1 >= config.max_turns:
            return heard(ending=Ending.TRUNCATED)
        if config.context == "append":
            closed = said[-1] in chat.stop_ids
            keep, ids = len(episode.ids) + len(said), chat.delta_ids(result.observation, closed=closed)
        else:
            turns = [(turn.observation, turn.response) for turn in episode.turns]
            turns.append((episode.heard[1], heard.keywords["response"]))
            keep, ids = windowed_ids(
                chat,
                [*episode.ids, *said],
                turns,
                result.observation,
                config.instruction,
                config.window_turns,
                thoughts=config.thoughts == "keep",
            )
        full = keep + len(ids) >= config.context_tokens
        return heard(keep=keep, ids=ids, ending=Ending.TRUNCATED if full else None)

    def _take(self, episode: Episode, answer: Answer, stats: RolloutStats) -> None:
        """Records what the environment said."""
        if episode.said[0]:
            ids, logprobs, entropies = episode.take_response()
            heard_ids, heard_text = episode.heard
            turn = Turn(
                np.asarray(heard_ids, np.int32),
                ids,
                logprobs,
                entropies,
                answer.reward,
                answer.valid_action,
                heard_text,
                answer.response,
            )
            episode.turns.append(turn)
            episode.ids.extend(ids.tolist())
        elif answer.ending is not None:
            log.warning(
                "task %s is left out: expected a first prompt of at most rollout.prompt_tokens = %d tokens, got %d;"
                " raise rollout.prompt_tokens",
                episode.task.id,
                self.config.prompt_tokens,
                len(answer.ids),
            )
            stats.overlong_prompts += 1
        if answer.ending is None:
            ids = list(answer.ids)
            heard = ids if self.config.context == "append" else [*episode.ids[: answer.keep], *ids]
            episode.keep, episode.pending, episode.heard = answer.keep, ids, (heard, answer.observation)

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
