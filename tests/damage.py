"""Seeded random damage to files, as disks, copies and people cause it."""

import random
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

Damage = Callable[[Path, random.Random], None]
"""Changes one file, or its folder."""


def truncate(file: Path, rng: random.Random) -> None:
    file.write_bytes(file.read_bytes()[: rng.randrange(file.stat().st_size + 1)])


def zero(file: Path, rng: random.Random) -> None:
    """Replaces the content by zeros, like a block that was allocated and never written."""
    file.write_bytes(bytes(file.stat().st_size))


def zero_block(file: Path, rng: random.Random) -> None:
    data = bytearray(file.read_bytes())
    start = rng.randrange(len(data) + 1)
    data[start : start + 64] = bytes(len(data[start : start + 64]))
    file.write_bytes(data)


def flip_bit(file: Path, rng: random.Random) -> None:
    data = bytearray(file.read_bytes())
    if data:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    file.write_bytes(data)


def replace_byte(file: Path, rng: random.Random) -> None:
    """Replaces one byte by a printable one, so a number may stay a number."""
    data = bytearray(file.read_bytes())
    if data:
        data[rng.randrange(len(data))] = rng.choice(b'0123456789-+.eE"{}[],: \nnull')
    file.write_bytes(data)


def insert_text(file: Path, rng: random.Random) -> None:
    data = file.read_bytes()
    at = rng.randrange(len(data) + 1)
    text = rng.choice([b"<<<<<<< HEAD\n", b"\xef\xbb\xbf", b"\x00", b"NaN", b"\xff\xfe", b"\r\n", "ü".encode(), b"]}"])
    file.write_bytes(data[:at] + text + data[at:])


def append_garbage(file: Path, rng: random.Random) -> None:
    file.write_bytes(file.read_bytes() + rng.randbytes(rng.randrange(1, 200)))


def duplicate_part(file: Path, rng: random.Random) -> None:
    data = file.read_bytes()
    first, last = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    file.write_bytes(data[:last] + data[first:])


def empty(file: Path, rng: random.Random) -> None:
    file.write_bytes(b"")


def delete(file: Path, rng: random.Random) -> None:
    file.unlink()


def delete_folder(file: Path, rng: random.Random) -> None:
    shutil.rmtree(file.parent)


def empty_folder(file: Path, rng: random.Random) -> None:
    shutil.rmtree(file.parent)
    file.parent.mkdir()


def file_for_folder(file: Path, rng: random.Random) -> None:
    shutil.rmtree(file.parent)
    file.parent.write_text("a file")


def folder_for_file(file: Path, rng: random.Random) -> None:
    file.unlink()
    file.mkdir()


def swap(file: Path, rng: random.Random) -> None:
    """Exchanges the contents of two files of the folder."""
    others = sorted(path for path in file.parent.rglob("*") if path.is_file())
    other = rng.choice(others)
    mine, theirs = file.read_bytes(), other.read_bytes()
    file.write_bytes(theirs)
    other.write_bytes(mine)


def stray(file: Path, rng: random.Random) -> None:
    name = rng.choice(["notes.txt", ".DS_Store", "9", "copy of 2", ".nfs000000000001", "2.tmp", file.name + "~"])
    neighbour = file.with_name(name)
    if not neighbour.exists():
        neighbour.mkdir() if rng.random() < 0.5 else neighbour.write_bytes(rng.randbytes(20))


DAMAGES: Mapping[str, Damage] = {
    change.__name__: change
    for change in (
        *(truncate, zero, zero_block, flip_bit, replace_byte, insert_text, append_garbage, duplicate_part, empty),
        *(delete, delete_folder, empty_folder, file_for_folder, folder_for_file, swap, stray),
    )
}


def snapshot(folder: Path) -> dict[Path, bytes]:
    """The files of a folder, for `put_back` to restore."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def put_back(folder: Path, files: Mapping[Path, bytes]) -> None:
    """Restores a damaged folder. This is cheaper than a copy for each seed, because few files changed."""
    folders = {parent for file in files for parent in file.parents}
    for path in sorted(folder.rglob("*"), reverse=True):  # contents before their folder
        if path.is_dir() and path not in folders:
            path.rmdir()
        elif not path.is_dir() and path not in files:
            path.unlink()
    for file, content in files.items():
        if not file.exists() or file.read_bytes() != content:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)


def damage(folder: Path, seed: int, files: Callable[[Path], bool] = lambda file: True) -> str:
    """Damages one file of a folder. Returns a description of the damage for the message of a failing test.

    Args:
        folder: to be damaged.
        seed: draws the file and the damage.
        files: whether a file may be drawn.
    """
    rng = random.Random(seed)
    file = rng.choice(sorted(path for path in folder.rglob("*") if path.is_file() and files(path)))
    name = rng.choice(sorted(DAMAGES))
    if file.parent == folder and name in ("delete_folder", "empty_folder", "file_for_folder"):
        name = "delete"
    DAMAGES[name](file, rng)
    return f"seed {seed}: {name} {file.relative_to(folder)}"
