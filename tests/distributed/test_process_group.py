"""What a run of one process is spared, and how things are dealt to several."""

import pytest

from aem_jax.distributed import ALONE, Hosts


def test_alone_nothing_is_encoded():
    thing = object()
    assert ALONE.gather_json(thing) == [thing] and ALONE.of_first(thing) is thing
    assert ALONE.largest(3) == 3 and ALONE.is_first
    ALONE.wait()


@pytest.mark.parametrize(("size", "count"), [(8, 2), (7, 3), (2, 4), (0, 3)])
def test_shares_are_neighbours_and_even(size: int, count: int):
    shares = [Hosts(index, count, lambda data: [data]).share(size) for index in range(count)]
    assert [each for share in shares for each in share] == list(range(size))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
