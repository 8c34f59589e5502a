"""A cache of first prompts: prefilled once per group, in a small sampler state, and forked to slots."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from aem_jax.rollout.batching import prefill
from aem_jax.rollout.config import RolloutConfig
from aem_jax.rollout.stats import RolloutStats
from aem_jax.sampler import Sampler, SamplerState

Prompt = tuple[int, ...]


def prompt_rows(num_slots: int, config: RolloutConfig, shards: int) -> int:
    """Number of rows for first prompts: one for each group of the slots, rounded up to a multiple of `shards`."""
    rows = -(-num_slots // config.group_size)
    return rows + -rows % shards


class PromptCache:
    """Prefilled prompts by their ids. An entry is valid for the parameters that it was prefilled with.

    Args:
        sampler: the jitted sampler.
        config: settings.
        num_slots: slots whose episodes may start at once; each group of them has a row.
    """

    def __init__(self, sampler: Sampler, config: RolloutConfig, num_slots: int) -> None:
        self._sampler, self._config = sampler, config
        self.num_rows = prompt_rows(num_slots, config, sampler.slot_shards)
        self._state = sampler.init(self.num_rows, config.prompt_tokens)
        self._rows: dict[Prompt, int] = {}  # least recently used first
        # In continuous mode few episodes start at once: a prompt is prefilled in one row of each device, not in all.
        few = config.mode == "continuous" and self.num_rows > sampler.slot_shards
        self._sizes = (sampler.slot_shards,) if few else ()

    def clear(self) -> None:
        """Drops all entries; to be called when the parameters change."""
        self._rows = {}

    def warm_up(self, params: Any, state: SamplerState) -> SamplerState:
        """Compiles all programs that the cache calls; `state` holds the slots that prompts are forked to."""
        zeros, config = np.zeros(self.num_rows, np.int32), self._config
        for size in (*self._sizes, self.num_rows):
            rows = None if size == self.num_rows else self._sampler.pad_slots([], self.num_rows, [size])
            for bucket in config.extend_buckets:
                tokens = np.zeros((size, bucket), np.int32)
                self._state = self._sampler.extend(
                    params, self._state, tokens, zeros[:size], rows, window=config.prompt_tokens
                )
        self._state = self._sampler.rewind(self._state, zeros)
        num_slots = state.lengths.shape[0]
        none, prng = np.full(num_slots, -1, np.int32), np.zeros((num_slots, 2), np.uint32)
        return self._sampler.fork(state, self._state, none, prng, window=config.prompt_tokens)

    def fork(
        self,
        params: Any,
        state: SamplerState,
        starts: Sequence[tuple[int, Prompt, np.ndarray]],
        stats: RolloutStats,
    ) -> SamplerState:
        """Starts episodes: forks their prompts to their slots, and prefills the prompts that are missing.

        Args:
            params: decode-layout parameters.
            state: the slots; donated.
            starts: slot, prompt and key data of each episode.
            stats: counts the prefilled tokens.
        """
        while starts:
            batch, prompts = [], dict[Prompt, None]()
            for start in starts:
                prompt = start[1]
                if prompt in prompts or len(prompts) < self.num_rows:
                    prompts[prompt] = None
                    batch.append(start)
            self._ensure(params, list(prompts), stats)
            num_slots = state.lengths.shape[0]
            source, prng = np.full(num_slots, -1, np.int32), np.zeros((num_slots, 2), np.uint32)
            for slot, prompt, key in batch:
                source[slot], prng[slot] = self._rows[prompt], key
            state = self._sampler.fork(state, self._state, source, prng, window=self._config.prompt_tokens)
            started = {slot for slot, *_ in batch}
            starts = [start for start in starts if start[0] not in started]
        return state

    def _ensure(self, params: Any, prompts: Sequence[Prompt], stats: RolloutStats) -> None:
        """Prefills the missing prompts, in empty rows first, then in the least recently used."""
        for prompt in prompts:
            if prompt in self._rows:
                self._rows[prompt] = self._rows.pop(prompt)
        used = set(self._rows.values())
        evictable = [row for prompt, row in self._rows.items() if prompt not in prompts]
        free = iter([*(row for row in range(self.num_rows) if row not in used), *evictable])
        missing = {prompt: next(free) for prompt in prompts if prompt not in self._rows}
        if not missing:
            return
        config = self._config
        keep = np.full(self.num_rows, config.prompt_tokens, np.int32)
        keep[list(missing.values())] = 0
        self._state = self._sampler.rewind(self._state, keep)
        self._state = prefill(
            self._sampler,
            params,
            self._state,
            {row: list(prompt) for prompt, row in missing.items()},
            config.extend_buckets,
            window=config.prompt_tokens,
            sizes=self._sizes,
            stats=stats,
        )
        taken = set(missing.values())
        self._rows = {prompt: row for prompt, row in self._rows.items() if row not in taken} | missing
