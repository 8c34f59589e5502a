"""The weights of a model as tensors by name, and those of a folder: the files that transformers reads.

Other formats, truncated files and Git LFS pointers are refused with a one-line error that names the file.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from aem_jax.files import is_lfs_pointer, read_json
from aem_jax.models.config import brief
from aem_jax.models.parameters import EMBED, HEAD

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
FLOATS = ("F64", "F32", "F16", "BF16")
"""Dtypes of weights, in the names of safetensors."""
_TEXT_PARTS = {"language_model.": "", "model.language_model.": "model."}
"""Prefix of the tensors of the text part of a model that reads images, too -> prefix of a model for text alone."""
_IMAGE_PARTS = tuple(
    f"{prefix}{part}." for prefix in ("", "model.") for part in ("vision_tower", "multi_modal_projector")
)
"""Prefixes of the tensors of its other parts, which are not read."""
_OTHER_FORMATS = (".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx")


class StoredTensor(NamedTuple):
    """A tensor in a file.

    Attributes:
        shape: its shape.
        kind: its dtype in the file, such as BF16 or Q4_K.
        read: rows, or None for all -> their numbers.
    """

    shape: tuple[int, ...]
    kind: str
    read: Callable[[slice | None], np.ndarray]


@dataclass(frozen=True)
class Checkpoint:
    """The weights of a model, opened: names, shapes, and tensors one at a time.

    Attributes:
        source: the folder or file.
        files: the files that are read.
        tensors: Hugging Face's name -> tensor.
        kinds: dtypes that can be read.
        unread: names of the folder's other weight files and index, which are not read.
    """

    source: Path
    files: Sequence[Path]
    tensors: Mapping[str, StoredTensor]
    kinds: Sequence[str] = FLOATS
    unread: Sequence[str] = ()

    def has_own_head(self) -> bool:
        """Whether the files have a head that differs from the embedding."""
        if HEAD not in self.tensors or EMBED not in self.tensors:
            return False
        embed, head = self.tensors[EMBED], self.tensors[HEAD]
        if embed.shape != head.shape or len(embed.shape) != 2 or {embed.kind, head.kind} - set(self.kinds):
            return True
        step = max(1, 2**24 // max(1, embed.shape[1]))  # rows compared at a time
        for start in range(0, embed.shape[0], step):
            rows = slice(start, min(start + step, embed.shape[0]))
            one, other = (tensor.read(rows).astype(np.float32) for tensor in (embed, head))
            if not np.array_equal(one, other):
                return True
        return False


def open_safetensors(folder: Path, stack: ExitStack) -> Checkpoint:
    """Opens the safetensors files of a folder for as long as `stack` is open.

    Raises:
        ValueError: no weights in the folder, or files that are missing, truncated or not safetensors.
    """
    files, tensors, holders = _weight_files(folder), dict[str, StoredTensor](), dict[str, Path]()
    for file in files:
        try:
            # Not mapped: a mapped file's pages would count as memory of this process until all of it is read.
            opened = stack.enter_context(safe_open(file, framework="np", backend="pread"))
        except (SafetensorError, OSError) as error:
            raise ValueError(_unreadable(file, error)) from error
        for name in opened.keys():  # noqa: SIM118 (it cannot be iterated)
            if name in holders:
                both = f"{holders[name].name} and {file.name}"
                raise ValueError(f"expected each tensor in one file of {folder}, got {name} in {both}")
            holders[name], header = file, opened.get_slice(name)
            read = partial(_read_safetensor, file, opened, name)
            tensors[_text_name(name)] = StoredTensor(tuple(header.get_shape()), header.get_dtype(), read)
    if any(_text_name(name) != name for name in holders):
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(_IMAGE_PARTS)}
    others = {*folder.glob("*.safetensors"), *folder.glob(INDEX)} - {*files}
    unread = sorted(file.name for file in others if folder / SINGLE in files or file.name != INDEX)
    return Checkpoint(folder, files, tensors, unread=unread)


def _text_name(name: str) -> str:
    """The name that a tensor of a text part has in a model for text alone; any other name as it is."""
    prefix = next((prefix for prefix in _TEXT_PARTS if name.startswith(prefix)), "")
    return _TEXT_PARTS.get(prefix, "") + name.removeprefix(prefix)


def _read_safetensor(file: Path, opened: Any, name: str, rows: slice | None = None) -> np.ndarray:
    try:
        return opened.get_tensor(name) if rows is None else opened.get_slice(name)[rows]
    except (SafetensorError, OSError) as error:
        raise ValueError(_unreadable(file, error)) from error


def write_tensors(file: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes a safetensors file as transformers does.

    Raises:
        OSError: it cannot be written.
    """
    try:
        save_file(dict(tensors), file, metadata={"format": "pt"})
    except SafetensorError as error:  # also raised for a full disk
        raise OSError(f"{file} cannot be written: {error}") from error
    os.umask(mask := os.umask(0))
    file.chmod(0o666 & ~mask)  # safetensors makes it readable for its owner alone


def _weight_files(folder: Path) -> list[Path]:
    """The files that transformers reads: the single file if there is one, else those of the index."""
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if (folder / INDEX).is_file():
        return _indexed(folder)
    others = sorted(file.name for file in folder.iterdir() if file.suffix in _OTHER_FORMATS) if folder.is_dir() else ()
    present = f"{', '.join(others[:3])}; other formats are not read, convert it to safetensors" if others else "neither"
    if gguf := next((name for name in others if name.endswith(".gguf")), None):
        present = f"{gguf}; give the path of the file itself"
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
    if is_lfs_pointer(file):
        return f"expected {kind} in {file}, got a Git LFS pointer: the file is not downloaded; run git lfs pull"
    reason = " ".join(str(error).split())
    return f"expected {kind} in {file}, got {reason[:300]}; is the download complete?"
