"""What a compiled program costs on one device: FLOPs, bytes, collectives, the compiler's own cycles.

XLA's cost analysis counts the body of a loop once, however often it runs; here every loop counts as often as it does.
FLOPs are those of matrix products, which all else is small beside. Bytes are what each fused operation reads from and
writes to main memory; of a large array that it only takes a slice of, the slice. Kernels are custom calls to XLA, which
sees no FLOPs in them and gives them no cycles: those that are known here are counted in closed form, all are listed.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from aem_jax.plan.custom import KernelCall, kernel_call
from aem_jax.plan.hlo import Computation, Instruction, Module, Shape, trip_count

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")

_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id"}
_CONTRACTED = r'"lhs_contracting_dimensions":\[([^\]]*)\]'
_SLICES = {"dynamic-slice", "slice", "gather"}
_SEEN_THROUGH = {"bitcast", "reshape", "convert", "copy", "transpose"}


@dataclass(frozen=True)
class Collective:
    """One collective operation.

    Attributes:
        kind: one of `KINDS`.
        bytes: of the whole array: what is gathered, reduced or sent, on one device.
        group: devices that take part.
        members: the first group's, by their number in the mesh; empty if the text does not say.
        count: how often it runs.
    """

    kind: str
    bytes: float
    group: int
    members: tuple[int, ...]
    count: float


@dataclass
class Costs:
    """Sums over a program's run on one device.

    Attributes:
        flops: of matrix products, those of known kernels included.
        bytes: read from and written to main memory.
        cycles: as the compiler estimates them for its fused operations; 0 where it estimates none.
        collectives: all of them.
        kernels: all of them; their time is not in the compiler's cycles.
        unknown_loops: loops whose number of rounds was given, not found.
    """

    flops: float = 0.0
    bytes: float = 0.0
    cycles: float = 0.0
    collectives: list[Collective] = field(default_factory=list)
    kernels: list[KernelCall] = field(default_factory=list)
    unknown_loops: int = 0

    def add(self, other: "Costs", times: float = 1.0) -> None:
        """Adds another program's costs, `times` over."""
        self.flops += other.flops * times
        self.bytes += other.bytes * times
        self.cycles += other.cycles * times
        self.unknown_loops += other.unknown_loops
        for each in other.collectives:
            self.collectives.append(replace(each, count=each.count * times))
        for each in other.kernels:
            self.kernels.append(replace(each, count=each.count * times))


def costs(module: Module, rounds: int = 1) -> Costs:
    """Costs of one run of a program.

    Of the branches of a conditional the dearest counts.

    Args:
        module: the program.
        rounds: how often a loop runs whose number of rounds is decided while the program runs.
    """
    found: dict[str, Costs] = {}

    def of(name: str) -> Costs:
        if name not in found:
            found[name] = total = Costs()
            computation = module.computations[name]
            for each in computation.instructions:
                if each.opcode == "while":
                    trips = trip_count(module, computation, each)
                    total.unknown_loops += trips is None
                    total.add(of(each.called("body")), rounds if trips is None else trips)
                elif each.opcode == "conditional":
                    total.add(max((of(branch) for branch in each.branches), key=lambda one: (one.flops, one.bytes)))
                elif each.opcode == "call":
                    total.add(of(each.called("to_apply")))
                else:
                    _count(total, module, computation, each)
        return found[name]

    return of(module.entry)


def _count(total: Costs, module: Module, computation: Computation, each: Instruction) -> None:
    for where, one in _inside(module, computation, each):
        total.flops += _flops(one, where)
        if collective := _collective(one, where):
            total.collectives.append(collective)
        if kernel := kernel_call(one, where, _hbm(one.shapes) + _hbm(where.shapes_of(one.operands))):
            total.kernels.append(kernel)
            total.flops += kernel.flops
    if each.opcode not in _FREE and not each.opcode.endswith("-done"):
        total.bytes += _bytes(module, computation, each)
    cycles = re.search(r'"estimated_cycles":"(\d+)"', each.attributes)
    total.cycles += int(cycles[1]) if cycles else 0


