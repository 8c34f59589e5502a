"""Attempts to escape from a sandbox: each has a script and a check that the attempt failed."""

import os
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from textwrap import dedent

import aem_jax
from aem_jax.envs.swe.sandbox import seccomp
from aem_jax.envs.swe.sandbox.workspace import Limits, Outcome

LIMITS = Limits(seconds=60, memory_mib=128, processes=24, file_mib=8, disk_mib=32, output_bytes=8192)


class Host:
    """Resources that a sandbox must not reach: a file, an environment variable, a process, servers.

    Attributes:
        token: the text in the file and the variable.
        file: a file of the host, and beside it a socket.
        pid: a process of the host.
        received: the messages that reached a server.
    """

    def __init__(self, folder: Path, pid: int):
        self.token = f"secret-{os.urandom(8).hex()}"
        self.file, self.pid = folder / "secret.txt", pid
        self.file.write_text(self.token)
        self.file.chmod(0o644)
        os.environ["AEM_TEST_SECRET"] = self.token
        self.received: list[str] = []
        self.abstract = f"aem-{self.token[-8:]}"
        tcp, udp = socket.create_server(("0.0.0.0", 0)), socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        udp.bind(("0.0.0.0", 0))
        named, unnamed = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
        named.bind(str(folder / "socket"))
        unnamed.bind("\0" + self.abstract)
        for server in (named, unnamed):
            server.listen()
        self.tcp_port, self.udp_port = tcp.getsockname()[1], udp.getsockname()[1]
        self._sockets = (tcp, udp, named, unnamed)
        for server in self._sockets:
            threading.Thread(target=self._listen, args=(server,), daemon=True).start()

    def _listen(self, server: socket.socket) -> None:
        try:
            while True:
                message = server.recv(100) if server.type == socket.SOCK_DGRAM else server.accept()[0].recv(100)
                self.received.append(f"{server.getsockname()}: {message!r}")
        except OSError:
            return  # closed

    def close(self) -> None:
        """Ends the servers and removes the variable."""
        del os.environ["AEM_TEST_SECRET"]
        for server in self._sockets:
            server.close()

    @property
    def addresses(self) -> list[str]:
        """Addresses under which the host may be reached."""
        return ["127.0.0.1", "10.0.2.2", "172.17.0.1", socket.gethostname()]


@dataclass(frozen=True)
class Attempt:
    """One attempt.

    Attributes:
        name: the goal of the attempt.
        script: bash, in which `{…}` are the host's facts; or python, where it starts with `#python`.
        contained: whether the result shows that the attempt failed.
        limits: limits of its command.
    """

    name: str
    script: str
    contained: Callable[[Outcome], bool]
    limits: Limits = LIMITS

    def command(self, host: Host, mark: str) -> str:
        """The command. It prints `mark` first, so that an attempt that never ran does not pass."""
        script = self.script
        facts = {
            "FILE": str(host.file),
            "SOCKET": str(host.file.parent / "socket"),
            "PID": str(host.pid),
            "TCP": str(host.tcp_port),
            "UDP": str(host.udp_port),
            "ABSTRACT": host.abstract,
            "PACKAGE": str(Path(aem_jax.__file__).parent),
            "ADDRESSES": repr(host.addresses),
        }
        for name, value in facts.items():
            script = script.replace("{" + name + "}", value)
        script = dedent(script)
        if self.script.startswith("#python"):
            script = _PRELUDE + dedent(script.partition("\n")[2])
            return f"echo {mark}\npython - <<'END_OF_ATTEMPT'\n{script}\nEND_OF_ATTEMPT"
        return f"echo {mark}\n{script}"


_COLUMN = list(seccomp.ARCHITECTURES).index(os.uname().machine) if os.uname().machine in seccomp.ARCHITECTURES else 0
_JUDGED = {name: numbers for name, (numbers, _) in seccomp.JUDGED.items()}
_NUMBERS = {name: row[_COLUMN] for name, row in {**seccomp.FORBIDDEN, **seccomp.ABSENT, **_JUDGED}.items()}
_PRELUDE = f"""\
import ctypes, errno, mmap, os, resource, signal, socket, subprocess, sys, threading, time
libc, numbers = ctypes.CDLL(None, use_errno=True), {_NUMBERS}
def call(name, *arguments):
    arguments = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    done = libc.syscall(ctypes.c_long(numbers.get(name, name)), *arguments) != -1
    print(name, "DONE" if done else errno.errorcode[ctypes.get_errno()], flush=True)
"""


def says(*texts: str) -> Callable[[Outcome], bool]:
    """The output contains all of these."""
    return lambda outcome: all(text in outcome.output for text in texts)


def never(*texts: str) -> Callable[[Outcome], bool]:
    """The command ended by itself, and the output contains none of these."""
    return lambda outcome: outcome.exit_code is not None and not any(text in outcome.output for text in texts)


def killed(*why: str) -> Callable[[Outcome], bool]:
    return lambda outcome: outcome.exit_code is None and any(text in outcome.notice for text in why)


def prints(*lines: str) -> Callable[[Outcome], bool]:
    """The output consists of exactly these lines."""
    return lambda outcome: outcome.output.splitlines()[1:] == list(lines)


def all_lines(word: str, count: int) -> Callable[[Outcome], bool]:
    """The output has `count` lines, and each ends in the word."""

    def check(outcome: Outcome) -> bool:
        lines = outcome.output.splitlines()[1:]
        return len(lines) == count and all(line.endswith(word) for line in lines)

    return check


def fits(outcome: Outcome) -> bool:
    """The disk was full at about the limit (the last line gives the usage in MiB)."""
    return "No space left" in outcome.output and 16 <= int(outcome.output.split()[-1]) <= LIMITS.disk_mib


SHORT = replace(LIMITS, seconds=0.7)
