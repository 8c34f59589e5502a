"""Costs of a compiled program on one device: FLOPs, bytes, collectives, and the compiler's own estimate of cycles.

XLA's cost analysis counts the body of a loop once. Here every loop counts as often as it runs. FLOPs are those of
matrix products; all others are few. Bytes are those that each fused operation reads from and writes to main memory; of
a large array of which it takes only a slice, those of the slice. Kernels are counted by `kernel_calls`.
"""

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from aem_jax.models.decoder import WINDOWS
from aem_jax.models.exchange import ALL_ROUNDS, FURTHER_ROUNDS
from aem_jax.plan.hlo import Computation, Instruction, Module, Shape, trip_count
from aem_jax.plan.kernel_calls import KernelCall, hbm_bytes, kernel_call, results

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
"""Opcodes of collectives."""

_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id"}
_CONTRACTED = re.compile(r'lhs_contracting_dims=\{([\d,]*)\}|"lhs_contracting_dimensions":\[([^\]]*)\]')
_OF_WINDOWS = re.compile(rf'branch_computations=.*op_name="[^"]*{WINDOWS}\)*/cond"')
"""The choice between attentions, by the number of the kind of layer."""
_OF_ROUNDS = re.compile(rf'op_name="[^"]*({ALL_ROUNDS}|{FURTHER_ROUNDS})\)*/while"')
"""The loops over the rounds of an exchange of tokens with their experts, and over those after the first."""
_SLICES = {"dynamic-slice", "slice", "gather"}
_UNTOUCHED = re.compile(r'custom_call_target="(?:AllocateBuffer|AssumeGatherIndicesInBound|ConcatBitcast)"')
"""Custom calls of the TPU's compiler that name memory and move nothing."""
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}
"""Writes in place, and the index of the operand with the new values."""
_NO_ESTIMATE = 2**63 - 1
"""Cycles of gathers that TPUs leave to their sparse cores: they have no estimate, and are timed as kernels are."""
_SEEN_THROUGH = {"bitcast", "reshape", "convert", "copy", "transpose"}


@dataclass(frozen=True)
class Collective:
    """One collective operation.

    Attributes:
        kind: one of `KINDS`.
        bytes: of the complete array that is gathered, reduced or sent, on one device.
        group: number of devices that take part.
        members: the first group's devices, by their number in the mesh; empty if the text does not show them.
        count: number of runs.
    """

    kind: str
    bytes: float
    group: int
    members: tuple[int, ...]
    count: float


@dataclass
class Costs:
    """Sums over one run of a program on one device.

    Attributes:
        flops: of matrix products, those of known kernels included.
        bytes: read from and written to main memory.
        cycles: the compiler's estimate for its fused operations; 0 where it has none.
        collectives: all of them.
        kernels: all of them; the compiler's cycles do not include them.
        unknown_loops: number of loops for which the text does not determine the number of rounds.
    """

    flops: float = 0.0
    bytes: float = 0.0
    cycles: float = 0.0
    collectives: list[Collective] = field(default_factory=list)
    kernels: list[KernelCall] = field(default_factory=list)
    unknown_loops: int = 0

    def add(self, other: "Costs", times: float = 1.0) -> None:
        """Adds another program's costs, `times` times."""
        self.flops += other.flops * times
        self.bytes += other.bytes * times
        self.cycles += other.cycles * times
        self.unknown_loops += other.unknown_loops
        for collective in other.collectives:
            self.collectives.append(replace(collective, count=collective.count * times))
        for kernel in other.kernels:
            self.kernels.append(replace(kernel, count=kernel.count * times))


