"""Parses the text of a compiled program: computations, instructions, and the number of rounds of its loops.

Only the parts that `costs.py` needs are parsed. Names, shapes and attributes are those of XLA's printed form, which the
compilers for CPU, GPU and TPU share.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import jax

_BYTES = {"pred": 1, "token": 0, "opaque": 0, "s4": 0.5, "u4": 0.5, "bf16": 2, "c64": 8, "c128": 16}
_SHAPE = re.compile(r"\b([a-z][a-z0-9]*)\[([\d,]*)\](\{[^}]*\})?")
_BRANCH = re.compile(r"\b(?:true_computation|false_computation)=%?([\w.-]+)")


@dataclass(frozen=True)
class Shape:
    """One array.

    Attributes:
        dtype: as XLA writes it.
        dims: sizes.
        in_hbm: whether it is in the device's main memory, not in fast memory on the chip.
    """

    dtype: str
    dims: tuple[int, ...]
    in_hbm: bool = True

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.dims)

    @property
    def num_bytes(self) -> float:
        """Bytes, without the padding of a layout."""
        width = _BYTES.get(self.dtype)
        if width is None:
            bits = re.match(r"[a-z]+(\d+)", self.dtype)
            width = int(bits[1]) / 8 if bits else 4
        return self.size * width


@dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
        name: without the leading %.
        opcode: the operation.
        shapes: its results.
        operands: names.
        attributes: the text after the operands.
        argument: the text between the parentheses.
        is_root: whether it is the result of the computation.
    """

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    attributes: str
    argument: str
    is_root: bool

    def called(self, role: str) -> str:
        """The computation that an attribute (`calls`, `body`, `condition`, …) names; empty if there is none."""
        match = re.search(rf"\b{role}=%?([\w.-]+)", self.attributes)
        return match[1] if match else ""

    @property
    def branches(self) -> list[str]:
        """The computations of a conditional; one of them runs."""
        match = re.search(r"branch_computations=\{([^}]*)\}", self.attributes)
        return re.findall(r"%?([\w.-]+)", match[1]) if match else _BRANCH.findall(self.attributes)


@dataclass(frozen=True)
class Computation:
    """Named instructions, in order."""

    name: str
    instructions: Sequence[Instruction]

    @cached_property
    def by_name(self) -> Mapping[str, Instruction]:
        """The instructions by name."""
        return {instruction.name: instruction for instruction in self.instructions}

    @property
    def root(self) -> Instruction:
        """The instruction whose result it returns."""
        return next((one for one in self.instructions if one.is_root), self.instructions[-1])

    def shapes_of(self, names: tuple[str, ...]) -> list[Shape]:
        """The result arrays of some of its instructions, in order."""
        return [shape for name in names if name in self.by_name for shape in self.by_name[name].shapes]


@dataclass(frozen=True)
class Module:
    """A program: its computations by name, and the name of the first one."""

    computations: Mapping[str, Computation]
    entry: str


def read(compiled: jax.stages.Compiled) -> Module:
    """Parses a compiled program.

    Raises:
        ValueError: the backend does not print its programs.
    """
    text = compiled.as_text()
    if not text:
        raise ValueError("expected the text of a compiled program, got none from this backend")
    return parse(text)


