"""Vocabulary trimming: a byte-level BPE tokenizer that keeps only the tokens in use, and the ids that they had.

A pretrained vocabulary has up to 262,144 tokens; the episodes of one environment may use a thousand. The rows of
embedding and head that are never used cost memory, and the head's logits cost time for every token that is sampled or
learnt.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from aem_jax.files import read_json, write_text

TOKENIZER = "tokenizer.json"


def trim_tokenizer(folder: Path, used: Iterable[int], rows: int) -> list[int]:
    """Rewrites a folder's tokenizer.json with the tokens that are needed; returns their old ids, in the new order.

    Kept are the tokens in use, all those that merge into them, every single character (all bytes of a byte-level BPE)
    and every added token that the embedding has. So a text whose tokens are all in use is split as before: each merge
    of its split leads to a token in use, so it is kept, and it still comes before every other merge that is kept. Other
    texts are split into smaller tokens.

    Args:
        folder: of a fast tokenizer.
        used: ids in use.
        rows: rows of the embedding.

    Raises:
        ValueError: the tokenizer is no BPE, or has no such id.
    """
    tokenizer = read_json(folder / TOKENIZER)
    model = tokenizer["model"]
    if model["type"] != "BPE":
        raise ValueError(f"expected a BPE tokenizer, got {model['type']}; its vocabulary cannot be trimmed")
    tokenizer["added_tokens"] = [token for token in tokenizer["added_tokens"] if token["id"] < rows]
    added = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    ids = {**model["vocab"], **added}
    words = {number: word for word, number in ids.items()}
    if unknown := sorted(set(used) - words.keys()):
        raise ValueError(f"expected ids of the tokenizer's {len(words)} tokens, got {unknown[0]}")
    merges = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    kept = _with_parts({words[number] for number in used}, merges)
    kept |= added.keys() | {word for word in model["vocab"] if len(word) == 1 or word.startswith("<0x")}
    old = sorted(ids[word] for word in kept)
    new = {words[number]: index for index, number in enumerate(old)}
    model["vocab"] = {word: new[word] for word in model["vocab"] if word in kept}
    model["merges"] = [list(merge) for merge in merges if {*merge, "".join(merge)} <= kept]
    for token in tokenizer["added_tokens"]:
        token["id"] = new[token["content"]]
    _renumber(tokenizer.get("post_processor") or {}, new)
    write_text(folder / TOKENIZER, json.dumps(tokenizer, ensure_ascii=False, indent=2) + "\n")
    return old


def _with_parts(words: set[str], merges: Iterable[tuple[str, ...]]) -> set[str]:
    """The words, the two parts of each merge that makes one, the parts of those, and so on."""
    parts: dict[str, set[str]] = {}
    for merge in merges:
        parts.setdefault("".join(merge), set()).update(merge)
    known, new = set(words), list(words)
    while new:
        found = parts.get(new.pop(), set()) - known
        known |= found
        new += found
    return known


def _renumber(processor: Mapping[str, Any], new: Mapping[str, int]) -> None:
    """Gives the tokens that a post-processor adds to a text their new ids."""
    for one in (processor, *processor.get("processors", ())):
        special = one.get("special_tokens")
        if isinstance(special, dict):
            for token in special.values():
                token["ids"] = [new[word] for word in token["tokens"]]
