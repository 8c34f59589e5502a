"""Text and JSON in files: UTF-8 in every locale, and one-line errors that name the file.

This module handles three cases that Python's own readers leave to the caller.
`str.splitlines` splits at U+2028, U+0085 and others, which JSON allows inside a string. Here, lines end only at `\\n`.
`json.loads` accepts NaN and Infinity, which are not JSON, and reads 1e999 as infinity. Here, these are refused.
JSON can contain half of a surrogate pair (`"\\ud83d"`), which no encoding can write. Here, it becomes U+FFFD.
"""

import json
import math
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

_LFS_POINTER = b"version https://git-lfs"


def user_cache(name: str) -> Path:
    """The folder of this package in the user's cache: $XDG_CACHE_HOME/aem_jax/NAME, or ~/.cache/aem_jax/NAME."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "aem_jax" / name


def valid_text(text: str) -> str:
    """Replaces each unpaired surrogate of a text by U+FFFD, and joins halves that form a pair."""
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def valid_json(value: Any) -> Any:
    """Applies `valid_text` to every string and every key in a value that `json.loads` returned."""
    if isinstance(value, str):
        return valid_text(value)
    if isinstance(value, list):
        return [valid_json(item) for item in value]
    if isinstance(value, dict):
        return {valid_text(key): valid_json(item) for key, item in value.items()}
    return value


def parse_json(text: str | bytes, source: str) -> Any:
    """Parses a JSON text. All strings in the value are valid texts.

    Args:
        text: JSON text; bytes are decoded as UTF-8. A leading byte order mark is removed.
        source: source of the text; the error message begins with it.

    Raises:
        ValueError: the text is not JSON, contains NaN, Infinity or a number beyond the range of floats, is not UTF-8,
            or is nested too deeply.
    """
    try:
        decoded = text.decode("utf-8-sig") if isinstance(text, bytes) else text.removeprefix("\ufeff")
        value = json.loads(decoded, parse_constant=_refuse_constant, parse_float=_finite)
        # Only an escape can produce half a pair; UTF-8 cannot.
        return valid_json(value) if "\\u" in decoded or isinstance(text, str) else value
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{source}: expected text in UTF-8, got byte {error.object[error.start]:#04x} at {error.start}"
        ) from None
    except json.JSONDecodeError as error:
        got = "nothing" if not decoded.strip() else f"{error.msg} at line {error.lineno} column {error.colno}"
        raise ValueError(f"{source}: expected JSON, got {got}") from None
    except RecursionError:
        raise ValueError(f"{source}: expected JSON, got values nested too deeply to read") from None
    except ValueError as error:  # a constant, or an integer of thousands of digits
        raise ValueError(f"{source}: {error}") from None


def parse_mapping(text: str, name: str) -> dict[str, Any]:
    """Parses a JSON mapping in a setting.

    Args:
        text: the setting's value.
        name: the setting's name, for the error.

    Raises:
        ValueError: the text is not a JSON mapping.
    """
    refusal = f"expected {name} as a JSON mapping, got {text!r:.200}"
    try:
        value = parse_json(text, name)
    except ValueError as error:
        raise ValueError(f"{refusal}: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(refusal)
    return value


def read_text(path: Path | str) -> str:
    """Reads a file's text and keeps its line ends. A leading byte order mark is removed.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is not UTF-8.
    """
    data = Path(path).read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: expected text in UTF-8, got byte {data[error.start]:#04x} at {error.start}"
        ) from None


def read_json(path: Path | str) -> Any:
    """Reads the value of a JSON file, with the rules of `parse_json`.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is not JSON.
    """
    return parse_json(Path(path).read_bytes(), str(path))


def read_json_lines(path: Path | str) -> Iterator[tuple[int, Any]]:
    """Yields the values of a JSON-lines file with their line numbers from 1. Empty lines are skipped; CRLF is accepted.

    Raises:
        OSError: the file cannot be read.
        ValueError: a line is not JSON; the message names file and line.
    """
    with Path(path).open("rb") as file:
        for number, line in enumerate(file, start=1):
            line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if line.strip():
                yield number, parse_json(line, f"{path} line {number}")


def is_lfs_pointer(path: Path | str) -> bool:
    """Whether a file is a Git LFS pointer, the placeholder of a file that is not downloaded."""
    try:
        with Path(path).open("rb") as file:
            return file.read(len(_LFS_POINTER)) == _LFS_POINTER
    except OSError:
        return False


def write_text(path: Path | str, text: str) -> None:
    """Writes a file as UTF-8, completely or not at all."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8", newline="") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def check_writable(folder: Path) -> None:
    """Makes a folder if there is none, and a file in it that is gone afterwards.

    Raises:
        OSError: the folder or the file cannot be made.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"expected JSON, got {name}, for which JSON has no word; write null or a finite number")


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"expected numbers that a float can hold, got {text:.40}")
    return number
