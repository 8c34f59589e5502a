"""A conversation in bytes, for random weights: no tokenizer to train, and stop ids that set how long responses are.

A random policy says every id about equally often, so a response ends with probability s/V at each token, s of V ids
being stop ids: its length is geometric with mean V/s. Most responses are short, some are many times that.
"""

from collections.abc import Sequence


class ByteChat:
    """Text is one id a byte, and every message is led by its role in angle brackets.

    Args:
        vocab_size: V; ids 0 … s − 1 are the stop ids, the others stand for bytes.
        mean_tokens: V/s, the mean length of a response of which every id is as likely.

    Raises:
        ValueError: a mean for which there would be no stop id, or no id but those.
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
        """Ids of a conversation, up to where the next response begins."""
        return self._ids("".join(f"<{each['role']}>{each['content']}" for each in messages) + "<assistant>")

    def delta_ids(self, observation: str, *, closed: bool = True) -> list[int]:
        """Ids between a response and the next: closing it if it was cut, then the observation's turn."""
        return [*([] if closed else self.stop_ids[:1]), *self._ids(f"<user>{observation}<assistant>")]

    def decode(self, ids: Sequence[int]) -> str:
        """A letter for each id that is no stop id."""
        return "".join(chr(97 + each % 26) for each in ids if each >= self._stops)

    def _ids(self, text: str) -> list[int]:
        return [self._stops + byte % self._others for byte in text.encode()]