def _inside(module: Module, where: Computation, each: Instruction) -> Iterator[tuple[Computation, Instruction]]:
    """The instruction itself, or those that are fused into it."""
    body = module.computations.get(each.called("calls"))
    if body is None:
        yield where, each
    else:
        for one in body.instructions:
            yield from _inside(module, body, one)


def _flops(each: Instruction, where: Computation) -> float:
    """Of a product: two for each pair of numbers that meet."""
    if each.opcode == "dot":
        (left, *_), numbers = where.shapes_of(each.operands), _numbers("lhs_contracting_dims", each.attributes)
        return 2.0 * each.shapes[0].size * math.prod(left.dims[number] for number in numbers)
    if each.opcode == "convolution":
        return _convolution_flops(each, where)
    if _is_library_product(each):
        (left, *_), found = where.shapes_of(each.operands), re.search(_CONTRACTED, each.attributes)
        numbers = [int(number) for number in re.findall(r"\d+", found[1])] if found else []
        return 2.0 * each.shapes[0].size * math.prod(left.dims[number] for number in numbers)
    return 0.0


def _is_library_product(each: Instruction) -> bool:
    """Whether a GPU's program leaves a product to cuBLAS."""
    return each.opcode == "custom-call" and 'custom_call_target="__cublas$' in each.attributes


def _numbers(name: str, attributes: str) -> list[int]:
    found = re.search(rf"{name}=\{{([\d,]*)\}}", attributes)
    return [int(number) for number in found[1].split(",") if number] if found else []


