"""The line between processes: what each says reaches all, and who leaves is named. Threads stand for processes."""

import queue
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from aem_jax.distributed.channel import LeftError, Line, Loss, Peer, accept, call, listen


class Ends:
    """The ends of a line, and what each was told of losses."""

    def __init__(self, count: int, silence_s: float = 30.0):
        server, address = listen(["127.0.0.1"])
        with ThreadPoolExecutor() as pool:
            calls = [pool.submit(call, address, process, 20.0) for process in range(1, count)]
            self.peers = [accept(server, address, count, 20.0), *(each.result() for each in calls)]
        self.losses: list[queue.Queue[Loss]] = [queue.Queue() for _ in range(count)]
        self.lines = [Line(index, peers, silence_s, self.losses[index].put) for index, peers in enumerate(self.peers)]

    def each(self, function, *arguments):
        """`function(line, its argument)` of all ends at once; exceptions are returned."""

        def one(index: int):
            try:
                return function(self.lines[index], *(each[index] for each in arguments))
            except Exception as error:
                return error

        with ThreadPoolExecutor() as pool:
            return list(pool.map(one, range(len(self.lines))))

    def cut(self, index: int) -> None:
        """What a kill does: the connections close, nothing is said."""
        self.lines[index]._closed.set()  # its threads live on here, and would name who closes first on their side
        for peer in self.peers[index].values():
            peer._connection.shutdown(socket.SHUT_RDWR)


def test_all_hear_what_each_says():
    ends = Ends(3)
    for said in ([b"a", b"", b"ccc"], [b"x" * 3_000_000, b"y", b"z" * 70_000]):
        assert ends.each(Line.gather, said) == [said] * 3
    assert ends.each(Line.leave) == [None] * 3
    time.sleep(0.1)
    assert all(found.empty() for found in ends.losses)  # who leaves with the others is no loss


@pytest.mark.parametrize("gone", [0, 1])
def test_one_that_is_killed_is_named_to_all_others(gone: int):
    ends = Ends(3)
    ends.cut(gone)
    for index in {0, 1, 2} - {gone}:
        loss = ends.losses[index].get(timeout=10)
        assert loss.process == gone and "killed" in loss.why and not loss.told
        with pytest.raises(LeftError, match=f"process {gone} "):
            ends.lines[index].gather(b"more")


def test_a_wait_ends_when_another_is_killed():
    ends = Ends(3)
    with ThreadPoolExecutor() as pool:
        waiting = [pool.submit(ends.lines[index].gather, b"here") for index in (0, 2)]
        time.sleep(0.2)
        ends.cut(1)
        for each in waiting:
            with pytest.raises(LeftError, match="process 1 "):
                each.result(timeout=10)


def test_one_that_has_to_leave_says_why():
    ends = Ends(3)
    ends.lines[2].fail("no space left on /data")
    for index in (0, 1):
        loss = ends.losses[index].get(timeout=10)
        assert loss.told and loss.process == 2
        assert str(loss) == f"process 2 (on {socket.gethostname()}) left: no space left on /data"


def test_one_that_falls_silent_is_missed():
    server, address = listen(["127.0.0.1"])
    with ThreadPoolExecutor() as pool:
        silent = pool.submit(call, address, 1, 20.0)  # a peer without a line: it never says anything
        peers = accept(server, address, 2, 20.0)
    losses: queue.Queue[Loss] = queue.Queue()
    Line(0, peers, 2.0, losses.put)
    assert losses.get(timeout=20).why == "nothing was heard of it for 2 s"
    assert isinstance(silent.result()[0], Peer)


def test_nobody_is_missed_while_all_are_there():
    ends = Ends(2, silence_s=2.0)
    time.sleep(5.0)
    assert ends.each(Line.gather, [b"a", b"b"]) == [[b"a", b"b"]] * 2


def test_strangers_are_sent_away_and_who_does_not_call_is_named():
    server, address = listen(["127.0.0.1"])
    with ThreadPoolExecutor() as pool:
        stranger = pool.submit(call, replace(address, hosts=("127.0.0.1",), token="guess"), 1, 1.0)
        with pytest.raises(TimeoutError, match=r"each of 3 processes on port \d+ within 2 s, got none of \[1, 2\]"):
            accept(server, address, 3, 2.0)
        server.close()
        with pytest.raises(TimeoutError, match="process 1 cannot reach process 0 on port"):
            stranger.result()


def test_beats_do_not_disturb_large_messages():
    ends = Ends(2, silence_s=1.0)  # beats five times a second
    said = [bytes(5_000_000), bytes(3_000_000)]
    for _ in range(3):
        assert ends.each(Line.gather, said) == [said] * 2
        time.sleep(0.2)
    assert threading.active_count() < 100
