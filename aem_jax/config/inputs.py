"""The files that decide a run: digests are recorded when the run begins, and compared when it is read or resumed.

`inputs.json` holds a digest for each setting that names files of tasks or of an environment's code, one for each of the
run's own files that decide what is computed, and, with LoRA, checksums of the frozen weights as they are used. The last
are of numbers, not of files, because a model may be moved or saved again. A run without this file gets one when it is
resumed.
"""

import hashlib
import json
import logging
import os
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

from aem_jax.checkpoint.checksum import sealed, unsealed
from aem_jax.config.environments import input_files
from aem_jax.config.run import RunConfig
from aem_jax.errors import ConfigError
from aem_jax.files import read_json, write_text
from aem_jax.overrides import flag

FILE = "inputs.json"
"""In the folder of the run."""
FROZEN = "frozen weights"
"""Key of the checksums of a LoRA run's frozen weights."""
MODEL = "model"
"""Folder in that of the run: a copy of the `config.json` of --model.path."""
TOKENIZER = "tokenizer"
"""Folder in that of the run."""
CODE = "openenv.serve"
"""The setting whose file is code: a change of it may, but need not, change results."""

WHOLE_BYTES = 2**30
"""Largest file that is hashed completely; of a larger one `_BLOCKS` blocks are hashed."""
_BLOCKS, _BLOCK_BYTES = 64, 2**20

Inputs = dict[str, Any]


def load(run: Path) -> Inputs:
    """A run's record of its inputs; empty where it has none.

    Raises:
        ConfigError: the record cannot be read.
    """
    path = run / FILE
    try:
        record = read_json(path)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"{error}; put a copy of {FILE} back, or delete it to go on without the check") from None
    inputs = unsealed(record) if isinstance(record, dict) else None
    if inputs is None:
        raise ConfigError(
            f"{path}: expected the record as it was written, got another content; "
            "put a copy of it back, or delete it to go on without the check"
        )
    return inputs


def identify(run: Path, config: RunConfig, known: Collection[str] = ()) -> Inputs:
    """Digests of a run's inputs as they are now, without those that are `known`.

    Raises:
        ConfigError: a file cannot be read.
    """
    files = {**input_files(config), **{name: (run / name, [run / name]) for name in _own(run)}}
    return {name: digest(*named) for name, named in files.items() if name not in known}


def write(run: Path, inputs: Mapping[str, Any]) -> None:
    """Writes the record atomically."""
    write_text(run / FILE, json.dumps(sealed(inputs), indent=2) + "\n")


def check_own(run: Path) -> None:
    """Checks that the run's config, tokenizer and model config are as the run wrote them.

    Raises:
        ConfigError: one of them has changed.
    """
    for name, recorded in load(run).items():
        if name.startswith((f"{TOKENIZER}/", f"{MODEL}/", "config.json")):
            current = digest(run / name, [run / name]) if (run / name).is_file() else None
            if current != recorded:
                got = "none" if current is None else "another content"
                raise ConfigError(f"{run / name}: expected the file as the run wrote it, got {got}; put a copy back")


def check_sources(run: Path, config: RunConfig, action: Literal["refuse", "warn"]) -> None:
    """Checks that the files named by settings are those with which the run began.

    Raises:
        ConfigError: one of them has changed, and `action` is to refuse that.
    """
    known = load(run)
    for name, (root, files) in input_files(config).items():
        if name not in known or known[name] == digest(root, files):
            continue
        changed = f"{flag(name)}: expected {root} as it was when {run} began, got another content"
        if name == CODE or action == "warn":
            logging.getLogger(__name__).warning("%s; results from here on are computed with the new one", changed)
        else:
            raise ConfigError(
                f"{changed}; put the old one back to resume the run, or give another --name to begin a new one"
            )


def is_same(run: Path, config: RunConfig, name: str) -> bool:
    """Whether the files that a setting names now have the content with which the run began."""
    known = load(run)
    if name == "model.path":
        return FROZEN in known  # the numbers are compared when they are read
    return name in known and name in (named := input_files(config)) and known[name] == digest(*named[name])


def _own(run: Path) -> list[str]:
    folders = [run / TOKENIZER, run / MODEL]
    return [
        "config.json",
        *(f"{folder.name}/{file.name}" for folder in folders if folder.is_dir() for file in sorted(folder.iterdir())),
    ]


def digest(root: Path, files: Sequence[Path]) -> str:
    """sha256 of the names (relative to `root`) and contents of files.

    Raises:
        ConfigError: one of them cannot be read.
    """
    try:
        with ThreadPoolExecutor(8) as threads:  # a network file system answers several requests at a time
            contents = list(threads.map(_content, files))
    except OSError as error:
        raise ConfigError(f"cannot read {error.filename}: {error.strerror}") from None
    names = [os.path.relpath(file, root) for file in files]
    return hashlib.sha256(json.dumps(list(zip(names, contents, strict=True))).encode()).hexdigest()


def _content(path: Path) -> str:
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size <= WHOLE_BYTES:
            return hashlib.file_digest(file, "sha256").hexdigest()
        blocks = hashlib.sha256(str(size).encode())
        for block in range(_BLOCKS):
            file.seek((size - _BLOCK_BYTES) * block // (_BLOCKS - 1))
            blocks.update(file.read(_BLOCK_BYTES))
        return blocks.hexdigest()
