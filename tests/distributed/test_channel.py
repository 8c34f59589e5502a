"""The control channel: every message reaches all processes, and failed ones are named. Threads stand for processes."""

import queue
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from aem_jax.distributed.channel import ControlChannel, Peer, PeerDisconnectedError, PeerFailure, accept, call, listen


class Ends:
    """The ends of a channel, and the failures that each detects."""

    def __init__(self, count: int, heartbeat_timeout_s: float = 30.0):
        server, address = listen(["127.0.0.1"])
        with ThreadPoolExecutor() as pool:
            calls = [pool.submit(call, address, process, 20.0) for process in range(1, count)]
            self.peers = [accept(server, address, count, 20.0), *(future.result() for future in calls)]
        self.failures: list[queue.Queue[PeerFailure]] = [queue.Queue() for _ in range(count)]
        self.channels = [
            ControlChannel(
                index, peers, heartbeat_timeout_s, lambda _, failure, index=index: self.failures[index].put(failure)
            )
            for index, peers in enumerate(self.peers)
        ]

    def on_all(self, function, *arguments):
        """`function(channel, its argument)` of all ends at once; exceptions are returned."""

        def one(index: int):
            try:
                return function(self.channels[index], *(values[index] for values in arguments))
            except Exception as error:
                return error

        with ThreadPoolExecutor() as pool:
            return list(pool.map(one, range(len(self.channels))))

    def cut(self, index: int) -> None:
        """Closes the connections without a message, as a kill does."""
        self.channels[index]._closed.set()  # else its threads, alive in this process, name a peer
        for peer in self.peers[index].values():
            peer._connection.shutdown(socket.SHUT_RDWR)


def test_gather_returns_the_messages_of_all_processes():
    ends = Ends(3)
    for messages in ([b"a", b"", b"ccc"], [b"x" * 3_000_000, b"y", b"z" * 70_000]):
        assert ends.on_all(ControlChannel.gather, messages) == [messages] * 3
    assert ends.on_all(ControlChannel.close) == [None] * 3
    time.sleep(0.1)
    assert all(failures.empty() for failures in ends.failures)  # closing together is not a failure


@pytest.mark.parametrize("gone", [0, 1])
def test_a_killed_process_is_named_to_all_others(gone: int):
    ends = Ends(3)
    ends.cut(gone)
    for index in {0, 1, 2} - {gone}:
        failure = ends.failures[index].get(timeout=10)
        assert failure.process == gone and "killed" in failure.reason and not failure.reported
        with pytest.raises(PeerDisconnectedError, match=f"process {gone} "):
            ends.channels[index].gather(b"more")


def test_a_gather_ends_when_another_process_is_killed():
    ends = Ends(3)
    with ThreadPoolExecutor() as pool:
        waiting = [pool.submit(ends.channels[index].gather, b"here") for index in (0, 2)]
        time.sleep(0.2)
        ends.cut(1)
        for future in waiting:
            with pytest.raises(PeerDisconnectedError, match="process 1 "):
                future.result(timeout=10)


def test_abort_reports_the_reason_to_all_others():
    ends = Ends(3)
    ends.channels[2].abort("no space left on /data", exit_status=1)
    for index in (0, 1):
        failure = ends.failures[index].get(timeout=10)
        assert failure.reported and failure.process == 2 and failure.exit_status == 1
        assert str(failure) == f"process 2 (on {socket.gethostname()}) left: no space left on /data"


def test_process_0_leaves_last():
    """It runs JAX's coordination service, without which the others abort."""
    ends = Ends(3)
    started = time.monotonic()
    with ThreadPoolExecutor() as pool:
        aborting = pool.submit(ends.channels[0].abort, "the license has expired", 2, wait_s=60.0)
        for index in (1, 2):
            assert ends.failures[index].get(timeout=10).exit_status == 2
            assert not aborting.done()
            time.sleep(0.2)
            ends.channels[index].wait_until_left(60.0)  # only process 0 waits
            ends.cut(index)
        aborting.result(timeout=10)
    assert time.monotonic() - started < 10
    assert ends.failures[0].empty()  # those that left are no failures
    ends = Ends(2)
    ends.channels[0].abort("the license has expired", 2, wait_s=0.5)  # process 1 stays
    assert ends.failures[1].get(timeout=10).process == 0


def test_a_silent_process_is_detected():
    server, address = listen(["127.0.0.1"])
    with ThreadPoolExecutor() as pool:
        silent = pool.submit(call, address, 1, 20.0)  # a peer without a channel: it sends nothing
        peers = accept(server, address, 2, 20.0)
    failures: queue.Queue[PeerFailure] = queue.Queue()
    ControlChannel(0, peers, 2.0, lambda _, failure: failures.put(failure))
    assert failures.get(timeout=20).reason == "nothing was received from it for 2 s"
    assert isinstance(silent.result()[0], Peer)


def test_idle_processes_are_no_failures():
    ends = Ends(2, heartbeat_timeout_s=2.0)
    time.sleep(5.0)
    assert ends.on_all(ControlChannel.gather, [b"a", b"b"]) == [[b"a", b"b"]] * 2


def test_strangers_are_refused_and_missing_processes_named():
    server, address = listen(["127.0.0.1"])
    with ThreadPoolExecutor() as pool:
        stranger = pool.submit(call, replace(address, hosts=("127.0.0.1",), token="guess"), 1, 1.0)
        with pytest.raises(TimeoutError, match=r"each of 3 processes on port \d+ within 2 s, got none of \[1, 2\]"):
            accept(server, address, 3, 2.0)
        server.close()
        with pytest.raises(TimeoutError, match="process 1 cannot reach process 0 on port"):
            stranger.result()


def test_heartbeats_do_not_disturb_large_messages():
    ends = Ends(2, heartbeat_timeout_s=1.0)  # beats five times a second
    messages = [bytes(5_000_000), bytes(3_000_000)]
    for _ in range(3):
        assert ends.on_all(ControlChannel.gather, messages) == [messages] * 2
        time.sleep(0.2)
    assert threading.active_count() < 100
