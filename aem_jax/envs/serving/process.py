"""An environment server as a child process on a free port. Its last output is kept, and it ends with its parent."""

import asyncio
import contextlib
import json
import os
import shlex
import signal
import socket
import sys
from collections.abc import Coroutine, Mapping
from pathlib import Path
from typing import Any

import aem_jax
from aem_jax.envs.protocol import EnvError

_TAIL_BYTES = 4000

_WITH_PARENT = """
import ctypes, os, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, 9)
try:
    os.execvp(sys.argv[1], sys.argv[1:])
except OSError as error:
    sys.exit(f"{sys.argv[1]}: {error}")
"""
"""Replaces itself by the given command, which Linux kills (9) when its parent ends (PR_SET_PDEATHSIG, 1)."""


class ServerProcess:
    """One running server, created by `start` or `start_command`.

    Attributes:
        pid: process id, and id of the process group.
        port: port on localhost.
    """

    def __init__(self, process: asyncio.subprocess.Process, output: asyncio.StreamReader | None):
        assert output
        self._process = process
        self._tail = b""
        self._reader = asyncio.ensure_future(self._read(output))
        self.pid = process.pid
        self.port = 0

    @classmethod
    async def start(
        cls, name: str, settings: Mapping[str, Any], *, sessions: int, send_admissible: bool, timeout_s: float
    ) -> "ServerProcess":
        """Starts a server and waits until it accepts connections.

        The server is a new interpreter, not a fork, because this process may use an accelerator. It has its own process
        session, so that Ctrl-C reaches only the training. The kernel chooses the port, so that pools do not collide.

        Args:
            name: an environment of the registry, or the path of one.
            settings: settings of the environment.
            sessions: maximum number of sessions.
            send_admissible: whether observations contain the admissible actions.
            timeout_s: maximum duration of the start, seconds.

        Raises:
            EnvError: the server ended, or was not up in time. The message contains the end of its stderr.
        """
        command = [sys.executable, "-m", "aem_jax.envs.serving.server", name, "--settings", json.dumps(dict(settings))]
        command += ["--port", "0", "--sessions", str(sessions), "--with-parent"]
        command += ["--send-admissible"] if send_admissible else []
        roots = [str(Path(aem_jax.__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, roots))}
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(
            *command, stdin=pipe, stdout=pipe, stderr=pipe, env=environment, start_new_session=True
        )
        assert process.stdout
        return await cls(process, process.stderr)._started(name, _announced_port(process.stdout), timeout_s)

    @classmethod
    async def start_command(cls, command: str, *, timeout_s: float) -> "ServerProcess":
        """Starts a server of another package, and waits until it accepts connections.

        Args:
            command: words as in a shell, run without a shell; `{port}` becomes a free port.
            timeout_s: maximum duration of the start, seconds.

        Raises:
            EnvError: the command ended, or was not up in time. The message contains the end of its output.
        """
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        words = [word.replace("{port}", str(port)) for word in shlex.split(command)]
        pipe, where = asyncio.subprocess.PIPE, asyncio.subprocess.STDOUT
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", _WITH_PARENT, *words),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=pipe,
            stderr=where,
            start_new_session=True,
        )
        return await cls(process, process.stdout)._started(command, _listening_port(process, port), timeout_s)

    async def _started(self, name: str, starting: Coroutine[Any, Any, int | None], timeout_s: float) -> "ServerProcess":
        """Waits for the server's port, which `starting` returns; None means that the process ended or closed stdout."""
        try:
            async with asyncio.timeout(timeout_s):
                port = await starting
                if port is None:
                    status = await self.wait()
                    await self.kill()  # ends what it left behind, and waits for its last output
                    raise EnvError(f"environment server {name!r} did not start ({describe_exit(status)}){self.tail()}")
        except TimeoutError:
            await self.kill()
            raise EnvError(f"environment server {name!r} was not up in {timeout_s:g} s{self.tail()}") from None
        except BaseException:
            await self.kill()
            raise
        self.port = port
        return self

    async def wait(self) -> int:
        """Waits for the end of the process; returns its exit status (negative: the signal)."""
        return await self._process.wait()

    async def kill(self) -> None:
        """Kills the process group, stopped or not, and waits."""
        self._signal_group(signal.SIGKILL)
        await self._process.wait()
        await asyncio.wait([self._reader], timeout=1.0)

    async def stop(self, timeout_s: float) -> None:
        """Terminates the process, and kills the rest of its group."""
        self._signal_group(signal.SIGTERM)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._process.wait(), timeout_s)
        await self.kill()

    def tail(self) -> str:
        """Returns the end of the output, as a suffix for an error message."""
        text = self._tail.decode(errors="replace").strip()
        return f"; output:\n{text}" if text else ""

    def _signal_group(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):  # it has ended; macOS raises the second
            os.killpg(self.pid, number)

    async def _read(self, output: asyncio.StreamReader) -> None:
        while chunk := await output.read(4096):
            self._tail = (self._tail + chunk)[-_TAIL_BYTES:]


async def _announced_port(lines: asyncio.StreamReader) -> int | None:
    """Returns the port in the first line that contains one, or None. Start-up code may print other lines."""
    async for line in lines:
        with contextlib.suppress(ValueError, TypeError, KeyError):
            return int(json.loads(line)["port"])
    return None


async def _listening_port(process: asyncio.subprocess.Process, port: int) -> int | None:
    """Waits until something listens on a port of this machine; returns None if the process ends before that."""
    while True:
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.close()
            return port
        except OSError:
            if process.returncode is not None:
                return None
            await asyncio.sleep(0.05)


def describe_exit(status: int) -> str:
    """Describes an exit status in words."""
    return f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
