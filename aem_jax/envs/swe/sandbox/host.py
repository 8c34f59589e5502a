"""This host: its processors, memory and disk, its processes, and a folder that the processes of a user share."""

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from aem_jax.envs.swe.sandbox.workspace import SandboxError


@dataclass(frozen=True)
class Resource:
    """An amount of one resource: what the host has, and what is free of it now."""

    total: float
    free: float


def measure(disk_at: str = "") -> dict[str, Resource]:
    """Measures this host: affinity, memory, control groups, and the disk of a folder.

    Args:
        disk_at: a folder on the disk; empty leaves it out.

    Returns:
        The resources by name.
    """
    cpus = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free = _meminfo().get("MemAvailable", total)
    for group in _control_groups("cpu"):
        quota, _, period = _text(group / "cpu.max").partition(" ")
        quota, period = quota or _text(group / "cpu.cfs_quota_us"), period or _text(group / "cpu.cfs_period_us")
        if quota.strip().isdigit() and period.strip().isdigit():  # without a limit: max or -1
            cpus = min(cpus, int(quota) / int(period))
    for group in _control_groups("memory"):
        limit = (_text(group / "memory.max") or _text(group / "memory.limit_in_bytes")).strip()
        if limit.isdigit():
            stats = dict(line.split() for line in _text(group / "memory.stat").splitlines())
            used = int(_text(group / "memory.current") or _text(group / "memory.usage_in_bytes") or 0)
            cached = int(stats.get("total_inactive_file") or stats.get("inactive_file", 0))
            total, free = min(total, int(limit)), min(free, int(limit) - used + cached)
    resources = {"cpus": Resource(cpus, cpus), "memory_mib": Resource(total / 2**20, max(free, 0) / 2**20)}
    if disk_at:
        usage = shutil.disk_usage(disk_at)
        resources[f"disk_mib of {disk_at}"] = Resource(usage.total / 2**20, usage.free / 2**20)
    return resources


def user_folder() -> Path:
    """Returns a folder for files that this user's processes share, below the folder of temporary files.

    Raises:
        SandboxError: it belongs to another user.
    """
    folder = Path(tempfile.gettempdir()) / f"aem_jax-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise SandboxError(f"expected {folder} as a folder of this user, got one of another; remove it, or set TMPDIR")
    return folder


@contextlib.contextmanager
def locked(path: Path) -> Iterator[IO[str]]:
    """Holds an exclusive lock on a file, which it creates; other threads and processes wait."""
    with path.open("w", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file


def start_time(pid: int) -> int:
    """Returns when a process started, in ticks since the boot: a later process of the same id differs. 0 if unknown."""
    text = _text(Path(f"/proc/{pid}/stat"))
    return int(text.rpartition(") ")[2].split()[19]) if text else 0


def is_alive(pid: int, start: int) -> bool:
    """Whether the process that had this id and start time still runs."""
    if os.path.isdir("/proc/self"):
        return start_time(pid) == start
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def namespace() -> int:
    """Returns the namespace in which process ids of this process mean something."""
    try:
        return os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return 0


def owner() -> str:
    """Returns a name of this process that no later process has: its id, start time and namespace."""
    return f"{os.getpid()}-{start_time(os.getpid())}-{namespace()}"


def is_orphan(name: str) -> bool:
    """Whether the process that an `owner` names has ended; False for one of another namespace."""
    parts = name.split("-")
    if len(parts) != 3 or not all(part.isdigit() for part in parts) or int(parts[2]) != namespace():
        return False
    return not is_alive(int(parts[0]), int(parts[1]))


def _meminfo() -> dict[str, int]:
    lines = (line.split() for line in _text(Path("/proc/meminfo")).splitlines())
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines}


def _control_groups(controller: str) -> Sequence[Path]:
    """Returns the folders of this process's control group and of those above it, in version 1 or 2."""
    folders: list[Path] = []
    for line in _text(Path("/proc/self/cgroup")).splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers or controller in controllers.split(","):
            root = Path("/sys/fs/cgroup") / (controller if controllers else "")
            group = root / path.lstrip("/")
            folders += [folder for folder in (group, *group.parents) if folder.is_relative_to(root)]
    return folders


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
