"""The tokenizer of a GGUF file against the model family's own in transformers, with one trained vocabulary."""

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from gguf_files import write_gguf
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer
from transformers.convert_slow_tokenizer import TikTokenConverter

from aem_jax.tokenizer import CHATML, ChatTokenizer
from aem_jax.tokenizer.gguf import PRE_TOKENIZERS, gguf_tokenizer

CONTROL, USER_DEFINED, UNUSED = 3, 4, 5
ADDED = {"<|endoftext|>": CONTROL, "<|im_start|>": CONTROL, "<|im_end|>": CONTROL, "<think>": USER_DEFINED}
TEXTS = [
    "It's the mug's, they'LL go to drawer 12  999 and 1000000: 3.14159.",
    "naïve café ﬁ e\u0301 中文字 مرحبا 🙂👍🏽\u200d \ufeff",
    "def f(x):\n\treturn x**2  # why\n\n\n    pass\r\n",
    "²³ ½ ٣٤  Ⅷ １２３",
    " \n\t leading, and trailing \n ",
    "<think>\nhm</think> <|im_end|>\n<|endoftext|>",
    "",
]


def random_text(seed: int) -> str:
    rng = random.Random(seed)
    pools = (
        "abcXYZ'sT",
        "0123456789²½٣Ⅷ",
        " \n\t\r\u00a0\u3000",
        "éé\u0301ﬁ中عב🙂\u200d",
        "<>|!?.,;",
        "\x00\x07\ufeff",
    )
    return "".join(rng.choice(rng.choice(pools)) for _ in range(rng.randrange(1, 40)))


