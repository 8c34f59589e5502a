"""An environment server as a child process: started on a free port, heard when it fails, gone when its parent is."""

import asyncio
import contextlib
import json
import os
import shlex
import signal
import socket
import sys
from collections.abc import Mapping
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
"""Becomes the command given, which on Linux the kernel kills (9) when its parent ends (PR_SET_PDEATHSIG, 1)."""


class ServerProcess:
    """One running server; made by `start`.

    Attributes:
        pid: its process id, and that of its process group.
        port: where it listens, on localhost.
    """

    def __init__(self, process: asyncio.subprocess.Process, said: asyncio.StreamReader | None):
        assert said
        self._process = process
        self._tail = b""
        self._reader = asyncio.ensure_future(self._read(said))
        self.pid = process.pid
        self.port = 0

    @classmethod
    async def start(
        cls, name: str, settings: Mapping[str, Any], *, sessions: int, send_admissible: bool, timeout_s: float
    ) -> "ServerProcess":
        """Starts a server and waits until it accepts connections.

        It is a fresh interpreter, no fork (this process may hold an accelerator), in a session of its own (Ctrl-C is
        for the training to answer), and the kernel picks the port, so that two pools cannot clash.

        Args:
            name: an environment of the table, or the path of one.
            settings: its settings.
            sessions: most sessions at once.
            send_admissible: whether observations carry the admissible actions.
            timeout_s: seconds until it must be up.

        Raises:
            EnvError: it ended or was not up in time; with the end of its stderr.
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
        server = cls(process, process.stderr)
        try:
            async with asyncio.timeout(timeout_s):
                port = await _announced(process.stdout)
            if port is None:
                status = await asyncio.wait_for(process.wait(), timeout_s)
                await server.kill()  # what it left behind; and wait for its last words
                raise EnvError(f"environment server {name!r} did not start ({describe_exit(status)}){server.tail()}")
        except TimeoutError:
            await server.kill()
            raise EnvError(f"environment server {name!r} was not up in {timeout_s:g} s{server.tail()}") from None
        except BaseException:
            await server.kill()
            raise
        server.port = port
        return server

    @classmethod
    async def start_command(cls, command: str, *, timeout_s: float) -> "ServerProcess":
        """Starts somebody else's server and waits until it accepts connections.

        Args:
            command: what to run, as in a shell but without one; `{port}` becomes a free port.
            timeout_s: seconds until it must be up.

        Raises:
            EnvError: it cannot be run, ended, or was not up in time; with the end of what it said.
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
        server = cls(process, process.stdout)
        server.port = port
        try:
            async with asyncio.timeout(timeout_s):
                while not await _accepts(port):
                    if process.returncode is not None:
                        await server.kill()  # what it left behind; and wait for its last words
                        status = describe_exit(process.returncode)
                        raise EnvError(f"environment server {command!r} did not start ({status}){server.tail()}")
                    await asyncio.sleep(0.05)
        except TimeoutError:
            await server.kill()
            raise EnvError(f"environment server {command!r} was not up in {timeout_s:g} s{server.tail()}") from None
        except BaseException:
            await server.kill()
            raise
        return server

    async def wait(self) -> int:
        """Waits until the process has ended; returns its exit status (negative: the signal)."""
        return await self._process.wait()

    async def kill(self) -> None:
        """Kills the process, stopped or not, with all that it started, and waits."""
        self._signal_group(signal.SIGKILL)
        await self._process.wait()
        await asyncio.wait([self._reader], timeout=1.0)

    async def stop(self, timeout_s: float) -> None:
        """Asks the process to end, and kills what is left of it after that."""
        self._signal_group(signal.SIGTERM)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._process.wait(), timeout_s)
        await self.kill()

    def tail(self) -> str:
        """The end of what it said, to be appended to an error message."""
        text = self._tail.decode(errors="replace").strip()
        return f"; it said:\n{text}" if text else ""

    def _signal_group(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):  # ended already; macOS says the second
            os.killpg(self.pid, number)

    async def _read(self, said: asyncio.StreamReader) -> None:
        while chunk := await said.read(4096):
            self._tail = (self._tail + chunk)[-_TAIL_BYTES:]


async def _announced(lines: asyncio.StreamReader) -> int | None:
    """The port in the first line that has one; None if there is none. A site's start-up code may print before it."""
    async for line in lines:
        with contextlib.suppress(ValueError, TypeError, KeyError):
            return int(json.loads(line)["port"])
    return None


async def _accepts(port: int) -> bool:
    """Whether something listens on the port of this machine."""
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return False
    writer.close()
    return True


def describe_exit(status: int) -> str:
    """An exit status in words."""
    return f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