def costs(module: Module, rounds: int = 1, window_shares: Sequence[float] = (), routed_share: float = 1.0) -> Costs:
    """Costs of one run of a program. The most expensive branch of a conditional counts.

    The exception is the choice between the attentions of layers with different sliding windows: there each branch
    counts with its share of the layers. Of the rounds of an exchange of tokens with experts only the first counts:
    tokens are spread evenly, as `routed_share` says, and it is enough.

    Args:
        module: the program.
        rounds: number of rounds of a loop for which the text does not determine it.
        window_shares: of the model's layers, see `decoder.window_shares`.
        routed_share: of the rows of experts' products, those that a token was sent to; see `kernel_call`.
    """
    totals: dict[str, Costs] = {}

    def total_of(name: str) -> Costs:
        if name not in totals:
            totals[name] = total = Costs()
            computation = module.computations[name]
            for instruction in computation.instructions:
                if instruction.opcode == "while":
                    trips = trip_count(module, computation, instruction)
                    if loop := _OF_ROUNDS.search(instruction.attributes):
                        trips = int(loop[1] == ALL_ROUNDS)
                    total.unknown_loops += trips is None
                    total.add(total_of(instruction.called("body")), rounds if trips is None else trips)
                elif instruction.opcode == "conditional":
                    branches = list(map(total_of, instruction.branches))
                    if _OF_WINDOWS.search(instruction.attributes) and len(branches) == len(window_shares):
                        for branch, share in zip(branches, window_shares, strict=True):
                            total.add(branch, share)
                        continue
                    total.add(max(branches, key=lambda branch: (branch.flops, branch.bytes)))
                elif instruction.opcode in ("call", "call-start"):
                    total.add(total_of(instruction.called("to_apply")))
                else:
                    _count(total, module, computation, instruction, routed_share)
        return totals[name]

    return total_of(module.entry)


def _count(
    total: Costs, module: Module, computation: Computation, instruction: Instruction, routed_share: float
) -> None:
    for where, one in _inside(module, computation, instruction):
        total.flops += _flops(one, where)
        if collective := _collective(one, where):
            total.collectives.append(collective)
        if kernel := kernel_call(one, where, routed_share):
            total.kernels.append(kernel)
            total.flops += kernel.flops
            if one is instruction:
                total.bytes += kernel.bytes
                return
    num_bytes = 0.0 if _is_free(instruction) else _bytes(module, computation, instruction)
    total.bytes += num_bytes
    cycles = re.search(r'"estimated_cycles":"(\d+)"', instruction.attributes)
    if cycles and int(cycles[1]) == _NO_ESTIMATE:
        total.kernels.append(KernelCall("sparse core", 0.0, True, num_bytes, 1.0))
    elif cycles:
        total.cycles += int(cycles[1])


def _inside(module: Module, where: Computation, instruction: Instruction) -> Iterator[tuple[Computation, Instruction]]:
    """The instruction itself, or the instructions that are fused into it."""
    body = module.computations.get(instruction.called("calls"))
    if body is None:
        yield where, instruction
    else:
        for one in body.instructions:
            yield from _inside(module, body, one)


def _flops(instruction: Instruction, where: Computation) -> float:
    """FLOPs of a product: two for each pair of factors."""
    if instruction.opcode == "convolution":
        return _convolution_flops(instruction, where)
    if instruction.opcode != "dot" and not _is_library_product(instruction):
        return 0.0
    left, *_ = where.shapes_of(instruction.operands)
    contracted = _CONTRACTED.search(instruction.attributes)
    numbers = re.findall(r"\d+", contracted[0]) if contracted else []
    return 2.0 * instruction.shapes[0].size * math.prod(left.dims[int(number)] for number in numbers)


def _is_library_product(instruction: Instruction) -> bool:
    """Whether a GPU's program calls cuBLAS for a product."""
    return instruction.opcode == "custom-call" and 'custom_call_target="__cublas$' in instruction.attributes


