"""The lock of a folder: one named holder, free after a crash, decided between machines by changes of the lock file."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from aem_jax.checkpoint import lock
from aem_jax.checkpoint.lock import FolderLock, LockedError

ROOT = Path(__file__).resolve().parents[2]
HOLD = """
import sys, time
from pathlib import Path
from aem_jax.checkpoint.lock import FolderLock
held = FolderLock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lock, "REFRESH_S", 0.02)
    monkeypatch.setattr(lock, "PATIENCE_S", 1.0)
    monkeypatch.setattr(lock, "SETTLE_S", 0.05)


def elsewhere(path: Path) -> None:
    """Writes the lock's content as a process on another machine would."""
    path.write_text(json.dumps({"pid": 7, "host": "node3", "since": "noon", "machine": "another", "token": "x"}))


def test_one_process_holds_the_lock_until_it_releases_it(tmp_path: Path):
    path = tmp_path / "lock"
    first = FolderLock(path)
    with pytest.raises(LockedError, match=rf"process {os.getpid()} on .* \(since \d{{4}}-"):
        FolderLock(path)
    first.check()
    first.release()
    assert path.read_text() == ""
    FolderLock(path).release()


def test_a_killed_process_releases_the_lock_at_once(tmp_path: Path, user_environment):
    environment = {**user_environment, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", HOLD, str(tmp_path / "lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout and process.stdout.readline() == "held\n"
        with pytest.raises(LockedError, match=f"process {process.pid} on"):
            FolderLock(tmp_path / "lock")
        os.kill(process.pid, signal.SIGKILL)
    watched: list[str] = []
    FolderLock(tmp_path / "lock", watched.append).release()
    assert not watched  # the kernel's lock is certain on this machine


def test_a_holder_on_another_machine_is_watched(tmp_path: Path):
    path, watched, ended = tmp_path / "lock", [], threading.Event()
    elsewhere(path)

    def refresh() -> None:
        while not ended.wait(0.05):
            os.utime(path)

    thread = threading.Thread(target=refresh)
    thread.start()
    try:
        with pytest.raises(LockedError, match=r"process 7 on node3 \(since noon\)"):
            FolderLock(path, watched.append)
    finally:
        ended.set()
        thread.join()
    assert watched == ["process 7 on node3 (since noon)"]
    FolderLock(path).release()  # the file no longer changes


def test_the_holder_refreshes_the_lock_file(tmp_path: Path):
    held = FolderLock(tmp_path / "lock")
    first = (tmp_path / "lock").stat().st_mtime_ns
    deadline = time.monotonic() + 60
    while (tmp_path / "lock").stat().st_mtime_ns == first:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    held.release()


def test_without_a_kernel_lock_refreshes_decide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def none(file: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(lock.fcntl, "flock", none)
    held = FolderLock(tmp_path / "lock")
    with pytest.raises(LockedError, match=f"process {os.getpid()} on"):
        FolderLock(tmp_path / "lock")
    held.release()
    FolderLock(tmp_path / "lock").release()


def test_a_lost_lock_is_detected(tmp_path: Path):
    held = FolderLock(tmp_path / "lock")
    elsewhere(tmp_path / "lock")
    with pytest.raises(LockedError, match="process 7 on node3"):
        held.check()
    held.release()
    assert "node3" in (tmp_path / "lock").read_text()  # the lock of another holder is not emptied
