"""Commands of a container engine, docker or podman, given by its name or path."""

import contextlib
import os
import select
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from typing import IO

from aem_jax.envs.swe.sandbox.execution import FILE_S
from aem_jax.envs.swe.sandbox.init_process import Cut
from aem_jax.envs.swe.sandbox.workspace import SandboxError

ENGINE_S = 600.0
"""Time limit for the engine's own work, which may include pulling an image, seconds."""


turns = threading.BoundedSemaphore(max(4, 2 * (os.cpu_count() or 1)))
"""Short commands of engines that this process runs at one time: more would slow each other until they miss their time
limits. Commands in containers, pulls and builds are not counted."""
_LONG = ("pull", "build")


def run_engine(command: Sequence[str], seconds: float = ENGINE_S) -> str:
    """Runs an engine command; returns its output.

    Raises:
        SandboxError: the command failed; the message contains the end of its output.
    """
    turn = contextlib.nullcontext() if command[1] in _LONG else turns
    with turn, tempfile.TemporaryFile() as output:
        try:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=seconds,
                cwd=tempfile.gettempdir(),  # podman's monitor writes a file there when it runs out of memory
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise SandboxError(f"{' '.join(command[:2])} failed: {error}") from None
        output.seek(0)
        words = output.read().decode(errors="replace")
    if done.returncode:
        raise SandboxError(f"{' '.join(command[:2])} failed with status {done.returncode}: {words[-1000:].strip()}")
    return words


def collect(streams: Mapping[IO[bytes], Cut], deadline: float, *, first: bool = False) -> bool:
    """Reads streams to their ends, or with `first` until the first data; False if the deadline passes earlier."""
    is_open = set(streams)
    while is_open:
        left = deadline - time.monotonic()
        if left <= 0:
            return False
        for stream in select.select(list(is_open), [], [], left)[0]:
            data = os.read(stream.fileno(), 65536)
            streams[stream].add(data)
            if first:
                return True
            if not data:
                is_open.discard(stream)
    return True


def start_container(command: Sequence[str]) -> subprocess.Popen[bytes]:
    """Starts a container whose first process prints a line, and waits for that line.

    Raises:
        SandboxError: the line did not arrive; the message contains the end of the engine's output.
    """
    pipe = subprocess.PIPE
    with turns, tempfile.TemporaryFile() as errors:
        try:
            process = subprocess.Popen(
                command, stdin=pipe, stdout=pipe, stderr=errors, cwd=tempfile.gettempdir(), start_new_session=True
            )
        except OSError as error:
            raise SandboxError(f"{' '.join(command[:2])} failed: {error}") from None
        assert process.stdout
        line = Cut(64)
        try:
            in_time = collect({process.stdout: line}, time.monotonic() + ENGINE_S, first=True)
        except BaseException:
            close_input(process)
            raise
        if line.total:
            return process
        close_input(process)
        errors.seek(0)
        reason = f"status {process.returncode}" if in_time else f"nothing within {ENGINE_S:g} s"
        words = errors.read().decode(errors="replace")[-1000:].strip()
        raise SandboxError(f"{' '.join(command[:2])} failed with {reason}: {words}")


def close_input(process: subprocess.Popen[bytes]) -> None:
    """Closes the container's standard input, which ends the container."""
    for stream in (process.stdin, process.stdout):
        assert stream
        stream.close()
    try:
        process.wait(FILE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def probe(engine: str) -> str:
    """Checks that an engine works; returns the reason why not, or an empty string."""
    if shutil.which(engine) is None:
        return f"there is no `{engine}` on the PATH"
    try:
        done = subprocess.run([engine, "info"], capture_output=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"`{engine} info` failed: {error}"
    return "" if done.returncode == 0 else f"`{engine} info` failed: {done.stderr.decode(errors='replace').strip()}"
