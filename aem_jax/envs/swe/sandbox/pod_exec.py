"""Programs in a pod, by `exec` over a WebSocket, in version 4 or 5 of its channel protocol.

Version 4 cannot close the program's standard input, and the command line is part of an URL, whose length proxies limit.
So the command line is constant; arguments and input follow through standard input, with their number and length.
"""

import importlib
import json
import os
import select
import socket
import ssl
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from aem_jax.envs.swe.sandbox.cluster_errors import DisconnectedError
from aem_jax.envs.swe.sandbox.init_process import Cut
from aem_jax.envs.swe.sandbox.workspace import Limits

PING_S = 30.0
"""A command without output is pinged after this time, because load balancers close silent connections, seconds."""
_INPUT, _OUTPUT, _ERRORS, _STATUS = range(4)  # channels
_CHUNK = 16384
_MESSAGE = 65536

# Reads "<n>\0<argument>\0…<length>\0<input>" and runs that program. `ulimit` fails where the limit is lower already.
# The last `kill` is needed for the connection to end: it stays open while any process holds the output open.
_RUN = r"""
IFS= read -r -d '' count; words=()
while [ "${#words[@]}" -lt "$count" ]; do IFS= read -r -d '' word || exit 125; words+=("$word"); done
IFS= read -r -d '' length || exit 125
for limit in $1; do ulimit "-${limit%%=*}" "${limit#*=}" 2> /dev/null; done
if [ -n "$2" ]; then exec 3>&1; else exec 3>&2; fi
exec 2> /dev/null
if [ "$length" = 0 ]; then
  "${words[@]}" 2>&3 3>&- < /dev/null
else
  "${words[@]}" 2>&3 3>&- < <(exec head -c "$length")
fi
code=$?
kill -KILL -1
exit "$code"
"""


@dataclass(frozen=True)
class Result:
    """The result of a program in a pod.

    Attributes:
        exit_code: exit status; None if the deadline passed.
        output: what was kept of stdout.
        errors: what was kept of stderr.
    """

    exit_code: int | None
    output: Cut
    errors: Cut


def command_line(limits: Limits, *, merge: bool) -> list[str]:
    """Returns the command line of every program.

    Args:
        limits: of the single process.
        merge: whether stderr goes to the output.
    """
    return ["bash", "-c", _RUN, "run", _ulimits(limits), "merge" if merge else ""]


def converse(connection: Any, argv: Sequence[str], stdin: int | None, limits: Limits) -> Result:
    """Sends a program and its input, and receives its output until it ends or its deadline passes.

    Args:
        connection: the WebSocket of the `command_line`.
        argv: the program and its arguments.
        stdin: descriptor of a regular file, the standard input; None for an empty one.
        limits: time and output.

    Raises:
        DisconnectedError: see there.
    """
    websocket = importlib.import_module("websocket")  # comes with the client
    length = 0 if stdin is None else os.fstat(stdin).st_size - os.lseek(stdin, 0, os.SEEK_CUR)
    header = "".join(f"{word}\0" for word in (str(len(argv)), *argv, str(length))).encode()
    deadline = time.monotonic() + limits.seconds
    transport = connection.sock
    # whole messages are sent only while much more than one fits into this buffer, so sending does not block
    transport.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16 * _CHUNK)
    output, errors, status = Cut(limits.output_bytes), Cut(4096), bytearray()
    pending: bytes | None = header
    spoken = time.monotonic()
    try:
        while True:
            now = time.monotonic()
            if now >= deadline:
                return Result(None, output, errors)
            buffered = isinstance(transport, ssl.SSLSocket) and transport.pending() > 0
            poll = select.poll()
            poll.register(transport, select.POLLIN | (0 if pending is None else select.POLLOUT))
            events = poll.poll(0 if buffered else 1000 * min(deadline - now, PING_S))
            ready = events[0][1] if events else 0
            connection.settimeout(max(deadline - time.monotonic(), 1.0))
            if pending is not None and ready & select.POLLOUT:
                connection.send_binary(bytes([_INPUT]) + pending[:_CHUNK])
                pending = pending[_CHUNK:] or (None if stdin is None else os.read(stdin, _CHUNK) or None)
            if buffered or ready & ~select.POLLOUT:
                operation, frame = connection.recv_data_frame(True)
                if operation == websocket.ABNF.OPCODE_CLOSE:
                    return Result(_exit_code(bytes(status)), output, errors)
                if operation in (websocket.ABNF.OPCODE_BINARY, websocket.ABNF.OPCODE_TEXT) and frame.data:
                    channel, data = frame.data[0], frame.data[1:]
                    if channel in (_OUTPUT, _ERRORS):
                        (output if channel == _OUTPUT else errors).add(data)
                    elif channel == _STATUS and len(status) < _MESSAGE:
                        status += data
                spoken = time.monotonic()
            if time.monotonic() - spoken > PING_S:
                connection.ping()
                spoken = time.monotonic()
    except websocket.WebSocketTimeoutException:
        return Result(None, output, errors)
    except websocket.WebSocketConnectionClosedException as error:
        if status:
            return Result(_exit_code(bytes(status)), output, errors)
        raise DisconnectedError(f"the connection to a program ended: {error}") from None
    except (websocket.WebSocketException, OSError) as error:
        raise DisconnectedError(f"the connection to a program ended: {error}") from None


def _exit_code(status: bytes) -> int:
    """Returns the exit code of the status message that ends a connection.

    Raises:
        DisconnectedError: the program did not run to its end.
    """
    try:
        message = json.loads(status)
        if message["status"] == "Success":
            return 0
        causes = message.get("details", {}).get("causes", [])
        codes = [int(cause["message"]) for cause in causes if cause.get("reason") == "ExitCode"]
        if codes:
            return codes[0]
        reason = message.get("message", "")
    except (ValueError, KeyError, TypeError, AttributeError):
        reason = status.decode(errors="replace")
    raise DisconnectedError(f"a program in a pod did not run to its end: {reason or 'no status':.500}")


def _ulimits(limits: Limits) -> str:
    """Returns the limits of one process for bash's `ulimit`: memory and files in KiB, processor time in seconds."""
    values = {"c": 0, "n": 512, "f": 1024 * limits.file_mib, "d": 1024 * limits.memory_mib}
    if limits.cpu_seconds:
        values["t"] = limits.cpu_seconds
    return " ".join(f"{name}={value}" for name, value in values.items())
