"""A sampler that notes what it is asked for: from that follow a rollout's FLOPs and bytes, without a profiler."""

from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from aem_jax.launch.bench.roofline import read
from aem_jax.launch.plan.costs import Costs, costs
from aem_jax.models import Params
from aem_jax.sampler import Decoded, Sampler, SamplerState
from aem_jax.sampler.sampler import HostArray


@dataclass
class _Calls:
    """Of one program: what it was lowered from, how often it ran, and how many tokens each slot said every time."""

    kind: str
    state: SamplerState
    tokens: int
    window: int | None
    times: int = 0
    said: list[jax.Array] = field(default_factory=list)


class CountedSampler(Sampler):
    """A sampler as any other.

    What is not counted: forks and rewinds, which copy prompts and change lengths, little beside the rest.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._asked: dict[tuple[Any, ...], _Calls] = {}

    def extend(
        self, params: Params, state: SamplerState, tokens: HostArray, counts: HostArray, *, window: int | None = None
    ) -> SamplerState:
        """As the sampler's; counts one call."""
        self._note("extend", state, tokens.shape[1], window)
        return super().extend(params, state, tokens, counts, window=window)

    def decode(
        self, params: Params, state: SamplerState, budgets: HostArray, num_tokens: int, *, window: int | None = None
    ) -> tuple[SamplerState, Decoded]:
        """As the sampler's; counts one call, and its steps: as many as its longest slot says tokens."""
        calls = self._note("decode", state, num_tokens, window)
        state, out = super().decode(params, state, budgets, num_tokens, window=window)
        calls.said.append(out.counts)
        return state, out

    def forget(self) -> None:
        """Begins to count anew."""
        self._asked.clear()

    def costs(self, params: Params) -> Costs:
        """Costs on one device of all calls that are not forgotten; compiles each program that was called once more."""
        total = Costs()
        for calls in self._asked.values():
            lower = self.lower_extend if calls.kind == "extend" else self.lower_decode
            module = read(lower(params, calls.state, calls.tokens, window=calls.window).compile())
            once, twice = costs(module, 1), costs(module, 2)
            # What a loop costs is linear in its rounds, so these two give the cost of any number of them.
            steps = sum(int(np.max(np.asarray(counts))) for counts in calls.said)
            total.add(once, 2 * calls.times - steps)
            total.add(twice, steps - calls.times)
        return total

    def _note(self, kind: str, state: SamplerState, tokens: int, window: int | None) -> _Calls:
        shapes = tuple(leaf.shape for leaf in jax.tree.leaves(state))
        calls = self._asked.get((kind, shapes, tokens, window))
        if calls is None:
            place = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)  # noqa: E731
            calls = _Calls(kind, jax.tree.map(place, state), tokens, window)
            self._asked[kind, shapes, tokens, window] = calls
        calls.times += 1
        return calls
