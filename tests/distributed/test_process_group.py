"""A single process encodes nothing, and items are split evenly over several processes."""

import pytest

from aem_jax.distributed import SINGLE_PROCESS, ProcessGroup


def test_a_single_process_encodes_nothing():
    thing = object()
    assert SINGLE_PROCESS.gather_json(thing) == [thing] and SINGLE_PROCESS.broadcast(thing) is thing
    assert SINGLE_PROCESS.max(3) == 3 and SINGLE_PROCESS.is_first
    SINGLE_PROCESS.barrier()


@pytest.mark.parametrize(("size", "count"), [(8, 2), (7, 3), (2, 4), (0, 3)])
def test_shards_are_contiguous_and_even(size: int, count: int):
    shares = [ProcessGroup(index, count, lambda data: [data]).shard(size) for index in range(count)]
    assert [item for share in shares for item in share] == list(range(size))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
