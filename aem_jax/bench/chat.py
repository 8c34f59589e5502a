"""A chat in bytes for random weights, which needs no trained tokenizer. Its stop ids set the length of responses.

A random policy samples every id about equally often. With s stop ids among V ids, a response ends at each token with
probability s/V, so its length is geometric with mean V/s: most responses are short, and some are many times longer.
"""

from collections.abc import Sequence


class ByteChat:
    """One id for each byte of text; every message begins with its role in angle brackets.

    Args:
        vocab_size: V; ids 0 … s − 1 are the stop ids, the others are bytes.
        mean_tokens: V/s, the mean length of a response whose ids are all equally likely.

    Raises:
        ValueError: the mean would need no stop id, or stop ids alone.
    """

    def __init__(self, vocab_size: int, mean_tokens: float) -> None:
        stops = round(vocab_size / mean_tokens)
        if not 1 <= stops < vocab_size:
            raise ValueError(
                f"expected a mean response of more than 1 and at most {vocab_size} tokens with a vocabulary of "
                f"{vocab_size}, got {mean_tokens}"
            )
        self.stop_ids = tuple(range(stops))
        self._stops, self._others = stops, vocab_size - stops

    def prompt_ids(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Ids of a conversation, up to the beginning of the next response."""
        turns = (f"<{message['role']}>{message['content']}" for message in messages)
        return self._ids("".join(turns) + "<assistant>")

    def delta_ids(self, observation: str, *, closed: bool = True) -> list[int]:
        """Ids between two responses: a stop id if the first one was cut off, then the observation's turn."""
        return [*([] if closed else self.stop_ids[:1]), *self._ids(f"<user>{observation}<assistant>")]

    def decode(self, ids: Sequence[int]) -> str:
        """One letter for each id that is not a stop id."""
        return "".join(chr(97 + token % 26) for token in ids if token >= self._stops)

    def _ids(self, text: str) -> list[int]:
        return [self._stops + byte % self._others for byte in text.encode()]
