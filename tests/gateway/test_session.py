"""Texts of growing responses: where a stop text ends them."""

import random

import pytest

from aem_jax.gateway.session import _Text

from .fakes import RequestChat


class CountingChat(RequestChat):
    """Counts what is decoded."""

    calls = 0

    def decode(self, ids):
        self.calls += 1
        return super().decode(ids)


@pytest.mark.parametrize("chunk", [1, 3, 40])
def test_a_response_ends_with_the_first_id_that_completes_a_stop_text(chunk):
    chat, rng = RequestChat(), random.Random(0)
    for _ in range(50):
        ids = chat.encode("".join(rng.choices("abc", k=40)))
        text, stops = _Text(chat, None, ("abca", "bb")), []
        for count in range(chunk, len(ids) + chunk, chunk):
            stops.append(text.update(ids[:count], False)[1])
            if stops[-1] is not None:
                break
        completes = (n for n in range(41) if any(stop in chat.decode(ids[:n]) for stop in ("abca", "bb")))
        assert stops[-1] == next(completes, None) and not any(stops[:-1])


def test_a_stop_text_is_found_with_few_decodings():
    """Each takes milliseconds in the endpoint's event loop."""
    chat = CountingChat()
    ids = chat.encode("x" * 4000 + "end")
    text = _Text(chat, None, ("end",))
    assert text.update(ids[:2000], False)[1] is None and text.update(ids, False)[1] == 4003
    assert chat.calls < 20