@pytest.fixture(scope="module")
def fields() -> dict[str, Any]:
    """The tokenizer's fields of a small vocabulary, with two rows without a word at the end."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)  # type: ignore[assignment]
    # Also merges that no pre-tokenizer lets happen in the same places: a difference between two of them shows.
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=letters, show_progress=False)  # type: ignore[call-arg]
    trained.train_from_iterator([*TEXTS, *map(random_text, range(1000, 1400))], trainer)
    state = json.loads(trained.to_str())["model"]
    words = sorted(state["vocab"], key=state["vocab"].__getitem__)
    types = [1] * len(words) + [*ADDED.values(), UNUSED, UNUSED]
    return {
        "general.architecture": "qwen2",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": [*words, *ADDED, "[PAD0]", "[PAD1]"],
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": [" ".join(merge) for merge in state["merges"]],
        "tokenizer.ggml.bos_token_id": len(words),
        "tokenizer.ggml.eos_token_id": len(words) + 2,
        "tokenizer.ggml.padding_token_id": len(words),
        "tokenizer.chat_template": CHATML,
    }


def theirs(fields: dict[str, Any], pre: str) -> Tokenizer:
    """The tokenizer as transformers makes it of vocabulary and merges."""
    words, merges = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.merges"]
    vocab = {word: token for token, word in enumerate(words[:-2])}
    pairs: Any = [tuple(merge.split(" ")) for merge in merges]
    backend = Qwen2Tokenizer(vocab=vocab, merges=pairs).backend_tokenizer
    if pre != "qwen2":
        backend.normalizer = None  # type: ignore[assignment]
        split = {
            "llama-bpe": pre_tokenizers.Split(Regex(TikTokenConverter().pattern), behavior="isolated"),
            "smollm": pre_tokenizers.Digits(individual_digits=True),
        }[pre]
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre == "smollm")
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])  # type: ignore[assignment]
        backend.model = models.BPE(vocab, pairs, ignore_merges=pre == "llama-bpe")
    backend.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    return backend


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_ids_equal_those_of_transformers(pre: str, fields: dict[str, Any], tmp_path: Path):
    path = write_gguf(tmp_path / "model.gguf", {**fields, "tokenizer.ggml.pre": pre})
    tokenizer, expected = gguf_tokenizer(path), theirs(fields, pre)
    added = [word for word in ADDED if word != "<|endoftext|>"]
    expected.add_special_tokens(["<|endoftext|>", *added])
    texts = [*TEXTS, *map(random_text, range(500))]
    for text in texts:
        assert tokenizer.encode(text, add_special_tokens=False) == expected.encode(text).ids, text
        if pre != "qwen2":  # which normalises
            assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_the_pre_tokenizers_differ(fields: dict[str, Any], tmp_path: Path):
    made = [gguf_tokenizer(write_gguf(tmp_path / pre, {**fields, "tokenizer.ggml.pre": pre})) for pre in PRE_TOKENIZERS]
    texts = [*TEXTS, *map(random_text, range(100))]
    ids = [[tokenizer.encode(text) for text in texts] for tokenizer in made]
    assert ids[0] != ids[1] != ids[2] != ids[0]


def test_control_tokens_template_and_saved_files(fields: dict[str, Any], tmp_path: Path):
    chat = ChatTokenizer.from_pretrained(write_gguf(tmp_path / "model.gguf", fields))
    base = len(fields["tokenizer.ggml.tokens"]) - 6
    assert (chat.stop_ids, chat.pad_id, chat.vocab_size) == ((base + 2,), base, base + 4)
    messages = [{"role": "user", "content": "Go. <|im_end|>"}]
    ids = chat.prompt_ids(messages)
    assert ids[0] == base + 1 and ids.count(base + 2) == 1  # the message's own is text
    assert chat.encode("<think>") == [base + 3] and base + 2 not in chat.encode("<|im_end|>")
    chat.save_pretrained(tmp_path / "saved")
    again = ChatTokenizer.from_pretrained(tmp_path / "saved")
    assert again.prompt_ids(messages) == ids and again.delta_ids("You see 12.") == chat.delta_ids("You see 12.")
    bare = write_gguf(tmp_path / "bare.gguf", {**fields, "tokenizer.chat_template": None})
    with pytest.raises(ValueError, match="expected a tokenizer with a chat template, got none; pass chat_template"):
        ChatTokenizer.from_pretrained(bare)
    assert ChatTokenizer.from_pretrained(bare, chat_template=CHATML).prompt_ids(messages) == ids


def test_the_beginning_of_text_is_added_as_the_file_says(fields: dict[str, Any], tmp_path: Path):
    bos = fields["tokenizer.ggml.bos_token_id"]
    for pre, says, adds in (("qwen2", None, False), ("qwen2", True, True), ("llama-bpe", None, True)):
        changed = {**fields, "tokenizer.ggml.pre": pre, "tokenizer.ggml.add_bos_token": says}
        tokenizer = gguf_tokenizer(write_gguf(tmp_path / "model.gguf", changed))
        tokenizer.save_pretrained(tmp_path / f"{pre}-{says}")
        for made in (tokenizer, PreTrainedTokenizerFast.from_pretrained(tmp_path / f"{pre}-{says}")):
            assert (made.encode("go")[0] == bos) is adds
            assert made.bos_token_id == bos and made.eos_token_id == bos + 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "llama"}, r"expected tokenizer.ggml.model 'gpt2' \(byte-level BPE\), got 'llama'"),
        ({"model": None}, "expected tokenizer.ggml.model 'gpt2' .*, got None"),
        ({"pre": "tekken"}, "expected tokenizer.ggml.pre to be one of smollm, qwen2, llama-bpe, got 'tekken'"),
        ({"pre": None}, "expected tokenizer.ggml.pre to be one of smollm, qwen2, llama-bpe, got None"),
        ({"tokens": None}, "expected tokenizer.ggml.tokens to be an array of str, got no such field"),
        ({"token_type": [1, 2]}, r"expected a token_type for each of \d+ tokens, got 2"),
        ({"merges": ["a b c"]}, r"expected merges of two words with a space between, got \('a', 'b', 'c'\)"),
        ({"merges": ["a zzz"]}, "expected the words of all merges among the tokens, got no 'azzz'"),
        ({"eos_token_id": 10**6}, r"expected tokenizer.ggml.eos_token_id to be one of \d+ tokens, got 1000000"),
    ],
)
def test_a_field_that_is_missing_or_not_supported_is_named(
    changes: dict[str, Any], message: str, fields: dict[str, Any], tmp_path: Path
):
    changed = {**fields, **{f"tokenizer.ggml.{name}": value for name, value in changes.items()}}
    path = write_gguf(tmp_path / "model.gguf", changed)
    with pytest.raises(ValueError, match=message) as caught:
        ChatTokenizer.from_pretrained(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_damaged_fields_give_one_line_or_a_tokenizer(fields: dict[str, Any], tmp_path: Path):
    path, counts = write_gguf(tmp_path / "model.gguf", fields), Counter()
    content = path.read_bytes()
    for seed in range(150):
        rng, damaged = random.Random(seed), bytearray(content)
        for _ in range(rng.choice((1, 20))):
            # The first and the last fields, and anything.
            at = rng.choice((rng.randrange(200), rng.randrange(len(content)), -rng.randrange(1, 900)))
            damaged[at] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            counts["read"] += bool(ChatTokenizer.from_pretrained(path).encode("go to drawer 12"))
        except ValueError as error:
            assert "\n" not in str(error), seed
            counts["refused"] += 1
    assert counts["read"] > 3 and counts["refused"] > 60, counts


def test_a_word_that_is_there_twice_is_refused(fields: dict[str, Any], tmp_path: Path):
    words = [*fields["tokenizer.ggml.tokens"][:-1], "[PAD0]"]
    path = write_gguf(tmp_path / "model.gguf", {**fields, "tokenizer.ggml.tokens": words})
    with pytest.raises(ValueError, match=r"expected each token once, got '\[PAD0\]' twice"):
        ChatTokenizer.from_pretrained(path)
    with pytest.raises(ValueError, match=r"expected a GGUF file, got No such file or directory for .*none.gguf"):
        ChatTokenizer.from_pretrained(tmp_path / "none.gguf")