def parse(text: str) -> Module:
    """Parses `compiled.as_text()`.

    Raises:
        ValueError: there is no entry computation.
    """
    # An instruction is one line, except for line breaks in the metadata of a Pallas kernel.
    text = re.sub(r"kernel_metadata=\{\n(.*)\n\}", r"kernel_metadata={\1}", text)
    blocks: dict[str, list[Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if current is None:
            if header := re.match(r"(ENTRY\s+)?%?([\w.-]+) \(.*->.*\{\s*$", line):
                current = blocks[header[2]] = []
                entry = header[2] if header[1] else entry
        elif line.startswith("}"):  # a thread may follow: }, execution_thread="sparsecore"
            current = None
        elif instruction := _instruction(line):
            current.append(instruction)
    if not entry:
        raise ValueError("expected the text of a compiled program, got one without an entry computation")
    return Module({name: Computation(name, block) for name, block in blocks.items()}, entry)


def _instruction(line: str) -> Instruction | None:
    start = re.match(r"\s*(ROOT\s+)?%?([\w.-]+) = ", line)
    if not start:
        return None
    rest = re.sub(r"/\*.*?\*/", "", line[start.end() :])
    end = _balanced(rest, 0) if rest.startswith("(") else rest.index(" ")
    shapes = tuple(
        Shape(dtype, tuple(int(size) for size in dims.split(",") if size), "S(1)" not in layout)
        for dtype, dims, layout in _SHAPE.findall(rest[:end])
    )
    opcode = re.match(r"\s*([\w-]+)\(", rest[end:])
    if not opcode:
        return None
    open_at = end + opcode.end() - 1
    close_at = _balanced(rest, open_at)
    inside = rest[open_at + 1 : close_at - 1]
    operands = tuple(re.findall(r"%([\w.-]+)", inside))
    return Instruction(start[2], opcode[1], shapes, operands, rest[close_at:], inside, bool(start[1]))


def _balanced(text: str, start: int) -> int:
    """Index after the parenthesis that closes the one at `start`."""
    depth = 0
    for index in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[index], 0)
        if depth == 0:
            return index + 1
    return len(text)


def trip_count(module: Module, computation: Computation, loop: Instruction) -> int | None:
    """Number of rounds of a while loop; None if the text does not determine it.

    XLA prints the number where it knows it. Otherwise it follows from the condition, counter < constant; the constant
    may be part of the loop's state. The counter of an unrolled loop grows by more than one.
    """
    if known := re.search(r'known_trip_count"?:\{"n":"(\d+)"', loop.attributes):
        return int(known[1])
    condition = module.computations[loop.called("condition")]
    compare = _comparison(module, condition)
    if compare is None:
        return None
    state = computation.by_name.get(loop.operands[0]) if loop.operands else None
    values = [_constant(condition, name, computation, state) for name in compare.operands]
    if len(values) != 2 or values[1] is None:
        return None
    return max(-(-(values[1] - (values[0] or 0)) // _step(module, condition, compare.operands[0], loop)), 0)


def _step(module: Module, condition: Computation, counter: str, loop: Instruction) -> int:
    """The increment of a loop's counter in a round; 1 if the text does not show it."""
    body, value = module.computations[loop.called("body")], condition.by_name.get(counter)
    index = re.search(r"index=(\d+)", value.attributes) if value else None
    if index is None or body.root.opcode != "tuple":
        return 1
    add = body.by_name.get(body.root.operands[int(index[1])])
    if add is None or add.opcode != "add":
        return 1
    steps = [_constant(body, name, body, None) for name in add.operands]
    return next((step for step in steps if step), 1)


def _comparison(module: Module, condition: Computation) -> Instruction | None:
    root = condition.root
    if root.opcode == "fusion":  # a fused comparison; its parameters are the operands of the fusion, in order
        inner = module.computations[root.called("calls")]
        compare = inner.root
        if compare.opcode != "compare":
            return None
        parameters = {one.name: int(one.argument) for one in inner.instructions if one.opcode == "parameter"}
        if any(name not in parameters for name in compare.operands):
            return None
        operands = tuple(root.operands[parameters[name]] for name in compare.operands)
        root = Instruction(root.name, "compare", root.shapes, operands, compare.attributes, "", True)
    return root if root.opcode == "compare" and "direction=LT" in root.attributes else None


def _constant(
    condition: Computation, name: str, caller: Computation, state: Instruction | None, depth: int = 0
) -> int | None:
    """The value of an instruction of a loop's condition before the first round; None if the text does not show it."""
    value = condition.by_name.get(name)
    if value is None or depth > 8:
        return None
    if value.opcode == "constant":
        return int(value.argument) if re.fullmatch(r"-?\d+", value.argument) else None
    if value.opcode in ("copy", "bitcast", "convert") and value.operands:
        return _constant(condition, value.operands[0], caller, state, depth + 1)
    if value.opcode == "get-tuple-element" and state is not None and state.opcode == "tuple":
        index = re.search(r"index=(\d+)", value.attributes)
        if index and caller is not condition:
            return _constant(caller, state.operands[int(index[1])], caller, None, depth + 1)
    return None
