"""The tokenizer of a GGUF file: a byte-level BPE from its words and merges, with its control tokens and chat template.

A file does not hold the pattern that splits text before the merges, but its name (`tokenizer.ggml.pre`). The patterns
here are those of the models' own `tokenizer.json`. llama.cpp's are the same, but it does not normalise text for Qwen.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aem_jax.gguf_file import read_header

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_CONTROL, _USER_DEFINED, _UNUSED = 3, 4, 5
"""Types of tokens."""


@dataclass(frozen=True)
class PreTokenizer:
    """What precedes the merges.

    Attributes:
        pattern: of the units that merges do not cross; None is GPT-2's.
        single_digits: whether each digit is a unit of its own, before the pattern is applied.
        normalize: whether text is brought to Unicode's form NFC.
        whole_words: whether a unit that is a word of the vocabulary is taken as it is, without merges.
        add_bos: whether the beginning-of-text token is added, for a file that does not say.
    """

    pattern: str | None = None
    single_digits: bool = False
    normalize: bool = False
    whole_words: bool = False
    add_bos: bool = False


_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}"
    r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

PRE_TOKENIZERS: Mapping[str, PreTokenizer] = {
    "smollm": PreTokenizer(single_digits=True),
    "qwen2": PreTokenizer(_WORDS.format(digits=""), normalize=True),
    "llama-bpe": PreTokenizer(_WORDS.format(digits="{1,3}"), whole_words=True, add_bos=True),
}
"""By `tokenizer.ggml.pre`."""


def gguf_tokenizer(path: Path) -> "PreTrainedTokenizerFast":
    """Builds the tokenizer of a GGUF file.

    Raises:
        ValueError: not a GGUF file, another kind of tokenizer, an unknown pre-tokenizer, or damaged fields.
    """
    header = read_header(path)
    try:
        return _tokenizer(header.fields)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _tokenizer(fields: Mapping[str, Any]) -> "PreTrainedTokenizerFast":
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    kind, name = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre")
    if kind != "gpt2":
        raise ValueError(f"expected tokenizer.ggml.model 'gpt2' (byte-level BPE), got {kind!r:.80}")
    pre = PRE_TOKENIZERS.get(name) if isinstance(name, str) else None
    if pre is None:
        raise ValueError(f"expected tokenizer.ggml.pre to be one of {', '.join(PRE_TOKENIZERS)}, got {name!r:.80}")
    words, types = _array(fields, "tokens", str), _array(fields, "token_type", int)
    merges = [tuple(merge.split(" ")) for merge in _array(fields, "merges", str)]
    if len(types) != len(words):
        raise ValueError(f"expected a token_type for each of {len(words)} tokens, got {len(types)}")
    if broken := [merge for merge in merges if len(merge) != 2]:
        raise ValueError(f"expected merges of two words with a space between, got {broken[0]!r:.80}")
    if len(set(words)) < len(words):
        raise ValueError(f"expected each token once, got {Counter(words).most_common(1)[0][0]!r:.80} twice")
    # Rows of the embedding that no text gives have placeholders as words.
    vocab = {word: token for token, (word, kind) in enumerate(zip(words, types)) if kind != _UNUSED}
    missing = {part for merge in merges for part in (*merge, "".join(merge)) if part not in vocab}
    if missing:
        raise ValueError(f"expected the words of all merges among the tokens, got no {min(missing)!r:.80}")

    backend = Tokenizer(models.BPE(vocab, merges, ignore_merges=pre.whole_words))
    digits = [pre_tokenizers.Digits(individual_digits=True)] if pre.single_digits else []
    split = [pre_tokenizers.Split(Regex(pre.pattern), behavior="isolated")] if pre.pattern else []
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not pre.pattern)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*digits, *split, byte_level])  # type: ignore[assignment]
    backend.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    if pre.normalize:
        backend.normalizer = normalizers.NFC()  # type: ignore[assignment]
    added = [(word, kind == _CONTROL) for word, kind in zip(words, types) if kind in (_CONTROL, _USER_DEFINED)]
    backend.add_tokens([AddedToken(word, special=special, normalized=False) for word, special in added])
    ends = {
        ours: words[token]
        for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown"))
        if (token := _token(fields, theirs, len(words))) is not None
    }
    if fields.get("tokenizer.ggml.add_bos_token", pre.add_bos) and "bos" in ends:
        bos = ends["bos"]
        backend.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
            single=[bos, "$A"], pair=[bos, "$A", bos, "$B"], special_tokens=[(bos, vocab[bos])]
        )
    template = fields.get("tokenizer.chat_template")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        clean_up_tokenization_spaces=False,
        **{f"{end}_token": word for end, word in ends.items()},
    )
    if template is not None:
        tokenizer.chat_template = template
    return tokenizer


def _array(fields: Mapping[str, Any], name: str, kind: type) -> Sequence[Any]:
    values = fields.get(f"tokenizer.ggml.{name}")
    if not isinstance(values, list) or not all(type(value) is kind for value in values):
        got = "no such field" if values is None else f"{values!r:.80}"
        raise ValueError(f"expected tokenizer.ggml.{name} to be an array of {kind.__name__}, got {got}")
    return values


def _token(fields: Mapping[str, Any], name: str, count: int) -> int | None:
    """The id in a field; None without one."""
    token = fields.get(f"tokenizer.ggml.{name}_token_id")
    if token is not None and not (type(token) is int and 0 <= token < count):
        raise ValueError(f"expected tokenizer.ggml.{name}_token_id to be one of {count} tokens, got {token!r:.80}")
    return token
