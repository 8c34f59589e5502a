"""The folder of one checkpoint: arrays in `state`, and a JSON record with their checksums.

The storage library checks its indices, but not the bytes of arrays, and a missing array reads as zeros. So the
checksums decide whether a checkpoint is intact.
"""

import glob
import json
import logging
import sys
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp
from etils import epath

from aem_jax.checkpoint.checksum import SEAL, checksums, first_difference, sealed, unsealed
from aem_jax.files import read_json, write_text

State = TypeVar("State")

STATE, RECORD = "state", "extra"
"""Names of the items of a checkpoint; the second is the JSON record."""
_RUN = ".run"
"""File in the folder of all checkpoints that holds its identity."""
_READ_BACK_BYTES = 2**26
_CLOUD = ("gs", "s3", "az", "hf")
"""First parts of paths that etils treats as buckets."""


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read; the message says why, and which one is still good."""


class LiteralPath(type(epath.Path("/"))):
    """A path without glob patterns: etils lists a folder with a glob that starts with the folder's path."""

    def glob(self, pattern: str) -> Iterator["LiteralPath"]:
        """The files of this folder that match."""
        for path in glob.glob(f"{glob.escape(str(self))}/{pattern}"):
            yield type(self)(path)


def check_path(folder: Path) -> None:
    """Refuses a path that the storage library would read as another one.

    Raises:
        CheckpointError: the folder has such a path.
    """
    why = ""
    if "\\" in str(folder):
        why = "no backslash in its path"
    elif folder.parts[1:2] and folder.parts[1] in _CLOUD:
        why = f"a path that is not under /{folder.parts[1]}, which stands for a bucket"
    elif any("\udc80" <= letter <= "\udcff" for letter in str(folder)):
        why = "a path in UTF-8"
    if why:
        raise CheckpointError(f"expected a folder for checkpoints with {why}, got {str(folder)!r}; choose another one")


def mark(folder: Path) -> None:
    """Gives a folder without checkpoints an identity, which is recorded in each of its checkpoints."""
    if identity(folder) is None and not (folder / _RUN).is_dir():
        write_text(folder / _RUN, json.dumps(sealed({"run": uuid.uuid4().hex})) + "\n")


def identity(folder: Path) -> str | None:
    """The identity from `mark`; None where its file is damaged, which then costs no checkpoint."""
    try:
        content = read_json(folder / _RUN)
    except (OSError, ValueError):
        return None
    record = unsealed(content) if isinstance(content, dict) else None
    return None if record is None else record.get("run")


def items(folder: Path, step: int, state: Any, score: float | None, extra: Mapping[str, Any]) -> Any:
    """The items to save of a step."""
    record = {"step": step, "score": score, "checksums": checksums(state), "extra": dict(extra)}
    record |= {"run": identity(folder)}
    return ocp.args.Composite(**{STATE: ocp.args.StandardSave(state), RECORD: ocp.args.JsonSave(sealed(record))})


def read_record(folder: Path, step: int) -> dict[str, Any]:
    """The record with the state of a step: step, score, checksums, extra and the run's identity.

    Raises:
        OSError: it cannot be read.
        ValueError: it is damaged, or has no checksum because an earlier version wrote it.
    """
    path = folder / str(step) / RECORD / "metadata"
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON mapping, got {type(content).__name__}")
    if SEAL not in content:
        raise ValueError(
            f"{path}: expected the record of step {step} as it was written, got one without a checksum; "
            "use the version of aem_jax that began the run"
        )
    record = unsealed(content)
    if record is None or record.get("step") != step:
        raise ValueError(f"{path}: expected the record of step {step} as it was written, got another")
    return record


def write_score(folder: Path, step: int, score: float) -> None:
    """Adds a score to the record of a complete checkpoint.

    Raises:
        OSError: the record cannot be read or written.
        ValueError: it is damaged.
    """
    record = read_record(folder, step) | {"score": score}
    write_text(folder / str(step) / RECORD / "metadata", json.dumps(sealed(record)))


