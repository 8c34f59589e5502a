"""A line between the processes of a run: small messages to all, and word of who has left.

A star: process 0 holds a connection to each of the others and passes on what they say. JAX has collectives, but those
move arrays of one shape, compile, and hang or abort when a process is gone; its coordination service knows that one is
gone after a while, and then ends the process without a word that a person could use. A connection that closes is
noticed at once, and one that falls silent after `silence_s`; then `on_loss` hears who it was and why.
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
_DATA, _BEAT, _LEFT, _DONE = b"D", b"B", b"L", b"E"
_WELCOME = b"W"
_TICK_S = 1.0
_HELLO_BYTES = 4096


class LeftError(RuntimeError):
    """Another process of the run has left."""


@dataclass(frozen=True)
class Loss:
    """Who left, and why.

    Attributes:
        process: which one.
        host: the name of its host.
        why: in words.
        told: whether it said so itself, which gives the others a moment to come upon the same error.
    """

    process: int
    host: str
    why: str
    told: bool = False

    def __str__(self) -> str:
        return f"process {self.process} (on {self.host}) left: {self.why}"


@dataclass(frozen=True)
class Address:
    """Where process 0 listens; small enough to be handed around before there is a line.

    Attributes:
        hosts: names and numbers of its host, to be tried in order.
        port: as the kernel picked it.
        token: proves that who calls belongs to the run.
    """

    hosts: tuple[str, ...]
    port: int
    token: str


def listen(hosts: Sequence[str]) -> tuple[socket.socket, Address]:
    """Opens process 0's end.

    Args:
        hosts: under which names the others may find it; those that this host has for itself are added.
    """
    if socket.has_dualstack_ipv6():
        server = socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
    else:
        server = socket.create_server(("", 0), backlog=1024)
    names = dict.fromkeys([*hosts, *_own_names()])
    return server, Address(tuple(name for name in names if name), server.getsockname()[1], secrets.token_hex(16))


def accept(server: socket.socket, address: Address, count: int, timeout_s: float) -> dict[int, "Peer"]:
    """Waits until all other processes have called.

    Raises:
        TimeoutError: some did not; they are named.
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
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # a stranger, or one that gave up
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
    """Calls process 0.

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
                failures[host] = "somebody else answers"
            except OSError as error:
                failures[host] = str(error)
        time.sleep(0.5)
    tried = "; ".join(f"{host}: {error}" for host, error in failures.items())
    raise TimeoutError(
        f"process {process} cannot reach process 0 on port {address.port} ({tried}); "
        "is a port between the hosts closed?"
    )


class Peer:
    """A connection to another process; frames in, frames out."""

    def __init__(self, process: int, host: str, connection: socket.socket):
        self.process, self.host = process, host
        self.inbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self.done = False
        self._connection, self._sending = connection, threading.Lock()
        connection.settimeout(None)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._poll = select.poll()
        self._poll.register(connection, select.POLLIN)

    def send(self, kind: bytes, data: bytes = b"", *, wait_s: float = -1) -> None:
        """Sends a frame, unless others take longer than `wait_s` to be sent before it."""
        if self._sending.acquire(timeout=wait_s):
            try:
                self._connection.sendall(_HEADER.pack(kind, len(data)) + data)
            finally:
                self._sending.release()

    def receive(self, silence_s: float) -> tuple[bytes, bytes]:
        """The next frame.

        Raises:
            ConnectionError: the connection closed, or nothing came for `silence_s` (of which a time in which this
                process was itself stopped counts one second).
        """
        kind, size = _HEADER.unpack(self._exactly(_HEADER.size, silence_s))
        return kind, self._exactly(size, silence_s)

    def close(self) -> None:
        """Closes the connection; whoever reads from it wakes up."""
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()

    def _exactly(self, size: int, silence_s: float) -> bytes:
        parts, silent = [], 0.0
        while size:
            if not self._poll.poll(_TICK_S * 1000):
                silent += _TICK_S
                if silent >= silence_s:
                    raise ConnectionError(f"nothing was heard of it for {silence_s:g} s")
                continue
            part = self._connection.recv(min(size, 1 << 20))
            if not part:
                raise ConnectionError("its connection closed, was it killed?")
            silent = 0.0
            parts.append(part)
            size -= len(part)
        return b"".join(parts)


class Line:
    """This process's end of the line.

    Args:
        index: this process.
        peers: from `accept` or `call`.
        silence_s: after so much silence a process counts as gone.
        on_loss: called once, in a thread of the line's, when another process has left before its time.
    """

    def __init__(self, index: int, peers: dict[int, Peer], silence_s: float, on_loss: Callable[[Loss], None]):
        self._index, self._peers = index, peers
        self._silence_s, self._on_loss = silence_s, on_loss
        self._lost: Loss | None = None
        self._loss_known, self._closed = threading.Event(), threading.Event()
        self._lock = threading.Lock()
        for peer in peers.values():
            threading.Thread(target=self._read, args=(peer,), name=f"line-{peer.process}", daemon=True).start()
        threading.Thread(target=self._beat, name="line-beat", daemon=True).start()

    def gather(self, data: bytes) -> list[bytes]:
        """What each process said; see `Hosts.gather`.

        Raises:
            LeftError: another process has left.
        """
        if self._index:
            self._send(self._peers[0], _DATA, data)
            return _unpack(self._next(self._peers[0]))
        said = [data, *(self._next(self._peers[process]) for process in sorted(self._peers))]
        packed = _pack(said)
        for peer in self._peers.values():
            self._send(peer, _DATA, packed)
        return said

    def loss(self, timeout_s: float) -> Loss | None:
        """Who left, if somebody did; waits for the word a while."""
        self._loss_known.wait(timeout_s)
        return self._lost

    def leave(self) -> None:
        """Ends this end when all processes are through; from here on, one that closes its connection is no loss."""
        self.gather(b"")
        for peer in self._peers.values():
            self._send(peer, _DONE)
        for peer in self._peers.values():
            while not peer.done and self._lost is None:
                time.sleep(0.01)
        self._close()

    def fail(self, why: str) -> None:
        """Tells the others that this process has to leave, and closes."""
        loss = json.dumps({"process": self._index, "host": socket.gethostname(), "why": why, "told": True}).encode()
        for peer in self._peers.values():
            with contextlib.suppress(OSError):
                peer.send(_LEFT, loss, wait_s=2 * _TICK_S)
        self._close()

    def _send(self, peer: Peer, kind: bytes, data: bytes = b"") -> None:
        try:
            peer.send(kind, data)
        except OSError as error:
            self._loss_known.wait(2 * _TICK_S)  # who reads from it knows more, in a moment
            raise LeftError(str(self._lost or error)) from error

    def _next(self, peer: Peer) -> bytes:
        found = peer.inbox.get()
        if found is None:
            raise LeftError(str(self._lost))
        return found

    def _read(self, peer: Peer) -> None:
        try:
            while True:
                kind, data = peer.receive(self._silence_s)
                if kind == _DATA:
                    peer.inbox.put(data)
                elif kind == _DONE:
                    peer.done = True
                elif kind == _LEFT:
                    self._lose(Loss(**json.loads(data)))
        except (OSError, ValueError) as error:
            if not peer.done and not self._closed.is_set():
                self._lose(Loss(peer.process, peer.host, str(error)))

    def _lose(self, loss: Loss) -> None:
        with self._lock:
            if self._lost is not None or self._closed.is_set():
                return
            self._lost = loss
        word = json.dumps(vars(loss)).encode()
        for peer in self._peers.values():
            peer.inbox.put(None)
            if self._index == 0 and peer.process != loss.process:
                with contextlib.suppress(OSError):
                    peer.send(_LEFT, word, wait_s=2 * _TICK_S)
        self._loss_known.set()
        self._on_loss(loss)

    def _beat(self) -> None:
        while not self._closed.wait(min(self._silence_s / 5, 5.0)):
            for peer in self._peers.values():
                with contextlib.suppress(OSError):
                    peer.send(_BEAT, wait_s=0)  # what is being sent is a sign of life, too

    def _close(self) -> None:
        self._closed.set()
        for peer in self._peers.values():
            peer.close()


def _receive_hello(connection: socket.socket) -> bytes:
    found = b""
    while not found.endswith(b"\n") and len(found) < _HELLO_BYTES:
        part = connection.recv(_HELLO_BYTES)
        if not part:
            break
        found += part
    return found


def _own_names() -> list[str]:
    """Under what names this host may be reached from outside."""
    names = []
    for family, target in ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1")):
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((target, 9))  # sends nothing; the kernel says from which address it would
            names.append(probe.getsockname()[0])
    return [*names, socket.gethostname(), "localhost"]


def _pack(said: Sequence[bytes]) -> bytes:
    return b"".join(struct.pack("!Q", len(each)) + each for each in said)


def _unpack(packed: bytes) -> list[bytes]:
    said, at = [], 0
    while at < len(packed):
        (size,) = struct.unpack_from("!Q", packed, at)
        said.append(packed[at + 8 : at + 8 + size])
        at += 8 + size
    return said
