"""Process 1 of a bubblewrap workspace: runs commands one at a time, and kills all their processes afterwards.

This file is not imported in the sandbox: its text is an argument of the sandbox's `python -I -S -c`, so it uses only
the standard library. It runs as long as its workspace, and keeps the workspace's mounts and files alive.

Frames on the control socket, in both directions: two big-endian u32 (lengths of a JSON header and of a payload), the
header, the payload. A request may carry one descriptor, which becomes the command's standard input. When the other end
of the socket closes, this process exits, and the kernel kills all others in its namespace.

It has the same user id as the code that it runs, so it must protect itself. The kernel delivers signals from inside the
namespace to process 1 only if it has handlers for them, and it has none. It is not dumpable, so no process can access
its memory or its descriptors through /proc. The system call filter blocks the rest (limits and priorities of other
processes).
"""

import array
import contextlib
import ctypes
import json
import os
import resource
import select
import signal
import socket
import struct
import sys
import time
from collections.abc import Mapping
from typing import Any

POLL_S = 0.02
"""Interval between two checks of memory use, seconds."""
REAP_S = 10.0
"""Time within which killed processes must be gone, seconds; otherwise this process exits too."""
SOCKET_MIB = 0.25
"""Memory counted for each socket, which may hold unread data."""
VIRTUAL_FACTOR = 8
"""Address space of all processes together, in multiples of the memory limit; bounds memory in shared mappings."""
PAGE_MIB = resource.getpagesize() / 2**20

OUT_OF_TIME, OUT_OF_MEMORY, OUT_OF_PROCESSES, OUT_OF_FILES = "time", "memory", "processes", "files"


class Cut:
    """Keeps the first and the last bytes of a stream of any length."""

    def __init__(self, limit: int):
        self.head, self.tail, self.total = bytearray(), bytearray(), 0
        self._head_limit, self._tail_limit = limit - limit // 2, limit // 2

    def add(self, data: bytes) -> None:
        """Appends the next bytes of the stream."""
        self.total += len(data)
        room = self._head_limit - len(self.head)
        self.head += data[:room]
        self.tail += data[room:]
        del self.tail[: max(len(self.tail) - self._tail_limit, 0)]


def joined(head: bytes, tail: bytes, total: int) -> str:
    """Joins the kept parts of a stream of `total` bytes as text; invalid UTF-8 becomes U+FFFD."""
    cut = total - len(head) - len(tail)
    if cut <= 0:
        return (head + tail).decode(errors="replace")
    notice = f"\n[... {cut} bytes of output cut out here ...]\n"
    return head.decode(errors="replace") + notice + tail.decode(errors="replace")


def receive(control: socket.socket) -> tuple[dict[str, Any], int] | None:
    """Returns the next request and its descriptor (-1 for none); None if the other end has closed."""
    data, ancillary, _, _ = control.recvmsg(8, socket.CMSG_LEN(4), socket.MSG_CMSG_CLOEXEC)
    descriptors = array.array("i")
    for level, kind, content in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            descriptors.frombytes(content[: len(content) - len(content) % 4])
    rest = receive_exactly(control, 8 - len(data)) if data else None
    if rest is None:
        return None
    header = receive_exactly(control, struct.unpack("!II", data + rest)[0])
    return None if header is None else (json.loads(header), descriptors[0] if descriptors else -1)


def receive_exactly(control: socket.socket, length: int) -> bytes | None:
    """Returns the next `length` bytes; None if the other end closes before."""
    data = bytearray()
    while len(data) < length:
        part = control.recv(min(length - len(data), 2**20))
        if not part:
            return None
        data += part
    return bytes(data)


def send(control: socket.socket, header: Mapping[str, Any], payload: bytes = b"") -> None:
    """Sends a reply."""
    text = json.dumps(header).encode()
    control.sendall(struct.pack("!II", len(text), len(payload)) + text + payload)


def set_dumpable(value: bool) -> None:
    """Sets whether processes of the same user may access this process's memory and descriptors."""
    pr_set_dumpable = 4
    if ctypes.CDLL(None, use_errno=True).prctl(pr_set_dumpable, int(value), 0, 0, 0):
        raise OSError(ctypes.get_errno(), "sandbox: prctl(PR_SET_DUMPABLE) failed")


def start(request: Mapping[str, Any], stdin: int, output: int, errors: int) -> int:
    """Forks the command; returns its process id. The child inherits only what is set here."""
    child = os.fork()
    if child:
        return child
    try:
        os.setsid()
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        os.dup2(stdin if stdin >= 0 else os.open("/dev/null", os.O_RDONLY), 0)
        os.dup2(output, 1)
        os.dup2(errors, 2)
        set_dumpable(True)  # needed to write its /proc files; the command's code does not run yet
        with open("/proc/self/oom_score_adj", "w", encoding="utf-8") as file:
            file.write("1000")  # out of memory, the kernel kills this first, not the training
        for name, value in request["rlimits"].items():
            hard = resource.getrlimit(getattr(resource, name))[1]
            value = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.setrlimit(getattr(resource, name), (value, value))
        os.chdir(request["folder"])
        os.execvp(request["argv"][0], request["argv"])
    except BaseException as error:
        os.write(2, f"sandbox: {error}\n".encode())
    finally:
        os._exit(126)


