"""Writing a model: links are followed, an existing folder is kept, and no partial output remains."""

import os
from pathlib import Path

import pytest
from safetensors import SafetensorError

from aem_jax.models.pretrained import new_folder


def write(folder: Path) -> None:
    with new_folder(folder) as partial:
        (partial / "config.json").write_text("{}")
        (partial / "model.safetensors").write_text("numbers")


def written(folder: Path) -> bool:
    return {"config.json", "model.safetensors"} <= {path.name for path in folder.iterdir()}


def test_a_new_folder_and_its_parents(tmp_path: Path):
    write(tmp_path / "a" / "b" / "out")
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["out"] and written(tmp_path / "a" / "b" / "out")


@pytest.mark.parametrize("inside", [(), ("lost+found",), (".partial",)])
def test_an_empty_folder_stays_the_same_one(tmp_path: Path, inside: tuple[str, ...]):
    out = tmp_path / "out"  # like a mount point, which cannot be replaced by another folder
    out.mkdir()
    for name in inside:  # made by the file system, or left by a killed export
        (out / name).mkdir()
        (out / name / "old").write_text("")
    before = out.stat().st_ino
    write(out)
    assert out.stat().st_ino == before and written(out)
    assert not (out / ".partial").exists() and [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("there", [True, False])
def test_a_link_is_followed(tmp_path: Path, there: bool):
    disk = tmp_path / "disk"
    disk.mkdir()
    if there:
        (disk / "big").mkdir()
    (tmp_path / "out").symlink_to(disk / "big")
    write(tmp_path / "out")
    assert (tmp_path / "out").is_symlink() and written(disk / "big")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "out"]


def test_the_working_folder_stays_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    write(Path("."))
    assert written(tmp_path) and written(Path.cwd())


def test_what_cannot_be_written_to_is_refused(tmp_path: Path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("")
    (tmp_path / "file").write_text("")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    for name in ("full", "file", "circle", "file/inside"):
        with pytest.raises((ValueError, OSError), match=name.partition("/")[0]) as caught:
            write(tmp_path / name)
        assert "\n" not in str(caught.value)
    assert (tmp_path / "full" / "mine").exists() and (tmp_path / "file").read_text() == ""


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("error", [OSError("full"), SafetensorError("full"), KeyboardInterrupt()])
def test_nothing_half_is_left(tmp_path: Path, there: bool, error: BaseException):
    if there:
        (tmp_path / "out").mkdir()
    with pytest.raises((OSError, KeyboardInterrupt)), new_folder(tmp_path / "out") as partial:
        (partial / "config.json").write_text("{}")
        raise error
    assert [os.path.relpath(path, tmp_path) for path in tmp_path.rglob("*")] == (["out"] if there else [])
