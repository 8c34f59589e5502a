"""First prompts, computed once for each group: rows of a small state of their own, forked to the slots that begin."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from aem_jax.rollout.compute import compute
from aem_jax.rollout.config import RolloutConfig
from aem_jax.rollout.stats import RolloutStats
from aem_jax.sampler import Sampler, SamplerState

Prompt = tuple[int, ...]


def prompt_rows(num_slots: int, config: RolloutConfig, shards: int) -> int:
    """Rows for first prompts: one for each group of the slots, and as many on each device."""
    rows = -(-num_slots // config.group_size)
    return rows + -rows % shards


class Prompts:
    """Computed prompts by their ids. Valid for the parameters that they were computed with.

    Args:
        sampler: the jitted sampler.
        config: settings.
        num_slots: slots that may begin at once; a row for each group of them.
    """

    def __init__(self, sampler: Sampler, config: RolloutConfig, num_slots: int) -> None:
        self._sampler, self._config = sampler, config
        self.num_rows = prompt_rows(num_slots, config, sampler.slot_shards)
        self._state = sampler.init(self.num_rows, config.prompt_tokens)
        self._rows: dict[Prompt, int] = {}  # the least recently used first
        # Where episodes begin a few at a time, a prompt is computed in one row of a device, not in all.
        few = config.mode == "continuous" and self.num_rows > sampler.slot_shards
        self._sizes = (sampler.slot_shards,) if few else ()

    def forget(self) -> None:
        """The parameters have changed."""
        self._rows = {}

    def warm_up(self, params: Any, state: SamplerState) -> SamplerState:
        """Compiles all that is called here; `state` are the slots that prompts are forked to."""
        zeros, c = np.zeros(self.num_rows, np.int32), self._config
        for size in (*self._sizes, self.num_rows):
            rows = None if size == self.num_rows else self._sampler.pad_slots([], self.num_rows, [size])
            for bucket in c.extend_buckets:
                tokens = np.zeros((size, bucket), np.int32)
                self._state = self._sampler.extend(
                    params, self._state, tokens, zeros[:size], rows, window=c.prompt_tokens
                )
        self._state = self._sampler.rewind(self._state, zeros)
        slots = state.lengths.shape[0]
        nobody, prng = np.full(slots, -1, np.int32), np.zeros((slots, 2), np.uint32)
        return self._sampler.fork(state, self._state, nobody, prng, window=c.prompt_tokens)

    def fork(
        self,
        params: Any,
        state: SamplerState,
        begun: Sequence[tuple[int, Prompt, np.ndarray]],
        stats: RolloutStats,
    ) -> SamplerState:
        """Begins episodes: (slot, prompt, key data) each. Prompts that are not yet computed are."""
        while begun:
            batch, wanted = [], dict[Prompt, int]()
            for each in begun:
                if each[1] in wanted or len(wanted) < self.num_rows:
                    wanted[each[1]] = 0
                    batch.append(each)
            self._have(params, list(wanted), stats)
            slots = state.lengths.shape[0]
            source, prng = np.full(slots, -1, np.int32), np.zeros((slots, 2), np.uint32)
            for slot, prompt, key in batch:
                source[slot], prng[slot] = self._rows[prompt], key
            state = self._sampler.fork(state, self._state, source, prng, window=self._config.prompt_tokens)
            started = {slot for slot, *_ in batch}
            begun = [each for each in begun if each[0] not in started]
        return state

    def _have(self, params: Any, wanted: Sequence[Prompt], stats: RolloutStats) -> None:
        """Computes those that are missing, in empty rows, then in rows of those that were not wanted for longest."""
        for prompt in wanted:
            if prompt in self._rows:
                self._rows[prompt] = self._rows.pop(prompt)
        used = set(self._rows.values())
        idle = [row for prompt, row in self._rows.items() if prompt not in wanted]
        free = iter([*(row for row in range(self.num_rows) if row not in used), *idle])
        fresh = {prompt: next(free) for prompt in wanted if prompt not in self._rows}
        if not fresh:
            return
        config = self._config
        keep = np.full(self.num_rows, config.prompt_tokens, np.int32)
        keep[list(fresh.values())] = 0
        self._state = self._sampler.rewind(self._state, keep)
        ids = {row: list(prompt) for prompt, row in fresh.items()}
        self._state = compute(
            self._sampler,
            params,
            self._state,
            ids,
            config.extend_buckets,
            window=config.prompt_tokens,
            sizes=self._sizes,
        )
        stats.heard_tokens += sum(map(len, fresh))
        taken = set(fresh.values())
        self._rows = {prompt: row for prompt, row in self._rows.items() if row not in taken} | fresh