def usage() -> tuple[float, float, int]:
    """Returns memory in use, MiB, address space, MiB, and number of processes, without this process."""
    resident = virtual = count = 0
    for name in os.listdir("/proc"):
        if name.isdigit() and name != "1":
            try:
                with open(f"/proc/{name}/statm", encoding="utf-8") as file:
                    fields = file.read(100).split()
            except OSError:
                continue  # the process has ended
            virtual, resident, count = virtual + int(fields[0]), resident + int(fields[1]), count + 1
    with open("/proc/net/sockstat", encoding="utf-8") as file:
        sockets = int(file.readline().split()[2])
    return resident * PAGE_MIB + sockets * SOCKET_MIB, virtual * PAGE_MIB, count


def exceeded(request: Mapping[str, Any], most_files: int) -> str:
    """Returns the limit that the command exceeds; empty for none."""
    resident, virtual, count = usage()
    if resident > request["memory_mib"] or virtual > VIRTUAL_FACTOR * request["memory_mib"]:
        return OUT_OF_MEMORY
    if count > request["processes"]:
        return OUT_OF_PROCESSES
    return OUT_OF_FILES if files(request) > most_files else ""


def files(request: Mapping[str, Any]) -> int:
    """Returns the number of files and folders on the file system that has most."""
    status = [os.statvfs(folder) for folder in request["file_systems"]]
    return max(s.f_files - s.f_ffree for s in status)


def bury_orphans(child: int) -> None:
    """Reaps ended orphans, whose parent is now process 1; stops when the command itself has ended."""
    while (ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) and ended.si_pid != child:
        os.waitpid(ended.si_pid, 0)


def kill_all() -> None:
    """Kills all other processes of this namespace and waits until they are gone.

    No process can escape by forking: the kernel signals all of them under one lock, and a killed process cannot fork.
    """
    deadline = time.monotonic() + REAP_S
    while True:
        with contextlib.suppress(ProcessLookupError):
            os.kill(-1, signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        if time.monotonic() > deadline:
            os._exit(1)  # a process does not end; the kernel then destroys the namespace
        time.sleep(0.001)


def run(control: socket.socket, request: Mapping[str, Any], stdin: int) -> None:
    """Runs one command and replies with its result."""
    began = time.monotonic()
    output_read, output_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    errors_read, errors_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    # the command gets the write ends, and programs expect blocking writes
    os.set_blocking(output_write, True)
    os.set_blocking(errors_write, True)
    streams = {output_read: Cut(request["output_bytes"]), errors_read: Cut(4096)}
    child = start(request, stdin, output_write, errors_write if request["split"] else output_write)
    for descriptor in (output_write, errors_write, stdin):
        if descriptor >= 0:
            os.close(descriptor)
    ended = os.pidfd_open(child)
    poll = select.poll()
    for descriptor in (*streams, ended):
        poll.register(descriptor, select.POLLIN)
    poll.register(control, select.POLLIN)  # no data arrives during a command: readable means that the other end closed

    def read(descriptor: int, most: int) -> bool:
        """Reads available data; False at the end of the stream or if no data is available."""
        try:
            data = os.read(descriptor, most)
        except BlockingIOError:
            return False
        streams[descriptor].add(data)
        return bool(data)

    exit_status, over, next_look = None, "", began
    most_files = max(request["files"], files(request))  # a command may still remove excess files of earlier ones
    while exit_status is None and not over:
        now = time.monotonic()
        if now >= began + request["seconds"]:
            over = OUT_OF_TIME
        elif now >= next_look:
            over, next_look = exceeded(request, most_files), time.monotonic() + POLL_S
        for descriptor, _ in poll.poll(max(1, 1000 * min(POLL_S, began + request["seconds"] - now))):
            if descriptor == control.fileno():
                os._exit(0)
            elif descriptor == ended:
                exit_status = os.waitpid(child, 0)[1]
            elif not read(descriptor, 65536):
                poll.unregister(descriptor)  # the command closed it; a closed pipe is always ready
        if exit_status is None:
            bury_orphans(child)
    kill_all()
    for descriptor in streams:
        while read(descriptor, 65536):
            pass  # bounded by the pipes' content: all writers are dead
        os.close(descriptor)
    os.close(ended)
    output, errors = streams[output_read], streams[errors_read]
    code = None if exit_status is None or over else os.waitstatus_to_exitcode(exit_status)
    header = {
        "exit_code": code if code is None or code >= 0 else 128 - code,
        "over": over,
        "seconds": time.monotonic() - began,
        "total": output.total,
        "head": len(output.head),
        "errors": (errors.head + errors.tail).decode(errors="replace"),
    }
    send(control, header, bytes(output.head + output.tail))


def main() -> None:
    """Serves the control socket whose descriptor is the first argument."""
    inherited = {int(name) for name in os.listdir("/proc/self/fd")} - {0, 1, 2, int(sys.argv[1])}
    for descriptor in inherited:  # the descriptor of the listing itself is closed already
        with contextlib.suppress(OSError):
            os.close(descriptor)
    set_dumpable(False)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # with Python's handler, the sandbox could interrupt this process
    os.umask(0o022)
    control = socket.socket(fileno=int(sys.argv[1]))
    control.set_inheritable(False)
    send(control, {"ready": True})
    null = os.open("/dev/null", os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    while (message := receive(control)) is not None:
        run(control, *message)


if __name__ == "__main__":
    main()
