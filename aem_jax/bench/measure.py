"""Timing of a call, and the roofline of its program: the highest rate that the device allows.

    seconds >= max(FLOPs / peak, bytes / bandwidth)        share of the roofline = this bound / measured seconds

FLOPs and bytes are counted in the compiled program (`plan.costs`). The device's peak and bandwidth are measured in the
same process, by a matrix product and by a copy. Their fastest run counts, because a ceiling is an upper bound. The copy
is far larger than any cache, so a program whose data stay in a CPU's cache can exceed this bandwidth of main memory.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from aem_jax.models.config import dtype_name
from aem_jax.plan.costs import Costs

RUNS = 7


@dataclass(frozen=True)
class Ceilings:
    """Measured limits of one device.

    Attributes:
        bandwidth: bytes/s, read and written, of a copy.
        peak: FLOP/s of a matrix product in `dtype`.
        dtype: of the product's factors.
    """

    bandwidth: float
    peak: float
    dtype: str


@dataclass(frozen=True)
class Roofline:
    """The roofline of one call of a measured program.

    Attributes:
        flops: of its matrix products.
        bytes: read from and written to memory.
        rate: the highest possible rate, in units/s.
        bound: "compute" or "memory": which of the two takes longer.
        share: measured (median) rate over the highest possible rate.
        mfu: useful FLOP/s over the peak, without recomputation; None where it is not measured.
        ceilings: of the device, in the same process.
    """

    flops: float
    bytes: float
    rate: float
    bound: str
    share: float
    mfu: float | None
    ceilings: Ceilings


@dataclass(frozen=True)
class Measurement:
    """One rate, over several repetitions.

    Attributes:
        name: the benchmark.
        what: the measured operation; with the name it identifies the same number in two runs.
        shape: its sizes.
        unit: of the rates, e.g. tokens/s.
        median: of the repetitions.
        best: the highest rate.
        worst: the lowest rate.
        quartiles: the rates that three quarters and one quarter of the repetitions reach.
        repeats: number of repetitions.
        roofline: the device's limit; None where no device computes.
        facts: other results, by names with units.
    """

    name: str
    what: str
    shape: str
    unit: str
    median: float
    best: float
    worst: float
    quartiles: tuple[float, float]
    repeats: int
    roofline: Roofline | None = None
    facts: Mapping[str, float] = field(default_factory=dict)


def timed(call: Callable[[], Any], *, repeats: int) -> list[float]:
    """Seconds of each of `repeats` calls after one to warm up; `call` returns only when its work is done."""
    call()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return seconds


def summarise(
    name: str,
    what: str,
    shape: str,
    unit: str,
    work: float,
    seconds: Sequence[float],
    *,
    cost: Costs | None = None,
    dtype: DTypeLike = "float32",
    useful: float | None = None,
    facts: Mapping[str, float] | None = None,
) -> Measurement:
    """The rates of calls that each did `work` units.

    Args:
        name: the benchmark.
        what: the measured operation.
        shape: its sizes.
        unit: a unit of work, per second.
        work: units that one call did.
        seconds: time of each call.
        cost: of one call on one device; None for no roofline.
        dtype: in which the program computes its matrix products.
        useful: FLOPs that one call needs on one device, for its MFU.
        facts: other results.
    """
    ends = seconds if len(seconds) > 1 else [*seconds, *seconds]
    shortest, middle, longest = statistics.quantiles(ends, n=4, method="inclusive")
    return Measurement(
        name,
        what,
        shape,
        unit,
        median=work / middle,
        best=work / min(seconds),
        worst=work / max(seconds),
        quartiles=(work / longest, work / shortest),
        repeats=len(seconds),
        roofline=None if cost is None else roofline(cost, ceilings(dtype), work, middle, useful),
        facts=facts or {},
    )


def roofline(cost: Costs, ceilings: Ceilings, work: float, seconds: float, useful: float | None = None) -> Roofline:
    """The roofline of a call that did `work` units in `seconds`.

    Args:
        cost: of one call.
        ceilings: of the device.
        work: units of one call.
        seconds: measured time of one call.
        useful: FLOPs that one call needs, for its MFU.

    Raises:
        ValueError: the program has neither FLOPs nor bytes.
    """
    compute, memory = cost.flops / ceilings.peak, cost.bytes / ceilings.bandwidth
    least = max(compute, memory)
    if not least > 0:
        raise ValueError("expected a program with FLOPs or bytes, got one with neither")
    return Roofline(
        flops=cost.flops,
        bytes=cost.bytes,
        rate=work / least,
        bound="compute" if compute >= memory else "memory",
        share=least / seconds,
        mfu=None if useful is None else useful / seconds / ceilings.peak,
        ceilings=ceilings,
    )


@dataclass(frozen=True)
class Sizes:
    """The arrays on which the ceilings are measured."""

    copied: int
    """Bytes of the copied array."""
    side: int
    """Rows and columns of the matrices."""


SIZES = {"cpu": Sizes(2**28, 2048)}
ACCELERATOR = Sizes(2**31, 8192)


@cache
def ceilings(dtype: DTypeLike, sizes: Sizes | None = None) -> Ceilings:
    """Measures the first device, once in a process for each dtype.

    Args:
        dtype: of the matrix product; the model's.
        sizes: by default large enough for the kind of device.
    """
    dtype = dtype_name(dtype, ("bfloat16", "float32", "float16"))
    sizes = sizes or SIZES.get(jax.devices()[0].platform, ACCELERATOR)
    # A donated array that is changed: no memory is allocated, and the compiler cannot remove the copy.
    copied = _fastest(jax.jit(lambda x: x + 1, donate_argnums=0), jnp.zeros(sizes.copied // 4, jnp.float32))
    right = jax.random.normal(jax.random.key(0), (sizes.side, sizes.side)).astype(dtype)
    multiply = jax.jit(jnp.matmul)
    multiplied = _fastest(lambda left: multiply(left, right), right)
    return Ceilings(2 * sizes.copied / copied, 2.0 * sizes.side**3 / multiplied, dtype)


def _fastest(call: Callable[[jax.Array], jax.Array], array: jax.Array) -> float:
    """Seconds of the fastest of `RUNS` calls; each call's input is the previous output."""
    seconds = []
    for _ in range(RUNS + 1):
        start = time.perf_counter()
        array = call(array).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])
