"""A sampler that notes what it is asked for: from that follow a rollout's FLOPs and bytes, without a profiler."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from aem_jax.bench.roofline import read
from aem_jax.plan.costs import Costs, costs
from aem_jax.sampler import Sampler


@dataclass
class _Calls:
    """Of one program: what it was called with, how often, and how many tokens each slot said every time.

    Attributes:
        arguments: as shapes; nothing is kept alive.
        static: those that the program was compiled for.
        times: calls.
        said: i32[n] of each call of a decode.
    """

    arguments: tuple[Any, ...]
    static: Mapping[str, Any]
    times: int = 0
    said: list[jax.Array] = field(default_factory=list)


class _Noted:
    """A jitted function of (params, …) and what it was called with."""

    def __init__(self, jitted: Any, said: Callable[[Any], jax.Array] | None = None) -> None:
        self._jitted, self._said = jitted, said
        self.calls: dict[Any, _Calls] = {}

    def __call__(self, params: Any, *arguments: Any, **static: Any) -> Any:
        leaves, structure = jax.tree.flatten(arguments)
        key = (structure, tuple(leaf.shape for leaf in leaves), *static.items())
        calls = self.calls.get(key)
        if calls is None:
            calls = self.calls[key] = _Calls(jax.tree.map(_shape, (params, *arguments)), static)
        out = self._jitted(params, *arguments, **static)
        calls.times += 1
        if self._said is not None:
            calls.said.append(self._said(out))
        return out

    def __getattr__(self, name: str) -> Any:  # lower, _cache_size
        return getattr(self._jitted, name)

    def costs(self) -> Costs:
        total = Costs()
        for calls in self.calls.values():
            module = read(self._jitted.lower(*calls.arguments, **calls.static).compile())
            if self._said is None:
                total.add(costs(module), calls.times)
                continue
            # What a loop costs is linear in its rounds, so one and two of them give the cost of any number.
            steps = sum(int(np.max(np.asarray(counts))) for counts in calls.said)
            total.add(costs(module, 1), 2 * calls.times - steps)
            total.add(costs(module, 2), steps - calls.times)
        return total


class CountedSampler(Sampler):
    """A sampler as any other.

    Of a decode count as many steps as its longest slot says tokens. What is not counted: forks and rewinds, which copy
    prompts and change lengths, little beside the rest.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._extend = _Noted(self._extend)
        self._decode = _Noted(self._decode, said=lambda out: out[1].counts)

    def forget(self) -> None:
        """Begins to count anew."""
        for program in (self._extend, self._decode):
            program.calls.clear()

    def costs(self) -> Costs:
        """Costs on one device of all calls that are not forgotten; compiles each program that was called once more."""
        total = Costs()
        for program in (self._extend, self._decode):
            total.add(program.costs())
        return total


def _shape(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = leaf.sharding if isinstance(leaf, jax.Array) else None  # from the host: wherever the program wants it
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
