"""The control channel between the processes of a run: small collective messages, and detection of failed processes.

The topology is a star: process 0 holds a connection to each other process and relays messages. JAX's collectives do not
fit here: they move arrays of one shape, compile, and hang or abort when a process is gone. JAX's coordination service
detects a lost process late, and then ends this one without a message that names it. The channel detects a closed
connection at once, and a silent one after `heartbeat_timeout_s`; it then calls `on_failure` with the process and the
reason. Process 0 leaves last: it also runs JAX's coordination service, which aborts the others when it disappears.
"""

import contextlib
import hmac
import json
import logging
import queue
import secrets
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

log = logging.getLogger(__name__)

_HEADER = struct.Struct("!cQ")
_DATA, _HEARTBEAT, _FAILED, _DONE = b"D", b"B", b"L", b"E"
_WELCOME = b"W"
_TICK_S = 1.0
_HELLO_BYTES = 4096


class PeerDisconnectedError(RuntimeError):
    """Another process of the run is gone."""


@dataclass(frozen=True)
class PeerFailure:
    """A process that is gone, and the reason.

    Attributes:
        process: its index.
        host: the name of its host.
        reason: as a clause for a message.
        exit_status: with which the process ends, if it reported the failure itself; 0 if it was killed or is silent.
    """

    process: int
    host: str
    reason: str
    exit_status: int = 0

    @property
    def reported(self) -> bool:
        """Whether the process reported the failure itself. The others often meet the same error a moment later."""
        return self.exit_status != 0

    def __str__(self) -> str:
        return f"process {self.process} (on {self.host}) left: {self.reason}"


@dataclass(frozen=True)
class Address:
    """Where process 0 listens; small enough to be broadcast before the channel is open.

    Attributes:
        hosts: names and IP addresses of its host, to be tried in order.
        port: chosen by the kernel.
        token: proves that a caller belongs to the run.
    """

    hosts: tuple[str, ...]
    port: int
    token: str


def listen(hosts: Sequence[str]) -> tuple[socket.socket, Address]:
    """Opens process 0's listening socket.

    Args:
        hosts: names under which the other processes may reach this host; its own names are added.
    """
    if socket.has_dualstack_ipv6():
        server = socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
    else:
        server = socket.create_server(("", 0), backlog=1024)
    names = dict.fromkeys([*hosts, *_own_names()])
    return server, Address(tuple(name for name in names if name), server.getsockname()[1], secrets.token_hex(16))


def accept(server: socket.socket, address: Address, count: int, timeout_s: float) -> dict[int, "Peer"]:
    """Waits until all other processes have connected.

    Raises:
        TimeoutError: some have not; the message names them.
    """
    peers: dict[int, Peer] = {}
    deadline = time.monotonic() + timeout_s
    while len(peers) < count - 1:
        server.settimeout(max(deadline - time.monotonic(), 0.01))
        try:
            connection, _ = server.accept()
        except TimeoutError:
            missing = sorted(set(range(1, count)) - set(peers))
            raise TimeoutError(
                f"expected a call from each of {count} processes on port {address.port} within {timeout_s:g} s, "
                f"got none of {missing}; is a port between the hosts closed?"
            ) from None
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # a stranger, or a caller that gave up
            connection.settimeout(10.0)
            hello = json.loads(_receive_hello(connection))
            if hmac.compare_digest(str(hello["token"]), address.token) and 0 < hello["process"] < count:
                connection.sendall(_WELCOME)
                peers[hello["process"]] = Peer(hello["process"], str(hello["host"]), connection)
                continue
        connection.close()
    server.close()
    return peers


def call(address: Address, process: int, timeout_s: float) -> dict[int, "Peer"]:
    """Connects to process 0.

    Raises:
        TimeoutError: it cannot be reached under any of its names.
    """
    deadline, failures = time.monotonic() + timeout_s, {}
    while time.monotonic() < deadline:
        for host in address.hosts:
            try:
                connection = socket.create_connection((host, address.port), timeout=5.0)
                hello = json.dumps({"token": address.token, "process": process, "host": socket.gethostname()})
                connection.sendall(hello.encode() + b"\n")
                if connection.recv(1) == _WELCOME:
                    return {0: Peer(0, host, connection)}
                failures[host] = "another program answers"
            except OSError as error:
                failures[host] = str(error)
        time.sleep(0.5)
    tried = "; ".join(f"{host}: {error}" for host, error in failures.items())
    raise TimeoutError(
        f"process {process} cannot reach process 0 on port {address.port} ({tried}); "
        "is a port between the hosts closed?"
    )


