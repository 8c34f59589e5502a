"""BM25 with Lucene's arithmetic: arrays that can be mapped from files, and the ranking of matching documents.

    score(d) = Σ_t qtf_t · idf_t · (1 − 1 / (1 + tf_{t,d} · norm_d))
    idf_t    = log(1 + (N − df_t + ½) / (df_t + ½))
    norm_d   = 1 / (k1 · (1 − b + b · length_d / average length))

Lucene stores a document's length in one byte, multiplies in float32 and sums in float64. The document id decides ties.
Parity to the last bit matters, because a page shows ten documents, and the scores of similar products may differ only
in the last bit. k1 = 0.9 and b = 0.4 are Anserini's values.
"""

import json
import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from aem_jax.envs.webshop.analysis import terms

K1, B = np.float32(0.9), np.float32(0.4)
_ARRAYS = ("offsets", "documents", "frequencies", "norms", "order")


@dataclass(frozen=True)
class Ranking:
    """An index over D documents with V terms and P postings.

    Attributes:
        vocabulary: the V terms, sorted.
        offsets: int64 [V + 1], start of each term's postings.
        documents: int32 [P], document numbers, increasing within a term.
        frequencies: float32 [P], frequency of the term in that document.
        norms: float32 [D], `norm_d` of the module's equation.
        order: int32 [D], rank of each document's id; decides ties.
        counted: number of documents with at least one term, Lucene's N.
    """

    vocabulary: Sequence[bytes]
    offsets: np.ndarray
    documents: np.ndarray
    frequencies: np.ndarray
    norms: np.ndarray
    order: np.ndarray
    counted: int

    def search(self, query: str, limit: int = 50) -> np.ndarray:
        """Returns the numbers of the best matching documents, i32 [≤ limit], best first.

        Args:
            query: free text. Without a term of the vocabulary, the result is empty.
            limit: maximum number of documents.
        """
        scores = np.zeros(len(self.norms), np.float64)
        hit = np.zeros(len(self.norms), np.bool_)
        for term, count in Counter(terms(query)).items():
            postings = self._postings(term)
            if postings is None:
                continue
            documents, frequencies = postings
            share = (self.counted - len(documents) + 0.5) / (len(documents) + 0.5)
            weight = np.float32(count) * np.float32(math.log(1 + share))
            scores[documents] += weight - weight / (np.float32(1) + frequencies * self.norms[documents])
            hit[documents] = True
        matching = np.flatnonzero(hit)
        rounded = scores[matching].astype(np.float32)
        if len(matching) > limit:
            good = rounded >= np.partition(rounded, -limit)[-limit]  # more than `limit` if the last ones tie
            matching, rounded = matching[good], rounded[good]
        best = np.lexsort((self.order[matching], -rounded))[:limit]
        return matching[best].astype(np.int32)

    def save(self, folder: Path) -> None:
        """Writes the arrays to an existing folder."""
        for name in _ARRAYS:
            np.save(folder / f"ranking-{name}.npy", getattr(self, name))
        ends = np.cumsum([0, *(len(term) for term in self.vocabulary)], dtype=np.int64)
        np.save(folder / "ranking-terms.npy", np.frombuffer(b"".join(self.vocabulary), np.uint8))
        np.save(folder / "ranking-ends.npy", ends)
        (folder / "ranking.json").write_text(json.dumps({"counted": self.counted}), encoding="utf-8")

    def _postings(self, term: str) -> tuple[np.ndarray, np.ndarray] | None:
        key = term.encode()
        at = bisect_left(self.vocabulary, key)
        if at == len(self.vocabulary) or self.vocabulary[at] != key:
            return None
        part = slice(int(self.offsets[at]), int(self.offsets[at + 1]))
        return self.documents[part], self.frequencies[part]


class MappedTexts(Sequence[bytes]):
    """Texts in one memory-mapped array of bytes, which all processes of a host share.

    Args:
        text: uint8 [n], the concatenated texts.
        ends: int64 [texts + 1]; text i is `text[ends[i] : ends[i + 1]]`.
    """

    def __init__(self, text: np.ndarray, ends: np.ndarray):
        self._text, self._ends = text, ends

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, item):
        if not 0 <= item < len(self):
            raise IndexError(item)
        return self._text[int(self._ends[item]) : int(self._ends[item + 1])].tobytes()


def load_ranking(folder: Path) -> Ranking:
    """Maps the arrays that `save` wrote, read-only."""
    arrays = {name: np.load(folder / f"ranking-{name}.npy", mmap_mode="r").view(np.ndarray) for name in _ARRAYS}
    text, ends = (np.load(folder / f"ranking-{name}.npy", mmap_mode="r").view(np.ndarray) for name in ("terms", "ends"))
    counted = json.loads((folder / "ranking.json").read_text(encoding="utf-8"))["counted"]
    return Ranking(MappedTexts(text, ends), **arrays, counted=counted)


def build_ranking(ids: Sequence[str], texts: Iterable[str]) -> Ranking:
    """Builds the index of documents.

    Args:
        ids: the ids of the D documents, which decide ties.
        texts: their texts, in the same order.

    Raises:
        ValueError: the number of texts differs from the number of ids.
    """
    postings: dict[str, tuple[list[int], list[int]]] = {}
    lengths = []
    for number, text in enumerate(texts):
        frequency = Counter(terms(text))
        lengths.append(frequency.total())
        for term, count in frequency.items():
            documents, counts = postings.setdefault(term, ([], []))
            documents.append(number)
            counts.append(count)
    if len(lengths) != len(ids):
        raise ValueError(f"expected a text for each of {len(ids)} documents, got {len(lengths)}")
    vocabulary = sorted(postings, key=str.encode)
    offsets = np.cumsum([0, *(len(postings[term][0]) for term in vocabulary)], dtype=np.int64)
    join = lambda part, dtype: np.asarray([x for term in vocabulary for x in postings[term][part]], dtype)
    counted = sum(length > 0 for length in lengths)
    average = np.float32(sum(lengths) / max(counted, 1))
    kept = np.asarray([_in_one_byte(length) for length in lengths], np.float32)
    norms = np.float32(1) / (K1 * ((np.float32(1) - B) + B * kept / max(average, np.float32(1e-9))))
    order = np.empty(len(ids), np.int32)
    order[sorted(range(len(ids)), key=lambda number: ids[number].encode())] = np.arange(len(ids))
    return Ranking(
        [term.encode() for term in vocabulary],
        offsets,
        join(0, np.int32),
        join(1, np.float32),
        norms.astype(np.float32),
        order,
        counted,
    )


def _in_one_byte(length: int) -> int:
    """Rounds a length as Lucene does when it stores the length in one byte: exact below 40, then four leading bits.

    The mantissa has 3 bits after an implicit one. The 24 smallest lengths are stored exactly.
    """
    if length < 24:
        return length
    rest = length - 24
    shift = max(rest.bit_length() - 4, 0)
    return 24 + ((rest >> shift) << shift)
