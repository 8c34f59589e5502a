"""Random damage to presets, saved configs and task files gives a one-line error or a value, no other error."""

import dataclasses
import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from aem_jax.config import saved
from aem_jax.config.presets import read_preset
from aem_jax.config.run import RunConfig
from aem_jax.envs.openenv.suite import _read

SEEDS = 200
PIECES = (
    b"\x00",
    b"\xff",
    b"\xef\xbb\xbf",
    b"[",
    b"{",
    b'"',
    b"NaN",
    b"1e999",
    b"\\ud83d",
    b"null",
    b"\n",
    b"-1",
    b"[" * 5000,
)


def damaged(data: bytes, seed: int) -> bytes:
    """The bytes with one to three places cut, doubled, flipped or replaced."""
    rng = random.Random(seed)
    for _ in range(rng.randint(1, 3)):
        start = rng.randrange(len(data) + 1)
        end = min(len(data), start + rng.choice((0, 1, 8, 200)))
        kind = rng.randrange(5)
        if kind == 0:
            data = data[:start]
        elif kind == 1:
            data = data[:start] + data[start:end] * 2 + data[end:]
        elif kind == 2 and start < len(data):
            data = data[:start] + bytes([data[start] ^ 1 << rng.randrange(8)]) + data[start + 1 :]
        else:
            data = data[:start] + rng.choice(PIECES) + data[end:]
    return data


def preset(folder: Path) -> tuple[Path, Callable[[], object]]:
    path = folder / "mine.toml"
    path.write_text('seed = 3\nenvironment = "openenv"\n[train]\nnum_steps = 7\n[mesh]\nfsdp = -1\n', encoding="utf-8")
    return path, lambda: read_preset(str(path))


def run_config(folder: Path) -> tuple[Path, Callable[[], object]]:
    saved.save(dataclasses.replace(RunConfig(), name="mine"), folder)
    return folder / saved.FILE, lambda: saved.load(folder)


def tasks(folder: Path) -> tuple[Path, Callable[[], object]]:
    path = folder / "tasks.jsonl"
    rows = [{"seed": seed, "text": "a\u2028b é", "list": [1.5, None]} for seed in range(3)]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path, lambda: _read(str(path), {})


@pytest.mark.parametrize("make", [preset, run_config, tasks])
def test_damage_is_one_line(make, tmp_path: Path):
    path, read = make(tmp_path)
    content, right = path.read_bytes(), read()
    refused = 0
    for seed in range(SEEDS):
        path.write_bytes(damaged(content, seed))
        try:
            json.dumps(read(), default=vars, ensure_ascii=False).encode()
        except ValueError as error:
            refused += 1
            assert str(error).strip() and path.name in str(error), (seed, error)
            assert "\n" not in str(error), (seed, error)
    assert refused > SEEDS // 4
    path.write_bytes(content)
    assert read() == right


def test_a_row_with_nan_is_named_by_file_and_line(tmp_path: Path):
    path = tmp_path / "tasks.jsonl"
    path.write_text('{"seed": 1}\n\n{"seed": 2, "level": NaN}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"tasks\.jsonl line 3: .*NaN"):
        _read(str(path), {})


@pytest.mark.parametrize("seed", [-1, 2**32, 2**64])
def test_a_seed_that_a_key_cannot_hold_is_refused(seed: int):
    with pytest.raises(ValueError, match="expected seed from 0 to 4294967295"):
        RunConfig(seed=seed)