class Peer:
    """A connection to another process that carries frames: a kind and its data."""

    def __init__(self, process: int, host: str, connection: socket.socket):
        self.process, self.host = process, host
        self.inbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self.done = False
        self.gone = threading.Event()
        self._connection, self._sending = connection, threading.Lock()
        connection.settimeout(None)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._poll = select.poll()
        self._poll.register(connection, select.POLLIN)

    def send(self, kind: bytes, data: bytes = b"", *, wait_s: float = -1) -> None:
        """Sends a frame; drops it when the connection stays busy with other frames for `wait_s` (-1: never)."""
        if self._sending.acquire(timeout=wait_s):
            try:
                self._connection.sendall(_HEADER.pack(kind, len(data)) + data)
            finally:
                self._sending.release()

    def receive(self, heartbeat_timeout_s: float) -> tuple[bytes, bytes]:
        """The next frame.

        Raises:
            ConnectionError: the connection closed, or nothing arrived for `heartbeat_timeout_s`. A pause of this
                process itself (SIGSTOP, a suspended machine) counts as one second.
        """
        kind, size = _HEADER.unpack(self._exactly(_HEADER.size, heartbeat_timeout_s))
        return kind, self._exactly(size, heartbeat_timeout_s)

    def close(self) -> None:
        """Closes the connection and wakes its reader."""
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()

    def _exactly(self, size: int, heartbeat_timeout_s: float) -> bytes:
        parts, silent = [], 0.0
        while size:
            if not self._poll.poll(_TICK_S * 1000):
                silent += _TICK_S
                if silent >= heartbeat_timeout_s:
                    raise ConnectionError(f"nothing was received from it for {heartbeat_timeout_s:g} s")
                continue
            part = self._connection.recv(min(size, 1 << 20))
            if not part:
                raise ConnectionError("its connection closed, was it killed?")
            silent = 0.0
            parts.append(part)
            size -= len(part)
        return b"".join(parts)


