"""Lengths of thoughts in tokens, and the phrasings that are drawn."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

SMOLLM2 = Path(__file__).parents[2] / "models/smollm2-135m/tokenizer.json"


def bpe_lengths(texts: Sequence[str]) -> list[int]:
    """Lengths with a tokenizer of 1,024 words that is trained on half of the texts."""
    from aem_jax.tokenizer.bpe import train_bpe

    tokenizer = train_bpe(texts[::2], 1024, ())
    return [len(tokenizer.encode(text)) for text in texts]


def smollm2_lengths(texts: Sequence[str]) -> list[int]:
    """Lengths with SmolLM2's tokenizer."""
    if not SMOLLM2.exists():
        pytest.skip(f"needs SmolLM2's tokenizer in {SMOLLM2.parent}")
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(SMOLLM2))
    return [len(encoding.ids) for encoding in tokenizer.encode_batch(list(texts))]


class Recorder(random.Random):
    """A source of draws that records what it chooses."""

    def __init__(self, seed: int):
        super().__init__(seed)
        self.chosen: set[Any] = set()

    def choice(self, seq: Sequence[Any]) -> Any:
        """Draws an element, as `random.Random` does."""
        chosen = super().choice(seq)
        self.chosen.add(chosen)
        return chosen
