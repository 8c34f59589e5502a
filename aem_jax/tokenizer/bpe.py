"""Training of a small tokenizer on an environment's text, for a run without a pretrained model."""

import os
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from aem_jax.files import valid_text
from aem_jax.tokenizer.chat_template import CHATML

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

WORDS = r"(?:system|user|assistant)\n| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""Units that byte-pair merges do not cross: a word, a number or punctuation, each with the space before it. An object
name then has the same tokens at every position (` drawer`, ` 1`), so the policy can repeat it by copying. The headers
of turns are units too, because they occur in every turn."""

_END_OF_TEXT, _TURN_START, _TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"


def quiet_libraries() -> None:
    """Silences two warnings: PyTorch is missing (which is intended), and threads do not survive a fork."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    """Returns a pattern that matches any of the tokens, longest first. Without tokens it matches nothing."""
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or r"(?!)")


def check_vocab_size(vocab_size: int, whole_words: Sequence[str]) -> None:
    """Refuses a vocabulary without room for all bytes, the control tokens and `whole_words`."""
    if vocab_size < 259 + len(whole_words):
        raise ValueError(
            f"expected vocab_size >= {259 + len(whole_words)} (bytes and control tokens), got {vocab_size}"
        )


def train_bpe(texts: Iterable[str], vocab_size: int, whole_words: Sequence[str]) -> "PreTrainedTokenizerFast":
    """Trains a tokenizer with Qwen's control tokens and the ChatML template; see `ChatTokenizer.train`."""
    if isinstance(texts, str):
        raise ValueError("expected an iterable of texts, got one string; pass [text]")
    check_vocab_size(vocab_size, whole_words)
    quiet_libraries()
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(whole_words),  # type: ignore[call-arg]
        min_frequency=2,
        special_tokens=[_END_OF_TEXT, _TURN_START, _TURN_END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    # Whole words are removed first. Otherwise their letters would produce merges that no text uses.
    words = any_of(whole_words)
    turns = (("user\n", *words.split(valid_text(text)), "assistant\n", "system\n") for text in texts)
    backend.train_from_iterator((piece for turn in turns for piece in turn), trainer)
    backend.add_tokens([AddedToken(word, special=False, normalized=False) for word in whole_words])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=_TURN_END,
        pad_token=_END_OF_TEXT,
        additional_special_tokens=[_TURN_START],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHATML
    return tokenizer