class ControlChannel:
    """This process's end of the control channel.

    Args:
        index: this process.
        peers: from `accept` or `call`.
        heartbeat_timeout_s: a process that sends nothing for so long counts as gone.
        on_failure: called once with this channel and the failure, in a thread of the channel, when another process is
            gone before `close`.
    """

    def __init__(
        self,
        index: int,
        peers: dict[int, Peer],
        heartbeat_timeout_s: float,
        on_failure: Callable[["ControlChannel", PeerFailure], None],
    ):
        self._index, self._peers = index, peers
        self._heartbeat_timeout_s, self._on_failure = heartbeat_timeout_s, on_failure
        self._failure: PeerFailure | None = None
        self._has_failure, self._closed = threading.Event(), threading.Event()
        self._lock = threading.Lock()
        for peer in peers.values():
            threading.Thread(target=self._read, args=(peer,), name=f"channel-{peer.process}", daemon=True).start()
        threading.Thread(target=self._send_heartbeats, name="channel-heartbeat", daemon=True).start()

    def gather(self, data: bytes) -> list[bytes]:
        """The bytes of every process, in order; see `ProcessGroup.gather`.

        Raises:
            PeerDisconnectedError: another process is gone.
        """
        if self._index:
            self._send(self._peers[0], _DATA, data)
            return _unpack(self._next(self._peers[0]))
        messages = [data, *(self._next(self._peers[process]) for process in sorted(self._peers))]
        packed = _pack(messages)
        for peer in self._peers.values():
            self._send(peer, _DATA, packed)
        return messages

    def failure(self, timeout_s: float) -> PeerFailure | None:
        """The first failure of another process; waits up to `timeout_s` for one to be detected."""
        self._has_failure.wait(timeout_s)
        return self._failure

    def close(self) -> None:
        """Closes the channel when all processes are done; a connection that closes later is no failure. Collective."""
        self.gather(b"")
        for peer in self._peers.values():
            self._send(peer, _DONE)
        for peer in self._peers.values():
            while not peer.done and self._failure is None:
                time.sleep(0.01)
        self._disconnect()

    def abort(self, reason: str, exit_status: int, wait_s: float = 0) -> None:
        """Reports to the other processes that this one fails, and closes the channel.

        Args:
            reason: as a clause for a message.
            exit_status: with which this process will end, above 0.
            wait_s: see `wait_until_left`.
        """
        self._closed.set()  # from now on, another process that leaves is no failure
        failure = PeerFailure(self._index, socket.gethostname(), reason, exit_status)
        for peer in self._peers.values():
            with contextlib.suppress(OSError):
                peer.send(_FAILED, _encode(failure), wait_s=2 * _TICK_S)
        self.wait_until_left(wait_s)
        self._disconnect()

    def wait_until_left(self, timeout_s: float) -> None:
        """In process 0: waits until all others have left, at most `timeout_s`. The others return at once."""
        deadline = time.monotonic() + timeout_s
        for peer in self._peers.values() if self._index == 0 else ():
            peer.gone.wait(max(deadline - time.monotonic(), 0))

    def _send(self, peer: Peer, kind: bytes, data: bytes = b"") -> None:
        try:
            peer.send(kind, data)
        except OSError as error:
            self._has_failure.wait(2 * _TICK_S)  # the reading thread finds the reason in a moment
            raise PeerDisconnectedError(str(self._failure or error)) from error

    def _next(self, peer: Peer) -> bytes:
        data = peer.inbox.get()
        if data is None:
            raise PeerDisconnectedError(str(self._failure))
        return data

    def _read(self, peer: Peer) -> None:
        try:
            while True:
                kind, data = peer.receive(self._heartbeat_timeout_s)
                if kind == _DATA:
                    peer.inbox.put(data)
                elif kind == _DONE:
                    peer.done = True
                elif kind == _FAILED:
                    self._record(PeerFailure(**json.loads(data)))
        except (OSError, ValueError) as error:
            peer.gone.set()
            if not peer.done and not self._closed.is_set():
                self._record(PeerFailure(peer.process, peer.host, str(error)))

    def _record(self, failure: PeerFailure) -> None:
        """Keeps the first failure, wakes the waiting calls, and relays it to the other processes."""
        with self._lock:
            if self._failure is not None or self._closed.is_set():
                return
            self._failure = failure
        for peer in self._peers.values():
            peer.inbox.put(None)
            if self._index == 0 and peer.process != failure.process:
                with contextlib.suppress(OSError):
                    peer.send(_FAILED, _encode(failure), wait_s=2 * _TICK_S)
        self._has_failure.set()
        self._on_failure(self, failure)

    def _send_heartbeats(self) -> None:
        while not self._closed.wait(min(self._heartbeat_timeout_s / 5, 5.0)):
            for peer in self._peers.values():
                with contextlib.suppress(OSError):
                    peer.send(_HEARTBEAT, wait_s=0)  # a frame that is being sent serves as a heartbeat

    def _disconnect(self) -> None:
        self._closed.set()
        for peer in self._peers.values():
            peer.close()


def _receive_hello(connection: socket.socket) -> bytes:
    hello = b""
    while not hello.endswith(b"\n") and len(hello) < _HELLO_BYTES:
        part = connection.recv(_HELLO_BYTES)
        if not part:
            break
        hello += part
    return hello


def _own_names() -> list[str]:
    """The addresses and names of this host."""
    names = []
    for family, target in ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1")):
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((target, 9))  # sends nothing; the kernel only picks the source address
            names.append(probe.getsockname()[0])
    return [*names, socket.gethostname(), "localhost"]


def _encode(failure: PeerFailure) -> bytes:
    return json.dumps(vars(failure)).encode()


def _pack(messages: Sequence[bytes]) -> bytes:
    return b"".join(struct.pack("!Q", len(data)) + data for data in messages)


def _unpack(packed: bytes) -> list[bytes]:
    messages, at = [], 0
    while at < len(packed):
        (size,) = struct.unpack_from("!Q", packed, at)
        messages.append(packed[at + 8 : at + 8 + size])
        at += 8 + size
    return messages