def _convolution_flops(instruction: Instruction, where: Computation) -> float:
    """FLOPs of a convolution. A TPU's products are convolutions, with batch dimensions as windows; padding is free."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    shapes = (*where.shapes_of(instruction.operands)[:2], instruction.shapes[0])
    if not labels or len(shapes) < 3:
        return 0.0
    left, right, out = labels.groups()
    spatial = sorted(label for label in out if label.isdigit())
    window = re.search(r"window=\{([^}]*)\}", instruction.attributes)
    options = dict(part.split("=") for part in window[1].split()) if window else {}

    def option(name: str, default: str) -> list[str]:
        return options[name].split("x") if name in options else [default] * len(spatial)

    lows = [int(pad.split("_")[0]) for pad in option("pad", "0_0")]
    rates = [[int(rate) for rate in option(name, "1")] for name in ("stride", "lhs_dilate", "rhs_dilate")]
    pairs = 1
    for label, low, *rate in zip(spatial, lows, *rates):
        size, kernel, seen = (shape.dims[names.index(label)] for shape, names in zip(shapes, (left, right, out)))
        stride, dilate, spread = rate
        pairs *= _meetings(size, kernel, seen, low, stride, dilate, spread)
    channels = shapes[1].dims[right.index("i")]
    return 2.0 * pairs * channels * shapes[2].dims[out.index("b")] * shapes[2].dims[out.index("f")]


def _meetings(size: int, kernel: int, out: int, low: int, stride: int, dilate: int, spread: int) -> int:
    """Pairs (output position, kernel position) with an element of the input, along one dimension."""
    last = (size - 1) * dilate
    return sum(
        0 <= (at := position * stride + tap * spread - low) <= last and at % dilate == 0
        for tap in range(kernel)
        for position in range(out)
    )


def _collective(instruction: Instruction, where: Computation) -> Collective | None:
    opcode = instruction.opcode.removeprefix("ragged-")
    kind = next((kind for kind in KINDS if opcode in (kind, f"{kind}-start")), None)
    if kind is None:
        return None
    members, size = _group(instruction.attributes)
    num_bytes = _exchanged(instruction, where) or _num_bytes(where.shapes_of(instruction.operands))
    if kind == "all-reduce" and where.name.startswith("all-reduce-scatter"):
        kind = "reduce-scatter"  # the TPU's program fuses it with the slice that each device keeps
    return Collective(kind, num_bytes * (size if kind == "all-gather" else 1), size, members, 1.0)


def _exchanged(instruction: Instruction, where: Computation) -> float:
    """Bytes that a device sends in a ragged all-to-all; 0 for other instructions.

    It takes rows from its first operand, and writes them into a buffer, the second. One of them has room for more rows
    than a device has; what is sent by an even load fits into the other.
    """
    if not instruction.opcode.startswith("ragged-all-to-all"):
        return 0.0
    return min(shape.num_bytes for shape in where.shapes_of(instruction.operands[:2]))


def _group(attributes: str) -> tuple[tuple[int, ...], int]:
    """The first group of devices of a collective, and its size."""
    if match := re.search(r"(?:replica_groups|source_target_pairs)=\{\{([\d,]*)\}", attributes):
        members = tuple(int(number) for number in match[1].split(",") if number)
        return members, max(len(members), 1)
    if match := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes):
        dims = [int(number) for number in match[3].split(",")]
        order = [int(number) for number in match[4].split(",")] if match[4] else list(range(len(dims)))
        return _iota(dims, order)[: int(match[2])], int(match[2])
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", attributes):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", match[1])}
        axes = [list(sizes).index(name) for name in re.findall(r"'([^']+)'", match[2])]
        members = _iota(list(sizes.values()), axes)
        return members, len(members)
    return (), 1


def _iota(dims: list[int], axes: list[int]) -> tuple[int, ...]:
    """The array 0, 1, 2, … of shape `dims`, transposed to `axes` (at index 0 of all others) and flattened."""
    strides = [math.prod(dims[i + 1 :]) for i in range(len(dims))]
    members = [0]
    for axis in axes:
        members = [start + step * strides[axis] for start in members for step in range(dims[axis])]
    return tuple(members)


def _is_free(instruction: Instruction) -> bool:
    """Whether it moves nothing. An asynchronous operation is counted where it starts, not where it goes on and ends."""
    opcode = instruction.opcode
    return opcode in _FREE or opcode.endswith(("-update", "-done")) or bool(_UNTOUCHED.search(instruction.attributes))


def _bytes(module: Module, where: Computation, instruction: Instruction) -> float:
    operands, written = where.shapes_of(instruction.operands), _written(instruction, where)
    opcode = instruction.opcode.removesuffix("-start")
    if opcode in _SLICES:
        return _num_bytes(written) + hbm_bytes(written)  # of the array in main memory, only the slice is read
    if exchanged := _exchanged(instruction, where):
        return 2 * exchanged
    if opcode in _UPDATES:
        return 2 * hbm_bytes(where.shapes_of(instruction.operands[_UPDATES[opcode] :][:1]))
    body = module.computations.get(instruction.called("calls"))
    if body is None:
        return hbm_bytes(written) + hbm_bytes(operands)
    if opcode != "fusion":
        return sum(_bytes(module, body, one) for one in body.instructions if not _is_free(one))
    return _fused_bytes(module, body, instruction, where)


def _written(instruction: Instruction, where: Computation) -> Sequence[Shape]:
    """The results that an instruction writes. Those of a start also name its operands, and scalars as its context."""
    if instruction.opcode == "custom-call":
        return results(instruction)
    operands = where.shapes_of(instruction.operands)
    if not instruction.opcode.endswith("-start") or len(instruction.shapes) <= len(operands):
        return instruction.shapes
    written = list(instruction.shapes)
    for operand in operands:
        if operand in written:
            written.remove(operand)
    return [shape for shape in written if shape.dims or shape.dtype not in ("u32", "s32")]


def _fused_bytes(module: Module, body: Computation, instruction: Instruction, where: Computation) -> float:
    """Bytes that a fusion reads and writes: only the slices of sliced inputs, only the updates of in-place outputs."""
    in_place: set[str] = set()
    total, share_in_hbm = 0.0, _share_in_hbm(_written(instruction, where))
    root = body.root
    for name in root.operands if root.opcode == "tuple" else (root.name,):
        one = _origin(body, name)
        if one.opcode in _UPDATES:
            in_place.add(_origin(body, one.operands[0]).name)
            updates = one.operands[_UPDATES[one.opcode] :][:1]
            total += _num_bytes(body.shapes_of(updates)) * share_in_hbm
        elif one.opcode != "parameter":
            total += _num_bytes(body.by_name[name].shapes) * share_in_hbm
    for one in body.instructions:
        if one.opcode == "parameter" and one.name not in in_place:
            index = int(one.argument)
            outside = hbm_bytes(where.shapes_of(instruction.operands[index : index + 1]))
            total += min(_read(module, body, one.name), outside)
    return total


def _origin(body: Computation, name: str) -> Instruction:
    one = body.by_name[name]
    while one.opcode in _SEEN_THROUGH and one.operands and one.operands[0] in body.by_name:
        one = body.by_name[one.operands[0]]
    return one


def _read(module: Module, body: Computation, name: str) -> float:
    """Bytes of an array that the instructions of a fusion read, through bitcasts and nested fusions."""
    total = 0.0
    for reader in (one for one in body.instructions if name in one.operands):
        inside = module.computations.get(reader.called("calls"))
        if reader.opcode == "bitcast" or (inside and _origin(inside, inside.root.name).opcode == "parameter"):
            total += _read(module, body, reader.name)  # the same array, or another layout of it
        elif inside is not None:
            indices = {str(index) for index, operand in enumerate(reader.operands) if operand == name}
            parameters = (one for one in inside.instructions if one.opcode == "parameter" and one.argument in indices)
            total += sum(_read(module, inside, one.name) for one in parameters)
        elif reader.opcode in _SLICES:
            total += _num_bytes(reader.shapes)
        else:
            return math.inf
    return total if body.root.name != name else math.inf


def _num_bytes(shapes: Iterable[Shape]) -> float:
    return sum(shape.num_bytes for shape in shapes)


def _share_in_hbm(shapes: Sequence[Shape]) -> float:
    total = _num_bytes(shapes)
    return hbm_bytes(shapes) / total if total else 0.0
