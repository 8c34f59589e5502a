"""The header of a GGUF file: its fields and the places of its tensors, without the tensors' numbers.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The reader of the PyPI package `gguf` is not
used: it makes arrays of every string, which takes 35 times as long (2 s of CPU time for a vocabulary of 49,152 words).
"""

import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from aem_jax.files import is_lfs_pointer

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Type of a field -> its format in `struct`."""
_FLOAT32, _STRING, _ARRAY = 6, 8, 9
_ALIGNMENT = 32
_MAX_DIMENSIONS = 4


class TensorInfo(NamedTuple):
    """A tensor of a GGUF file.

    Attributes:
        shape: slowest axis first, as in numpy; the file has it reversed.
        type: number of its type, one of `gguf.GGMLQuantizationType`.
        offset: of its first byte in the file.
    """

    shape: tuple[int, ...]
    type: int
    offset: int


@dataclass(frozen=True)
class GGUFHeader:
    """The header of a GGUF file.

    Attributes:
        path: the file.
        fields: name -> value. A float32 becomes the shortest decimal number that rounds to it, so that an epsilon of
            1e-5 is 1e-5.
        tensors: name -> tensor.
        file_bytes: size of the file.
    """

    path: Path
    fields: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    file_bytes: int


def is_gguf(path: str | Path) -> bool:
    """Whether a model's path is that of a GGUF file: a file, or a name that ends with .gguf."""
    return Path(path).suffix.lower() == ".gguf" or os.path.isfile(path)


def read_header(path: str | Path) -> GGUFHeader:
    """Reads the header of a GGUF file.

    Raises:
        ValueError: no such file, another format or version, or a truncated or damaged header; one line with the path.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            return _read(path, _Source(file, os.fstat(file.fileno()).st_size))
    except OSError as error:
        raise ValueError(f"expected a GGUF file, got {error.strerror} for {path}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _read(path: Path, source: "_Source") -> GGUFHeader:
    magic = source.take(min(len(_MAGIC), source.size))
    if magic != _MAGIC:
        got = "a Git LFS pointer; run git lfs pull" if is_lfs_pointer(path) else f"{magic!r}"
        raise ValueError(f"expected a GGUF file, which begins with {_MAGIC!r}, got {got}")
    version = source.scalar("I")
    if version not in _VERSIONS:
        is_swapped = version % 2**16 == 0
        raise ValueError(f"expected GGUF version 2 or 3, got {'big-endian numbers' if is_swapped else version}")
    num_tensors, num_fields = source.scalar("Q"), source.scalar("Q")
    fields: dict[str, Any] = {}
    for _ in range(num_fields):
        _add(fields, source.name(), source.value(source.scalar("I")))
    tensors: dict[str, TensorInfo] = {}
    for _ in range(num_tensors):
        name, dimensions = source.name(), source.scalar("I")
        if not 1 <= dimensions <= _MAX_DIMENSIONS:
            raise ValueError(f"expected 1 to {_MAX_DIMENSIONS} dimensions of {name!r:.80}, got {dimensions}")
        shape = tuple(reversed(source.scalars("Q", dimensions)))
        _add(tensors, name, TensorInfo(shape, source.scalar("I"), source.scalar("Q")))
    alignment = fields.get("general.alignment", _ALIGNMENT)
    if type(alignment) is not int or alignment < 1:
        raise ValueError(f"expected general.alignment to be a whole number of at least 1, got {alignment!r:.80}")
    start = -(-source.at // alignment) * alignment  # offsets in the file begin here
    placed = {name: info._replace(offset=start + info.offset) for name, info in tensors.items()}
    return GGUFHeader(path, fields, placed, source.size)


def _add(to: dict[str, Any], name: str, value: Any) -> None:
    if name in to:
        raise ValueError(f"expected each name once, got {name!r:.80} twice")
    to[name] = value


class _Source:
    """The bytes of a header, read in order."""

    def __init__(self, file: BinaryIO, size: int):
        self._file, self.size, self.at = file, size, 0

    def take(self, count: int) -> bytes:
        # Checked first: a damaged count could ask for more than memory.
        if self.at + count > self.size:
            raise ValueError(f"expected a complete header, got a file of {self.size} bytes that ends within it")
        self.at += count
        return self._file.read(count)

    def scalars(self, form: str, count: int) -> tuple[Any, ...]:
        return struct.unpack(f"<{count}{form}", self.take(count * struct.calcsize(f"<{form}")))

    def scalar(self, form: str) -> Any:
        return self.scalars(form, 1)[0]

    def text(self) -> str:
        text = self.take(self.scalar("Q"))
        try:
            return text.decode()
        except UnicodeDecodeError:
            raise ValueError(f"expected text in UTF-8, got {text[:40]!r}") from None

    def name(self) -> str:
        name = self.text()
        if not name.isprintable():
            raise ValueError(f"expected a name that can be printed, got {name!r:.80}")
        return name

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind == _FLOAT32:
            return float(str(np.float32(self.scalar("f"))))
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind != _ARRAY:
            raise ValueError(f"expected a known type of field, got {kind}")
        kind, count = self.scalar("I"), self.scalar("Q")
        if kind in _SCALARS:
            return list(self.scalars(_SCALARS[kind], count))
        if kind == _STRING:
            return [self.text() for _ in range(count)]
        raise ValueError(f"expected an array of numbers or texts, got one of type {kind}")
