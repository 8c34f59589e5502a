"""Starts one bubblewrap: its command line, its descriptors, the drop of root privileges, the limits of processes."""

import contextlib
import itertools
import os
import platform
import socket
import subprocess
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from aem_jax.envs.swe.sandbox import init_process
from aem_jax.envs.swe.sandbox.execution import as_descriptor
from aem_jax.envs.swe.sandbox.mounts import SETTINGS, USER_ID, View
from aem_jax.envs.swe.sandbox.seccomp import filter_program
from aem_jax.envs.swe.sandbox.workspace import Limits

# Runs as root, in a private mount namespace: makes folders reachable, then drops root privileges.
_STAGING = """
set -e
stage=$1; user=$2; shift 2
mount -t tmpfs -o mode=0755,size=1m,nosuid,nodev stage "$stage"
i=0
while [ "$1" != -- ]; do
    mkdir "$stage/$i"; mount --bind "$1" "$stage/$i"; i=$((i + 1)); shift
done
shift
exec setpriv --reuid "$user" --regid "$user" --clear-groups --bounding-set=-all --inh-caps=-all "$@"
"""


DESCRIPTORS = 512
"""Maximum number of open files of one process."""
ADDRESS_SPACE_FACTOR = 4
"""Address space of one process, in multiples of the memory limit; interpreters reserve more memory than they use."""
_spawner: ThreadPoolExecutor | None = None


def _forget_spawner() -> None:
    global _spawner
    _spawner = None


os.register_at_fork(after_in_child=_forget_spawner)
_users = itertools.count()


def _spawn(command: Sequence[str], descriptors: Sequence[int]) -> subprocess.Popen[bytes]:
    """Starts a process from a thread that lives as long as this process: `--die-with-parent` refers to the thread."""
    global _spawner
    _spawner = _spawner or ThreadPoolExecutor(1, thread_name_prefix="bubblewrap")

    def start() -> subprocess.Popen[bytes]:
        null, pipe = subprocess.DEVNULL, subprocess.PIPE
        return subprocess.Popen(
            command, stdin=null, stdout=null, stderr=pipe, pass_fds=descriptors, cwd="/", env=OWN_ENVIRONMENT
        )

    return _spawner.submit(start).result()


OWN_ENVIRONMENT = {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C.UTF-8"}
"""Environment of bubblewrap itself; commands inside it get `mounts.SETTINGS`."""


def start_bubblewrap(
    view: View, limits: Limits, control: socket.socket, stack: contextlib.ExitStack
) -> subprocess.Popen[bytes]:
    """Starts bubblewrap with process 1 inside."""
    staged: dict[Path, str] = {}
    stage = next((folder for folder in ("/mnt", "/media", "/srv", "/opt") if os.path.isdir(folder)), "/mnt")
    if os.geteuid() == 0:
        roots = dict.fromkeys(
            b.root for b in view.binds if not b.root.is_relative_to("/usr") and b.root != Path("/etc")
        )
        staged = {root: f"{stage}/{i}" for i, root in enumerate(roots)}

    def descriptor_of(data: bytes) -> int:
        return stack.enter_context(as_descriptor(data))

    seccomp = descriptor_of(filter_program(platform.machine()))
    contents = {path: descriptor_of(data) for path, (data, _) in view.files.items()}
    binds = [(os.path.join(staged.get(bind.root, str(bind.root)), bind.part), bind.at) for bind in view.binds]
    command = bubblewrap_arguments(view, limits, binds, contents, seccomp)
    command += [
        f"{view.python}",
        "-I",
        "-S",
        "-c",
        Path(init_process.__file__).read_text(encoding="utf-8"),
        str(control.fileno()),
    ]
    if staged:
        user = str(1_900_000_000 + (os.getpid() * 16 + next(_users) % 16) % 100_000_000)
        command = [
            *("unshare", "--mount", "--propagation", "private", "--", "sh", "-c", _STAGING, "sh", stage, user),
            *(str(root) for root in staged),
            "--",
            *command,
        ]
    return _spawn(command, [control.fileno(), seccomp, *contents.values()])


def bubblewrap_arguments(
    view: View, limits: Limits, binds: Sequence[tuple[str, str]], contents: Mapping[str, int], seccomp: int
) -> list[str]:
    """Returns the command line, up to the program to run.

    Args:
        view: contents of the sandbox.
        limits: only `disk_mib` is used.
        binds: (path on the host, path inside), read-only.
        contents: path inside -> descriptor with the file's content.
        seccomp: descriptor with the filter.
    """
    eighth = limits.disk_mib * 2**20 // 8
    arguments = ["bwrap", "--unshare-user", "--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts"]
    arguments += ["--unshare-cgroup-try", "--die-with-parent", "--new-session", "--as-pid-1", "--cap-drop", "ALL"]
    arguments += ["--uid", str(USER_ID), "--gid", str(USER_ID), "--hostname", "sandbox", "--clearenv"]
    for name, value in SETTINGS.items():
        arguments += ["--setenv", name, value]
    arguments += ["--size", str(eighth), "--perms", "1777", "--tmpfs", "/tmp"]  # before the mounts that may be below it
    for source, at in binds:
        arguments += ["--ro-bind", source, at]
    for target, at in view.links:
        arguments += ["--symlink", target, at]
    for at, descriptor in contents.items():
        arguments += ["--perms", f"{view.files[at][1]:04o}", "--file", str(descriptor), at]
    for folder in view.hidden:
        arguments += ["--size", "4096", "--perms", "0555", "--tmpfs", folder, "--remount-ro", folder]
    arguments += ["--proc", "/proc", "--dev", "/dev"]
    arguments += ["--size", str(eighth), "--perms", "1777", "--tmpfs", "/dev/shm", "--remount-ro", "/dev"]
    for folder, eighths in view.folders:
        arguments += ["--size", str(eighths * eighth), "--perms", "0755", "--tmpfs", folder]
    # bubblewrap's own root and /dev are in-memory file systems without a size limit, so they are read-only
    return [*arguments, "--remount-ro", "/", "--chdir", view.folders[0][0], "--seccomp", str(seccomp), "--"]


def rlimits(limits: Limits) -> dict[str, int]:
    """Returns the limits of each single process; process 1 enforces the limits on all processes together."""
    mib = 2**20
    values = {
        "RLIMIT_AS": ADDRESS_SPACE_FACTOR * limits.memory_mib * mib,
        "RLIMIT_DATA": limits.memory_mib * mib,
        "RLIMIT_FSIZE": limits.file_mib * mib,
        "RLIMIT_CPU": limits.cpu_seconds or int(limits.seconds) + 2,
        "RLIMIT_CORE": 0,
        "RLIMIT_NOFILE": DESCRIPTORS,
        "RLIMIT_MEMLOCK": 65536,
        "RLIMIT_MSGQUEUE": 0,
        "RLIMIT_SIGPENDING": 1024,
        "RLIMIT_RTPRIO": 0,
        "RLIMIT_NICE": 0,
    }
    if os.geteuid() == 0 or _kernel() >= (5, 14):  # older kernels also count the user's processes outside
        values["RLIMIT_NPROC"] = limits.processes + 1
    return values


def _kernel() -> tuple[int, ...]:
    return tuple(int(part) for part in platform.release().split("-")[0].split(".")[:2])
