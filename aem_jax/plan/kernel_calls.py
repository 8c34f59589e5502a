"""Kernels in compiled programs: custom calls, of which XLA knows neither FLOPs nor time.

Known kernels are counted in closed form, from their names and the shapes of their arguments; all are listed. Bytes are
those of arguments and results: each is read or written once.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from aem_jax.models.splash import PASSES, WINDOW, splash_flops
from aem_jax.plan.hlo import Computation, Instruction, Shape

_TARGETS = re.compile(r"tpu_custom_call|__cudnn\$.*|__gpu\$xla\.gpu\.triton|triton_kernel_call\w*|mosaic_gpu\w*")
"""Targets of the custom calls that are kernels: Pallas on TPUs, cuDNN, and Pallas on GPUs by Triton or Mosaic."""

_GROUP_BORDERS = "ragged-dot-metadata"
"""libtpu's kernel that finds where the groups of `jax.lax.ragged_dot` begin. It has no products."""

CUDNN_BLOCK = 128
"""Queries and keys of a tile of cuDNN's attention, as counted here: tiles after the queries are not visited."""


@dataclass(frozen=True)
class KernelCall:
    """One call of a kernel, or another operation without an estimate by the compiler.

    Attributes:
        name: its name in the program.
        flops: of one run, in closed form; 0 if unknown.
        known: whether its FLOPs are known.
        bytes: of its arguments and results.
        count: number of runs.
    """

    name: str
    flops: float
    known: bool
    bytes: float
    count: float


def kernel_call(call: Instruction, where: Computation, routed_share: float = 1.0) -> KernelCall | None:
    """The kernel that an instruction calls; None if it calls none.

    Args:
        call: an instruction.
        where: the computation that it is part of.
        routed_share: of the rows of a product by groups, those that belong to a group: the kernel visits no others.
    """
    target = re.search(r'custom_call_target="([^"]*)"', call.attributes)
    if call.opcode != "custom-call" or not target or not _TARGETS.fullmatch(target[1]):
        return None
    arguments = where.shapes_of(call.operands)
    num_bytes = hbm_bytes(results(call)) + hbm_bytes(arguments)
    if "ragged_dot_tiling=" in call.attributes:
        return _product_of_groups(call, arguments, routed_share)
    if target[1].startswith("__cudnn$"):
        name = target[1].removeprefix("__cudnn$")
        flops = _cudnn_flops(name, call, arguments)
    else:
        path = re.search(r'op_name="([^"]*)"', call.attributes)
        name = path[1].removesuffix("/pallas_call").rpartition("/")[2] if path else call.name
        window = re.search(rf"{WINDOW}(\d+)", path[1]) if path else None
        flops = 0.0 if name == _GROUP_BORDERS else _pallas_flops(name, arguments, int(window[1]) if window else 0)
    return KernelCall(name, flops or 0.0, flops is not None, num_bytes, 1.0)


def _product_of_groups(call: Instruction, arguments: Sequence[Shape], routed_share: float) -> KernelCall:
    """libtpu's kernel for `jax.lax.ragged_dot`: rows [M,K] times [G,K,N], or times [M,N] for the weights' gradient."""
    left, right = (shape for shape in arguments if len(shape.dims) > 1)
    arrays = (left, right, *call.shapes)
    rows = [shape for shape in arrays if len(shape.dims) == 2]
    flops = 2.0 * left.size * right.dims[-1]
    num_bytes = hbm_bytes(arrays) - (1 - routed_share) * hbm_bytes(rows)
    return KernelCall("ragged-dot", flops * routed_share, True, num_bytes, 1.0)


def results(call: Instruction) -> Sequence[Shape]:
    """The results of a custom call, without the workspace (bytes) of a library."""
    shapes = call.shapes
    return shapes[:-1] if len(shapes) > 1 and shapes[-1].dtype in ("s8", "u8") else shapes


def hbm_bytes(shapes: Iterable[Shape]) -> float:
    """Bytes of the arrays that are in main memory."""
    return sum(shape.num_bytes for shape in shapes if shape.in_hbm)


def _cudnn_flops(name: str, call: Instruction, arguments: Sequence[Shape]) -> float | None:
    """Attention: two products of the scores' size forward, five backward; half of the tiles if it is causal."""
    scores = re.search(r'"?intermediate_tensor_shape"?:\s*\{.*?"?dimensions"?:\s*\[([^\]]*)\]', call.attributes)
    if not name.startswith("fmha") or not scores or not arguments:
        return None
    batch, heads, queries, keys = (int(size) for size in re.findall(r"\d+", scores[1]))
    pairs = float(queries * keys)
    if re.search(r'"?mask_type"?:\s*"[A-Z_]*CAUSAL"', call.attributes):
        pairs = queries * min(keys, (keys + CUDNN_BLOCK) / 2)
    products = 5 if name.endswith("Backward") else 2
    return 2.0 * products * batch * heads * arguments[0].dims[-1] * pairs


def _pallas_flops(name: str, arguments: Sequence[Shape], window: int) -> float | None:
    arrays = [shape.dims for shape in arguments if shape.dtype in ("bf16", "f32") and len(shape.dims) in (3, 4)]
    for pattern, flops in _PALLAS.items():
        if (match := re.match(pattern, name)) and arrays:
            return flops(match, arrays, window)
    return None


def _splash(match: re.Match[str], arrays: Sequence[tuple[int, ...]], window: int) -> float:
    # The first array is the queries; a single row has no row dimension.
    rows = arrays[0][0] if len(arrays[0]) == 4 else 1
    heads, length, head_dim = arrays[0][-3:]
    return rows * splash_flops(match[1], length, heads, head_dim, window)


def _ragged(match: re.Match[str], arrays: Sequence[tuple[int, ...]], window: int) -> float:
    # Queries [S,KV,R,Dh] and keys [S,KV,Dh,T], every slot full.
    (slots, kv_heads, rows, head_dim), keys = arrays[:2]
    return 4.0 * slots * kv_heads * rows * head_dim * keys[-1]


_PALLAS: Mapping[str, Callable[[re.Match[str], Sequence[tuple[int, ...]], int], float]] = {
    rf"splash_m[hq]a_({'|'.join(PASSES)})_": _splash,
    r"ragged_attention": _ragged,
}
"""How a Pallas kernel's name begins -> its FLOPs, of the match, the dimensions of its arguments of floats, and its
sliding window (0 for none)."""
