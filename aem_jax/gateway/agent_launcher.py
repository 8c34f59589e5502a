"""Starts agents, one process for each episode, by fork: an agent's packages are imported once, before the first.

`python -m aem_jax.gateway.agent_launcher [--function file.py:name] [command …]` reads JSON lines:
`{"id", "task", "environ", "timeout_s"}` starts an episode, `{"id", "kill": true}` ends one. For each episode it writes
`{"id", "status", "output", "result", "errors"}`: the exit status (negative: the signal; null: the deadline passed), the
last line of the agent's output, the JSON text of what the function returned, and the end of its error output.

Only the standard library is imported here and in `first_request`. Agents end with this process, and this process with
its parent.
"""

import argparse
import contextlib
import ctypes
import importlib
import importlib.util
import inspect
import json
import os
import resource
import selectors
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aem_jax.gateway.first_request import make_first_request

_KEPT_BYTES = 65536
_RESULT_BYTES = 2**21
"""Longest result of a function, as JSON. A report is one line, in which a byte may take six characters; `harness` reads
lines of at most 16 MiB."""
_SHOWN_BYTES = 2000
_MAX_OPEN = 16384  # files, three for each agent; the usual limit of 1,024 would end the launcher at some 340 agents


@dataclass
class _Agent:
    """A running agent (mutable).

    Attributes:
        pid: its process, and the id of its process group.
        deadline: when it is killed, seconds of the monotonic clock.
        open: its pipes by name: "output", "result", "errors".
        read: what came through them.
        expired: whether it was killed at its deadline.
    """

    pid: int
    deadline: float
    open: dict[str, int]
    read: dict[str, bytearray] = field(default_factory=dict)
    expired: bool = False


def load(where: str) -> Callable[..., Any]:
    """Imports `file.py:name` or `module:name`.

    Raises:
        ValueError: it does not exist, or is no function.
    """
    path, _, name = where.rpartition(":")
    if not path or not name:
        raise ValueError(f"expected file.py:function or module:function, got {where!r}")
    if path.endswith(".py"):
        if not Path(path).is_file():
            raise ValueError(f"expected a Python file, got {path!r}: no such file in {Path.cwd()}")
        spec = importlib.util.spec_from_file_location(f"agent_{Path(path).stem}", path)
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        sys.path.insert(0, str(Path(path).resolve().parent))
        spec.loader.exec_module(module)
    else:
        module = importlib.import_module(path)
    function = getattr(module, name, None)
    if not callable(function):
        names = [known for known, value in vars(module).items() if inspect.isfunction(value)]
        raise ValueError(f"expected a function {name} in {path}, got none; it has {', '.join(names) or 'no function'}")
    return function