def _convolution_flops(each: Instruction, where: Computation) -> float:
    """A TPU's products are convolutions, their batch dimensions windows that mostly see padding: it is not counted."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", each.attributes)
    shapes = (*where.shapes_of(each.operands)[:2], each.shapes[0])
    if not labels or len(shapes) < 3:
        return 0.0
    left, right, out = labels.groups()
    spatial = sorted(label for label in out if label.isdigit())
    window = re.search(r"window=\{([^}]*)\}", each.attributes)
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
    """Pairs (output place, kernel place) that meet a number of the input, along one dimension."""
    last = (size - 1) * dilate
    return sum(
        0 <= (at := place * stride + tap * spread - low) <= last and at % dilate == 0
        for tap in range(kernel)
        for place in range(out)
    )


def _collective(each: Instruction, where: Computation) -> Collective | None:
    kind = next((kind for kind in KINDS if each.opcode in (kind, f"{kind}-start")), None)
    if kind is None:
        return None
    members, size = _group(each.attributes)
    bytes_in = sum(shape.num_bytes for shape in where.shapes_of(each.operands))
    if kind == "all-reduce" and where.name.startswith("all-reduce-scatter"):
        kind = "reduce-scatter"  # of which each device keeps its part: one step, in the TPU's program
    return Collective(kind, bytes_in * (size if kind == "all-gather" else 1), size, members, 1.0)


def _group(attributes: str) -> tuple[tuple[int, ...], int]:
    """The first group of devices that take part, and its size."""
    if found := re.search(r"(?:replica_groups|source_target_pairs)=\{\{([\d,]*)\}", attributes):
        members = tuple(int(number) for number in found[1].split(",") if number)
        return members, max(len(members), 1)
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes):
        dims = [int(number) for number in found[3].split(",")]
        order = [int(number) for number in found[4].split(",")] if found[4] else list(range(len(dims)))
        members = _iota(dims, order)[: int(found[2])]
        return tuple(members), int(found[2])
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", attributes):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", found[1])}
        used = re.findall(r"'([^']+)'", found[2])
        names = list(sizes)
        strides = {name: math.prod(sizes[after] for after in names[i + 1 :]) for i, name in enumerate(names)}
        members = [0]
        for name in used:
            members = [start + step * strides[name] for start in members for step in range(sizes[name])]
        return tuple(members), len(members)
    return (), 1


def _iota(dims: list[int], order: list[int]) -> list[int]:
    """0, 1, 2, … as an array of `dims`, transposed and read in order."""
    strides = [math.prod(dims[i + 1 :]) for i in range(len(dims))]
    members = [0]
    for axis in order:
        members = [start + step * strides[axis] for start in members for step in range(dims[axis])]
    return members


def _hbm(shapes: list[Shape] | tuple[Shape, ...]) -> float:
    return sum(shape.num_bytes for shape in shapes if shape.in_hbm)


def _bytes(module: Module, where: Computation, each: Instruction) -> float:
    if each.opcode in _SLICES:
        return 2 * _hbm(each.shapes)
    if each.opcode == "dynamic-update-slice":
        return 2 * _hbm(where.shapes_of(each.operands[1:2]))
    body = module.computations.get(each.called("calls"))
    if each.opcode == "copy-start":  # (there, here, context)
        return _hbm(each.shapes[:2])
    if body is None:
        results = each.shapes[:1] if _is_library_product(each) else each.shapes  # behind it comes room to work in
        return _hbm(results) + _hbm(where.shapes_of(each.operands))
    if each.opcode != "fusion":
        return sum(_bytes(module, body, one) for one in body.instructions if one.opcode not in _FREE)
    return _fused_bytes(module, body, each, where)


def _fused_bytes(module: Module, body: Computation, each: Instruction, where: Computation) -> float:
    """What a fusion reads and writes: of what it only slices, the slices; of what it updates in place, the update."""
    in_place: set[str] = set()
    total = 0.0
    root = body.root
    for name in root.operands if root.opcode == "tuple" else (root.name,):
        one = _origin(body, name)
        if one.opcode == "dynamic-update-slice":
            in_place.add(_origin(body, one.operands[0]).name)
            total += _hbm_like(body.shapes_of(one.operands[1:2]), each)
        elif one.opcode != "parameter":
            total += sum(shape.num_bytes for shape in body.by_name[name].shapes) * _share_in_hbm(each.shapes)
    for one in body.instructions:
        if one.opcode == "parameter" and one.name not in in_place:
            index = int(one.argument)
            outside = _hbm(where.shapes_of(each.operands[index : index + 1]))
            total += min(_read(module, body, one.name), outside)
    return total


def _origin(body: Computation, name: str) -> Instruction:
    one = body.by_name[name]
    while one.opcode in _SEEN_THROUGH and one.operands and one.operands[0] in body.by_name:
        one = body.by_name[one.operands[0]]
    return one


def _read(module: Module, body: Computation, name: str) -> float:
    """How much of an array the instructions of a fusion read, seen through renamings and fusions inside it."""
    total = 0.0
    for reader in (one for one in body.instructions if name in one.operands):
        inside = module.computations.get(reader.called("calls"))
        if reader.opcode == "bitcast" or (inside and _origin(inside, inside.root.name).opcode == "parameter"):
            total += _read(module, body, reader.name)  # renamed, or laid out anew on the way
        elif inside is not None:
            places = {str(index) for index, operand in enumerate(reader.operands) if operand == name}
            parameters = (one for one in inside.instructions if one.opcode == "parameter" and one.argument in places)
            total += sum(_read(module, inside, one.name) for one in parameters)
        elif reader.opcode in _SLICES:
            total += sum(shape.num_bytes for shape in reader.shapes)
        else:
            return math.inf
    return total if body.root.name != name else math.inf


def _hbm_like(shapes: list[Shape], each: Instruction) -> float:
    return sum(shape.num_bytes for shape in shapes) * _share_in_hbm(each.shapes)


def _share_in_hbm(shapes: tuple[Shape, ...]) -> float:
    total = sum(shape.num_bytes for shape in shapes)
    return _hbm(shapes) / total if total else 0.0
