"""Random damage to a model's folder gives a one-line error that names it, or the right result.

The right result is that of the undamaged folder. For a damaged config.json it is the config that transformers reads.
Damage to the numbers themselves is not tested: safetensors has no checksum.
"""

import json
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from transformers_config import in_transformers

from aem_jax.files import parse_json
from aem_jax.models import ModelConfig, from_pretrained, save_pretrained
from aem_jax.models.pretrained import Pretrained

GOLDEN = Path(__file__).resolve().parent / "golden"
TIMES = 200
JUNK: tuple[Any, ...] = (
    None,
    True,
    [],
    {},
    "",
    "x" * 300,
    -1,
    0,
    10**12,
    1e300,
    -0.5,
    [[{"a": [None]}]],
    {"b": {"c": 1}},
)


def header_end(content: bytes) -> int:
    """The offset of the numbers in a safetensors file; for other files, their end."""
    if len(content) < 8 or content[8:9] != b"{":
        return len(content)
    return 8 + struct.unpack("<Q", content[:8])[0]


def truncated(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.randrange(len(content))]


def zeroed(content: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(header_end(content))
    stop = min(start + rng.choice((1, 8, 64, 10**6)), header_end(content))
    return content[:start] + bytes(stop - start) + content[stop:]


def flipped(content: bytes, rng: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8))):
        changed[rng.randrange(header_end(content))] = rng.randrange(256)
    return bytes(changed)


def garbage(content: bytes, rng: random.Random) -> bytes:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"
    return rng.choice((b"", b"\x00" * 64, rng.randbytes(200), b"null", b"[" * 5000, b"<html>404</html>", pointer))


def another_value(content: bytes, rng: random.Random) -> bytes:
    """JSON, that of a safetensors header included, with a value at any depth replaced, left out, or there twice."""
    end = header_end(content)
    start = 8 if end < len(content) else 0
    try:
        value = json.loads(content[start:end])
    except ValueError:
        return flipped(content, rng)
    holder, depth = value, rng.randrange(1, 4)
    while True:
        keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        key, depth = rng.choice(keys), depth - 1
        if depth == 0 or not isinstance(holder[key], dict | list) or not holder[key]:
            break
        holder = holder[key]
    action = rng.randrange(4)
    if action == 0:
        del holder[key]
    elif action == 1 and isinstance(holder, dict):
        holder[rng.choice(keys)] = holder[key]
    else:
        holder[key] = rng.choice(JUNK)
    changed = json.dumps(value).encode()
    return (struct.pack("<Q", len(changed)) if start else b"") + changed + content[end:]


CHANGES: tuple[Callable[[bytes, random.Random], bytes], ...] = (truncated, zeroed, flipped, garbage, another_value)


def damage(folder: Path, rng: random.Random) -> str:
    """Damages a folder in one of many ways; returns a description."""
    files = sorted(folder.iterdir())
    file = rng.choice(files)
    action = rng.randrange(8)
    if action == 0:
        file.unlink()
        return f"deleted {file.name}"
    if action == 1:
        other = rng.choice(files)
        one, two = file.read_bytes(), other.read_bytes()
        file.write_bytes(two)
        other.write_bytes(one)
        return f"swapped {file.name} and {other.name}"
    if action == 2:
        name = rng.choice(("model.safetensors", "extra.safetensors", "model.safetensors.index.json", "config.json"))
        shutil.copy(file, folder / name) if file.name != name else (file.unlink(), file.mkdir())
        return f"copied {file.name} to {name}"
    change = rng.choice(CHANGES)
    file.write_bytes(change(file.read_bytes(), rng))
    return f"{change.__name__} {file.name}"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Pretrained]:
    """A tied model in one file, and an untied model in several files, read before any damage."""
    folder = tmp_path_factory.mktemp("models")
    llama = from_pretrained(GOLDEN / "llama", dtype="float32")
    save_pretrained(folder / "parts", llama.config, llama.params, max_file_bytes=40_000)
    save_pretrained(
        folder / "one", (tied := from_pretrained(GOLDEN / "qwen2-tied", dtype="float32")).config, tied.params
    )
    return [from_pretrained(folder / name, dtype="float32") for name in ("parts", "one")]


def is_one_line(error: Exception, folder: Path) -> bool:
    return isinstance(error, ValueError) and str(folder) in str(error) and not set("\n\r") & set(str(error))


def reading(file: Path) -> ModelConfig | None:
    """The config that transformers reads from a config.json, if it can."""
    try:
        return ModelConfig(**in_transformers(parse_json(file.read_bytes(), "")), dtype="float32")
    except Exception:  # of any type
        return None


@pytest.mark.parametrize("only_config", [True, False])
def test_a_damaged_folder_is_refused_in_one_line_or_read_right(only_config: bool, models: list[Pretrained], tmp_path):
    right = refused = 0
    for seed in range(TIMES):
        rng, model = random.Random(seed), models[seed % 2]
        assert model.source is not None
        folder = Path(shutil.copytree(model.source, tmp_path / f"{only_config}-{seed}"))
        if only_config:
            change = rng.choice((*CHANGES, flipped, another_value, another_value))
            (folder / "config.json").write_bytes(change((folder / "config.json").read_bytes(), rng))
            what = f"seed {seed}: {change.__name__} config.json"
        else:
            what = f"seed {seed}: {damage(folder, rng)}"
        try:
            loaded = from_pretrained(folder, dtype="float32")
        except Exception as error:
            assert is_one_line(error, folder), f"{what}: {error!r}"
            refused += 1
            continue
        assert loaded.config in (model.config, reading(folder / "config.json")), what
        same = jax.tree.map(np.array_equal, loaded.params, model.params)
        assert all(jax.tree.leaves(same)), f"{what}: {same}"
        right += 1
    assert right >= 20 and refused >= 100, (right, refused)