class Launcher:
    """The agents of one run.

    Args:
        function: called with the task in each episode's process; None: `command` is run.
        command: words of a command that gets the task as JSON on its standard input.
        reports: descriptor that reports are written to.
    """

    def __init__(self, function: Callable[[Any], Any] | None, command: list[str], reports: int) -> None:
        self._function, self._command, self._reports = function, command, reports
        self._agents: dict[str, _Agent] = {}
        self._selector = selectors.DefaultSelector()
        self._buffer = b""
        self._prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None  # loaded before the forks
        self._open_limits = soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if 0 <= soft < (wanted := _MAX_OPEN if hard < 0 else min(_MAX_OPEN, hard)):  # below 0: no limit
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))

    def run(self) -> None:
        """Serves until standard input ends."""
        woken, wake = os.pipe()
        os.set_blocking(wake, False)
        signal.set_wakeup_fd(wake)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        self._selector.register(0, selectors.EVENT_READ, None)
        self._selector.register(woken, selectors.EVENT_READ, ("", ""))
        try:
            while True:
                has_ended = False
                for key, _ in self._selector.select(self._wait_s()):
                    if key.data is None:
                        if not self._read_requests():
                            return
                    elif key.fd == woken:
                        has_ended = bool(os.read(woken, 4096))
                    else:
                        self._read_pipe(*key.data)
                self._expire()
                if has_ended:
                    self._reap()
        finally:
            for agent in self._agents.values():
                _kill(agent.pid)

    def _wait_s(self) -> float | None:
        deadlines = [agent.deadline for agent in self._agents.values() if not agent.expired]
        return max(min(deadlines) - time.monotonic(), 0.0) if deadlines else None

    def _expire(self) -> None:
        now = time.monotonic()
        for agent in self._agents.values():
            if now >= agent.deadline and not agent.expired:
                agent.expired = True
                _kill(agent.pid)

    def _read_requests(self) -> bool:
        data = os.read(0, 1 << 20)
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        for line in lines:
            request = json.loads(line)
            if request.get("kill"):
                if agent := self._agents.get(request["id"]):
                    _kill(agent.pid)
            else:
                self._start(request)
        return bool(data)

    def _start(self, request: Mapping[str, Any]) -> None:
        pipes = {name: os.pipe() for name in ("output", "result", "errors")}
        task = tempfile.TemporaryFile()  # noqa: SIM115 (the child reads it)
        task.write(json.dumps(request["task"]).encode())
        task.seek(0)
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            try:
                self._become_agent(request, {name: ends[1] for name, ends in pipes.items()}, task.fileno(), parent)
            finally:
                os._exit(70)
        task.close()
        for _, write in pipes.values():
            os.close(write)
        agent = _Agent(pid, time.monotonic() + request["timeout_s"], {name: ends[0] for name, ends in pipes.items()})
        self._agents[request["id"]] = agent
        for name, descriptor in agent.open.items():
            os.set_blocking(descriptor, False)
            self._selector.register(descriptor, selectors.EVENT_READ, (request["id"], name))

    def _become_agent(self, request: Mapping[str, Any], pipes: Mapping[str, int], task: int, parent: int) -> None:
        os.setsid()
        if self._prctl is not None:
            self._prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
            if os.getppid() != parent:
                os._exit(70)
        sys.stdout.flush()  # what an import printed
        os.dup2(task, 0)
        os.dup2(pipes["output"], 1)
        os.dup2(pipes["errors"], 2)
        result = os.dup(pipes["result"]) if self._function is not None else -1
        os.closerange(3, result if result >= 0 else os.sysconf("SC_OPEN_MAX"))
        if result >= 0:
            os.closerange(result + 1, os.sysconf("SC_OPEN_MAX"))
        resource.setrlimit(resource.RLIMIT_NOFILE, self._open_limits)  # more would break programs that use `select`
        os.environ.update(request["environ"])
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGINT, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        if self._function is None:
            try:
                os.execvp(self._command[0], self._command)
            except OSError as error:
                os.write(2, f"{self._command[0]}: {error}".encode())
                os._exit(127)
        status = 1
        try:
            value = self._function(request["task"])
            write_all(result, json.dumps(value).encode())
            status = 0
        except SystemExit as error:
            status = error.code if isinstance(error.code, int) else int(error.code is not None)
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)

    def _read_pipe(self, identity: str, name: str) -> bool:
        """Reads a part; returns whether there may be more now."""
        agent = self._agents[identity]
        try:
            data = os.read(agent.open[name], _KEPT_BYTES)
        except BlockingIOError:
            return False
        kept = agent.read.setdefault(name, bytearray())
        if name != "result" or len(kept) <= _RESULT_BYTES:
            kept += data
        if name != "result":
            del kept[:-_KEPT_BYTES]
        if not data:
            self._close_pipe(agent, name)
        return bool(data)

    def _close_pipe(self, agent: _Agent, name: str) -> None:
        descriptor = agent.open.pop(name)
        self._selector.unregister(descriptor)
        os.close(descriptor)

    def _reap(self) -> None:
        """Reports the agents whose process has ended, and ends what they started."""
        for identity, agent in list(self._agents.items()):
            ended, status = os.waitpid(agent.pid, os.WNOHANG)
            if ended:
                _kill(agent.pid)
                for name in list(agent.open):
                    while name in agent.open and self._read_pipe(identity, name):
                        pass
                    if name in agent.open:  # a process that left the group holds it open
                        self._close_pipe(agent, name)
                del self._agents[identity]
                self._report(identity, agent, status)

    def _report(self, identity: str, agent: _Agent, status: int) -> None:
        text = {name: data.decode(errors="replace") for name, data in agent.read.items()}
        lines = [line for line in text.get("output", "").splitlines() if line.strip()]
        result, errors = text.get("result", ""), text.get("errors", "")
        if len(agent.read.get("result", b"")) > _RESULT_BYTES:
            result, errors = "", f"{errors}expected a result of at most {_RESULT_BYTES} bytes of JSON, got more\n"
        report = {
            "id": identity,
            "status": None if agent.expired else os.waitstatus_to_exitcode(status),
            "output": lines[-1] if lines else "",
            "result": result,
            "errors": errors[-_SHOWN_BYTES:],
        }
        write_all(self._reports, json.dumps(report).encode() + b"\n")


def write_all(descriptor: int, data: bytes) -> None:
    """Writes all of some data."""
    while data:
        data = data[os.write(descriptor, data) :]


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def main() -> None:
    """Starts the launcher, after the function's module was imported."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--function", default="")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    arguments = parser.parse_args()
    command = arguments.command[1:] if arguments.command[:1] == ["--"] else arguments.command
    reports = os.dup(1)
    os.dup2(2, 1)  # an import may print
    try:
        function = load(arguments.function) if arguments.function else None
        make_first_request()
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        full = f"{type(error).__name__}: {error} (line {where.lineno} of {where.filename})"
        failed = str(error) if where.filename == __file__ else full  # here: the setting itself is wrong
        write_all(reports, json.dumps({"failed": failed}).encode() + b"\n")
        return
    write_all(reports, b'{"ready": true}\n')
    Launcher(function, command, reports).run()


if __name__ == "__main__":
    main()
