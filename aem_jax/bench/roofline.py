"""How fast a program could be: its FLOPs and bytes, as its compiled text counts them, over what the device can do.

seconds >= max(FLOPs / peak, bytes / bandwidth)        share of the roofline = that / seconds measured
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax

from aem_jax.bench.ceilings import Ceilings
from aem_jax.plan.costs import Costs
from aem_jax.plan.hlo import Module, parse


@dataclass(frozen=True)
class Roofline:
    """What one call of a measured program could do.

    Attributes:
        flops: of its matrix products.
        bytes: that it reads from and writes to memory.
        rate: units/s at which it could run.
        bound: "compute" or "memory": which of the two takes longer.
        share: rate measured (the median) over the rate that it could have.
        mfu: useful FLOP/s over the peak, recomputation not counted; None where nobody asks.
        ceilings: of the device, in the same run.
    """

    flops: float
    bytes: float
    rate: float
    bound: str
    share: float
    mfu: float | None
    ceilings: Ceilings


def read(compiled: jax.stages.Compiled) -> Module:
    """The text of a program, read; `costs` counts it.

    Raises:
        ValueError: the compiler gives no text of it.
    """
    text = compiled.as_text()
    if not text:
        raise ValueError("expected the text of a compiled program, got none from this backend")
    return parse(text)


def roofline(cost: Costs, ceilings: Ceilings, useful: float | None = None) -> Callable[[float, float], Roofline]:
    """(units of a call, its seconds) -> its roofline.

    Args:
        cost: of one call.
        ceilings: of the device.
        useful: FLOPs that one call must do, for its MFU.
    """
    compute, memory = cost.flops / ceilings.peak, cost.bytes / ceilings.bandwidth
    least = max(compute, memory)
    if not least > 0:
        raise ValueError("expected a program with FLOPs or bytes, got one with neither")

    def of(work: float, seconds: float) -> Roofline:
        return Roofline(
            flops=cost.flops,
            bytes=cost.bytes,
            rate=work / least,
            bound="compute" if compute >= memory else "memory",
            share=least / seconds,
            mfu=None if useful is None else useful / seconds / ceilings.peak,
            ceilings=ceilings,
        )

    return of
