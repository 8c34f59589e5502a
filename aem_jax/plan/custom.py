"""Kernels in a compiled program: custom calls, of which XLA knows neither FLOPs nor time. Here some are known."""

import re
from dataclasses import dataclass

from aem_jax.models.splash import PASSES, splash_flops
from aem_jax.plan.hlo import Computation, Instruction

TARGETS = ("tpu_custom_call",)
"""Custom calls that are kernels."""


@dataclass(frozen=True)
class KernelCall:
    """One kernel.

    Attributes:
        name: as its program calls it.
        flops: of one run, in closed form; 0 if not known.
        known: whether they are.
        bytes: of its arguments and results.
        count: how often it runs.
    """

    name: str
    flops: float
    known: bool
    bytes: float
    count: float


def kernel_call(each: Instruction, where: Computation, num_bytes: float) -> KernelCall | None:
    """The kernel that an instruction is, if it is one."""
    target = re.search(r'custom_call_target="([^"]*)"', each.attributes)
    if each.opcode != "custom-call" or not target or target[1] not in TARGETS:
        return None
    path = re.search(r'op_name="([^"]*)"', each.attributes)
    name = path[1].removesuffix("/pallas_call").rpartition("/")[2] if path else each.name
    splash = re.match(rf"splash_m[hq]a_({'|'.join(PASSES)})_", name)
    if not splash:
        return KernelCall(name, 0.0, False, num_bytes, 1.0)
    # Queries come first; a single row has no dimension of its own.
    arrays = (shape.dims for shape in where.shapes_of(each.operands) if shape.dtype in ("bf16", "f32"))
    queries = next((dims for dims in arrays if len(dims) in (3, 4)), None)
    if queries is None:
        return KernelCall(name, 0.0, False, num_bytes, 1.0)
    rows = queries[0] if len(queries) == 4 else 1
    heads, length, head_dim = queries[-3:]
    return KernelCall(name, rows * splash_flops(splash[1], length, heads, head_dim), True, num_bytes, 1.0)
