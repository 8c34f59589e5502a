"""A trimmed tokenizer splits the texts in use as before; a trimmed model has the logits of the tokens that are left."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from aem_jax.launch import cli
from aem_jax.models import ModelConfig, Policy, from_pretrained, save_pretrained
from aem_jax.tokenizer import ChatTokenizer
from aem_jax.tokenizer.trim import trim_tokenizer

SMALL = Path(__file__).parent / "launch" / "small.toml"
USED = ["You arrive at drawer 1. The drawer 1 is closed.", "<action>go to shelf 12</action>", "Nothing happens."]
OTHER = ["A gardener pours the water over the shelter.", "Où est l’étagère ? \U0001f600", "closest drawings"]
CONFIG = ModelConfig(512, 32, 48, 2, 4, 2, 8, qk_norm=None, qkv_bias=True, max_positions=512)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    ChatTokenizer.train((USED + OTHER) * 4, vocab_size=400).save_pretrained(folder)
    return folder


def copied(folder: Path, target: Path) -> Path:
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def test_texts_in_use_are_split_as_before_and_others_into_smaller_tokens(original: Path, tmp_path: Path):
    before = ChatTokenizer.from_pretrained(original)
    conversation = [{"role": "user", "content": USED[0]}]
    texts = [before.encode(text) for text in USED] + [before.prompt_ids(conversation), before.delta_ids(USED[2])]
    folder = copied(original, tmp_path / "trimmed")
    content = json.loads((folder / "tokenizer.json").read_text())
    beyond = {**content["added_tokens"][-1], "content": "<image>", "id": before.vocab_size, "special": True}
    content["added_tokens"].append(beyond)  # as in Gemma 3 1B, whose embedding has no row for it
    (folder / "tokenizer.json").write_text(json.dumps(content))
    assert ChatTokenizer.from_pretrained(folder).vocab_size == before.vocab_size
    old = np.asarray(trim_tokenizer(folder, {token for ids in texts for token in ids}, before.vocab_size))
    assert "<image>" not in (folder / "tokenizer.json").read_text()
    after = ChatTokenizer.from_pretrained(folder)
    assert len(old) == after.vocab_size < before.vocab_size and (np.diff(old) > 0).all()
    again = [after.encode(text) for text in USED] + [after.prompt_ids(conversation), after.delta_ids(USED[2])]
    assert [old[ids].tolist() for ids in again] == texts
    assert [int(old[token]) for token in after.stop_ids] == list(before.stop_ids)
    for text in OTHER:
        ids = after.encode(text)
        assert after.decode(ids) == text and len(ids) > len(before.encode(text))


def test_the_tokens_that_begin_a_text_are_numbered_anew(tmp_path: Path):
    """Llama 3's form: merges as texts, and a begin-of-text token that the post-processor adds."""
    vocab = {word: number for number, word in enumerate("zyxabc")} | {"ab": 6, "yz": 7, "abc": 8, "yzx": 9}
    merges = [("a", "b"), ("y", "z"), ("ab", "c"), ("yz", "x")]
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.add_special_tokens(["<|begin|>"])
    begin = [("<|begin|>", tokenizer.token_to_id("<|begin|>"))]
    tokenizer.post_processor = processors.TemplateProcessing(single="<|begin|> $A", special_tokens=begin)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["model"]["merges"] = [" ".join(merge) for merge in merges]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    old = trim_tokenizer(tmp_path, tokenizer.encode("abc").ids, tokenizer.get_vocab_size())
    after = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert after.encode("abc").tokens == ["<|begin|>", "abc"]
    assert [old[token] for token in after.encode("abc").ids] == tokenizer.encode("abc").ids
    assert after.encode("yzx").tokens == ["<|begin|>", "y", "z", "x"]
    assert len(old) == 6 + 2 + 1  # letters, ab and abc, and the begin


def test_what_cannot_be_trimmed_is_refused(original: Path, tmp_path: Path):
    folder = copied(original, tmp_path / "one")
    with pytest.raises(ValueError, match="expected ids of the tokenizer's .* tokens, got 99999"):
        trim_tokenizer(folder, [99999], 400)
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    words.pre_tokenizer, words.decoder = pre_tokenizers.Whitespace(), decoders.Fuse()
    words.save(str(folder / "tokenizer.json"))
    with pytest.raises(ValueError, match="expected a BPE tokenizer, got WordLevel"):
        trim_tokenizer(folder, [0], 2)


def test_a_model_is_trimmed_to_its_environment(original: Path, tmp_path: Path, capsys):
    """Logits of the tokens that are left are those of the model as it was, to the last bit."""
    model, out = tmp_path / "model", tmp_path / "out"
    save_pretrained(model, CONFIG, Policy(CONFIG).init(jax.random.key(0)), source=original)
    words = ["--preset", str(SMALL), "--model.dtype", "float32"]
    words += ["--warmstart.episodes", "3", "--tokenizer.episodes", "2", "--rollout.context-tokens", "1024"]
    words += ["--rollout.prompt-tokens", "700"]
    assert cli.main(["trim", str(out), *words]) == 2
    assert "--model.path: expected a model to trim, got none" in capsys.readouterr().err
    words += ["--model.path", str(model)]
    assert cli.main(["trim", str(out), *words]) == 0
    assert "tokens;" in (said := capsys.readouterr().out) and "in 3 episodes of alfworld" in said
    assert cli.main(["trim", str(out), *words]) == 2
    assert "expected a new or empty folder to write a model to" in capsys.readouterr().err
    before, after = (from_pretrained(folder, dtype="float32") for folder in (model, out))
    names = [ChatTokenizer.from_pretrained(folder) for folder in (model, out)]
    text = "You are in the middle of a room."
    ids = [np.asarray([chat.encode(text)]) for chat in names]
    assert ids[0].shape == ids[1].shape and after.config.vocab_size == names[1].vocab_size < CONFIG.vocab_size
    of = [json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"] for folder in (model, out)]
    left = sorted(of[1], key=of[1].__getitem__)
    logits = [np.asarray(one.logits(tokens)) for one, tokens in zip((before, after), ids, strict=True)]
    rows = [[vocabulary[word] for word in left] for vocabulary in of]
    for name in ("embed", "head") if "head" in after.params["base"] else ("embed",):
        was, now = (np.asarray(one.params["base"][name]) for one in (before, after))
        axis = now.shape.index(after.config.vocab_size)
        np.testing.assert_array_equal(now.take(rows[1], axis), was.take(rows[0], axis))
    # The same products; their rounding depends on the number of rows, in which XLA divides them.
    np.testing.assert_allclose(logits[1][..., rows[1]], logits[0][..., rows[0]], rtol=0, atol=2e-6)