def read_state(folder: Path, step: int, abstract_state: State) -> State:
    """The state of a step.

    Raises:
        Exception: whatever the library raises on a damaged checkpoint; ValueError for arrays that differ from what was
            written, or that belong to another state.
    """
    record = read_record(folder, step)
    ours, theirs = identity(folder), record.get("run")
    if ours and theirs and ours != theirs:
        raise ValueError(f"expected a checkpoint of this run in {folder / str(step)}, got one of another")
    _check_names(abstract_state, record["checksums"])
    _hush_abandoned_reads()
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
        state = checkpointer.restore(_state_path(folder, step), args=ocp.args.StandardRestore(abstract_state))
    _verify(record["checksums"], checksums(state))
    return state


def read_back(folder: Path, step: int, state: Any) -> None:
    """Reads back the structure of a new checkpoint and one array: the largest that reads quickly.

    Raises:
        Exception: it cannot be read; ValueError if it differs from what was written.
    """
    leaves, tree = jax.tree.flatten(state)
    sizes = [leaf.size * leaf.dtype.itemsize for leaf in leaves]
    chosen = max(range(len(leaves)), key=lambda i: (sizes[i] <= _READ_BACK_BYTES, sizes[i]))
    wanted: list[Any] = [ocp.PLACEHOLDER] * len(leaves)
    restore_args = [ocp.RestoreArgs() for _ in leaves]
    wanted[chosen] = jax.ShapeDtypeStruct(leaves[chosen].shape, leaves[chosen].dtype)
    restore_args[chosen] = ocp.ArrayRestoreArgs(sharding=getattr(leaves[chosen], "sharding", None))
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        restored = checkpointer.restore(
            _state_path(folder, step),
            args=ocp.args.PyTreeRestore(tree.unflatten(wanted), restore_args=tree.unflatten(restore_args)),
        )
    expected = list(read_record(folder, step)["checksums"].values())[chosen]
    _verify({"": expected}, checksums(jax.tree.leaves(restored)[chosen]))


def first_line(error: BaseException) -> str:
    """An error of the storage library, which may have many lines, as one line."""
    lines = str(error).strip().splitlines()
    text = " ".join(lines[0].partition("See full TensorStore")[0].split()) if lines else type(error).__name__
    return text if len(text) <= 300 else f"{text[:297]}..."


def _hush_abandoned_reads() -> None:
    """Suppresses the tracebacks of reads that orbax abandons when the read of another array fails.

    They end in the storage library's threads or in the garbage collector, where no caller can catch them.
    """
    others = sys.unraisablehook
    if getattr(others, "hushes_reads", False):
        return

    def hook(unraisable: Any) -> None:
        is_closed_loop = str(unraisable.exc_value) == "Event loop is closed"
        code = getattr(unraisable.object, "cr_code", None)
        if not is_closed_loop and not (code and "orbax" in code.co_filename):
            others(unraisable)

    hook.hushes_reads = True  # pyright: ignore[reportFunctionMemberAccess]
    sys.unraisablehook = hook
    logging.getLogger("asyncio").addFilter(_is_no_abandoned_read)


def _is_no_abandoned_read(record: logging.LogRecord) -> bool:
    text = record.getMessage()
    return "never retrieved" not in text or not ("orbax" in text or "OCDBT" in text)


def _state_path(folder: Path, step: int) -> LiteralPath:
    return LiteralPath(folder / str(step) / STATE)


def _check_names(abstract_state: Any, saved: Mapping[str, str] | None) -> None:
    """Compares the paths of a state's arrays with those of a checkpoint; old checkpoints have no record of them."""
    if saved is None:
        return
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(abstract_state)[0]]
    missing, unknown = [name for name in names if name not in saved], sorted(saved.keys() - set(names))
    if missing or unknown:
        expected, got = (group[0] if group else "no such array" for group in (missing, unknown))
        raise ValueError(
            f"expected {expected}, got {got}; if it was written by an earlier version of aem_jax, train the run to its "
            "end with that version"
        )


def _verify(expected: Mapping[str, str], actual: Mapping[str, str]) -> None:
    if difference := first_difference(expected, actual):
        raise ValueError(f"an array is not what was written: {difference}")
