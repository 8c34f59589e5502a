"""The weight files of a folder: the files that transformers reads, opened as safetensors.

Other formats, truncated files and Git LFS pointers are refused with a one-line error that names the file.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from aem_jax.files import read_json
from aem_jax.models.config import brief
from aem_jax.models.parameters import EMBED, HEAD

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
FLOATS = ("F64", "F32", "F16", "BF16")
"""Dtypes of weights, in the names of safetensors."""
_OTHER_FORMATS = (".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx")
_POINTER = b"version https://git-lfs"
"""First bytes of a Git LFS pointer, the placeholder of a file that is not downloaded."""


class Checkpoint:
    """The safetensors files of a folder, opened: names, shapes, and tensors one at a time.

    Attributes:
        folder: folder of the files.
        files: the files that are read.

    Raises:
        ValueError: no weights in the folder, or files that are missing, truncated or not safetensors.
    """

    def __init__(self, folder: Path, stack: ExitStack):
        self.folder = folder
        self.files: list[Path] = _weight_files(folder)
        self._holders: dict[str, tuple[Path, Any]] = {}
        for file in self.files:
            try:
                # Not mapped: a mapped file's pages would count as memory of this process until all of it is read.
                opened = stack.enter_context(safe_open(file, framework="np", backend="pread"))
            except (SafetensorError, OSError) as error:
                raise ValueError(_unreadable(file, error)) from error
            for name in opened.keys():  # noqa: SIM118 (it cannot be iterated)
                if name in self._holders:
                    both = f"{self._holders[name][0].name} and {file.name}"
                    raise ValueError(f"expected each tensor in one file of {folder}, got {name} in {both}")
                self._holders[name] = (file, opened)

    def __contains__(self, name: str) -> bool:
        return name in self._holders

    def __iter__(self) -> Iterator[str]:
        return iter(self._holders)

    @property
    def unread(self) -> list[str]:
        """Names of the folder's other weight files and index, which are not read."""
        others = {*self.folder.glob("*.safetensors"), *self.folder.glob(INDEX)} - {*self.files}
        is_single = self.folder / SINGLE in self.files
        return sorted(file.name for file in others if is_single or file.name != INDEX)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from its file's header."""
        return tuple(self._holders[name][1].get_slice(name).get_shape())

    def kind(self, name: str) -> str:
        """Dtype of a tensor, in the names of safetensors."""
        return self._holders[name][1].get_slice(name).get_dtype()

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        """One tensor, or some rows of it."""
        file, opened = self._holders[name]
        try:
            return opened.get_tensor(name) if rows is None else opened.get_slice(name)[rows]
        except (SafetensorError, OSError) as error:
            raise ValueError(_unreadable(file, error)) from error

    def has_own_head(self) -> bool:
        """Whether the files have a head that differs from the embedding."""
        if HEAD not in self or EMBED not in self:
            return False
        shape = self.shape(EMBED)
        if shape != self.shape(HEAD) or len(shape) != 2 or {self.kind(EMBED), self.kind(HEAD)} - set(FLOATS):
            return True
        step = max(1, 2**24 // max(1, shape[1]))  # rows compared at a time
        for start in range(0, shape[0], step):
            rows = slice(start, min(start + step, shape[0]))
            one, other = (self.read(name, rows).astype(np.float32) for name in (EMBED, HEAD))
            if not np.array_equal(one, other):
                return True
        return False


def write_tensors(file: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes a safetensors file as transformers does.

    Raises:
        OSError: it cannot be written.
    """
    try:
        save_file(dict(tensors), file, metadata={"format": "pt"})
    except SafetensorError as error:  # also raised for a full disk
        raise OSError(f"{file} cannot be written: {error}") from error


def _weight_files(folder: Path) -> list[Path]:
    """The files that transformers reads: the single file if there is one, else those of the index."""
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if (folder / INDEX).is_file():
        return _indexed(folder)
    others = sorted(file.name for file in folder.iterdir() if file.suffix in _OTHER_FORMATS) if folder.is_dir() else ()
    present = f"{', '.join(others[:3])}; other formats are not read, convert it to safetensors" if others else "neither"
    raise ValueError(f"expected {SINGLE} or {INDEX} in {folder}, got {present}")


def _indexed(folder: Path) -> list[Path]:
    index = folder / INDEX
    try:
        theirs = read_json(index)
    except (ValueError, OSError) as error:
        raise ValueError(_unreadable(index, error, "an index of weights")) from error
    names = theirs.get("weight_map") if isinstance(theirs, dict) else None
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise ValueError(f"expected a weight_map of tensors to files in {index}, got {brief(theirs)}")
    names = sorted(set(names.values()))
    try:
        missing = [name for name in names if Path(name).name != name or not (folder / name).is_file()]
    except OSError as error:  # not a valid file name
        raise ValueError(f"expected names of files in {index}, got {error.strerror}") from error
    if missing or not names:
        some = ", ".join(brief(name) for name in missing[:3]) or "all"
        raise ValueError(f"expected the files that {INDEX} names in {folder}, {some} missing")
    return [folder / name for name in names]


def _unreadable(file: Path, error: Exception, kind: str = "safetensors") -> str:
    """The error for a file that cannot be read, in one line."""
    try:
        with file.open("rb") as opened:
            is_pointer = opened.read(len(_POINTER)) == _POINTER
    except OSError:
        is_pointer = False
    if is_pointer:
        return f"expected {kind} in {file}, got a Git LFS pointer: the file is not downloaded; run git lfs pull"
    reason = " ".join(str(error).split())
    return f"expected {kind} in {file}, got {reason[:300]}; is the download complete?"
