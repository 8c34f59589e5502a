"""Words, stems and ranking of the shop's search engine, compared with values by hand and with a slow engine."""

import math
import random
from collections import Counter

import numpy as np
import pytest

from aem_jax.envs.webshop.analysis import terms, words
from aem_jax.envs.webshop.ranking import build_ranking, load_ranking
from aem_jax.envs.webshop.stemmer import stem


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        # examples of Porter's paper, step by step
        *(("caresses", "caress"), ("ponies", "poni"), ("ties", "ti"), ("caress", "caress"), ("cats", "cat")),
        *(("feed", "feed"), ("agreed", "agre"), ("plastered", "plaster"), ("bled", "bled"), ("motoring", "motor")),
        *(("sing", "sing"), ("conflated", "conflat"), ("troubled", "troubl"), ("sized", "size"), ("hopping", "hop")),
        *(("falling", "fall"), ("hissing", "hiss"), ("fizzed", "fizz"), ("failing", "fail"), ("filing", "file")),
        *(
            ("happy", "happi"),
            ("sky", "sky"),
            ("relational", "relat"),
            ("conditional", "condit"),
            ("rational", "ration"),
        ),
        *(("digitizer", "digit"), ("radically", "radic"), ("vietnamization", "vietnam"), ("operator", "oper")),
        *(("hopefulness", "hope"), ("formaliti", "formal"), ("sensibiliti", "sensibl"), ("triplicate", "triplic")),
        *(("formative", "form"), ("electrical", "electr"), ("goodness", "good"), ("revival", "reviv")),
        *(("allowance", "allow"), ("replacement", "replac"), ("adoption", "adopt"), ("homologous", "homolog")),
        *(("probate", "probat"), ("rate", "rate"), ("cease", "ceas"), ("controll", "control"), ("roll", "roll")),
        # the two departures: as first published, these were possibli and archaeologi
        *(("possibly", "possibl"), ("archaeology", "archaeolog")),
        # too short to have a stem, and y as a consonant
        *(("as", "as"), ("toy", "toi"), ("syzygy", "syzygi"), ("yes", "ye")),
    ],
)
def test_stems(word: str, expected: str):
    assert stem(word) == expected


def test_words_are_split_at_unicode_boundaries():
    assert words("1,000.50 x 2.5oz T-Shirt, \"O'Neil's\" C++") == [
        "1,000.50",
        "x",
        "2.5oz",
        "T",
        "Shirt",
        "O'Neil's",
        "C",
    ]
    assert words("foo_bar _x_ ___ a.b x:y 12:30 a,b 1'2") == [
        *("foo_bar", "_x_", "a.b", "x:y", "12", "30", "a", "b", "1'2"),
    ]
    assert words("naïve cafe\u0301 日本 カタカナ ひら") == ["naïve", "cafe\u0301", "日", "本", "カタカナ", "ひ", "ら"]
    assert words("™ ½ 100% 😀") == ["100", "😀"]
    assert [len(word) for word in words("x" * 600)] == [255, 255, 90]


def test_terms_are_lower_case_stems_without_stop_words():
    assert terms("The Men's running SHOES, and not for them") == ["men", "run", "shoe", "them"]
    assert terms("it's a the") == []


def slow_search(query: str, documents: dict[str, str], limit: int) -> list[str]:
    """The equation, one document and one term at a time, in float32 where Lucene uses it."""
    f = np.float32

    def kept(length: int) -> int:  # a length in one byte: from 40 on, only the four leading bits of its excess over 24
        step = 1
        while (length - 24) // step >= 16:
            step *= 2
        return 24 + (length - 24) // step * step if length >= 40 else length

    counts = {name: Counter(terms(text)) for name, text in documents.items()}
    average = f(sum(count.total() for count in counts.values()) / len(counts))
    ranked = []
    for name, count in counts.items():
        norm = f(1) / (f(0.9) * ((f(1) - f(0.4)) + f(0.4) * f(kept(count.total())) / average))
        score, matched = 0.0, False
        for term, times in Counter(terms(query)).items():
            if count[term]:
                others = sum(term in document for document in counts.values())
                weight = f(times) * f(math.log(1 + (len(counts) - others + 0.5) / (others + 0.5)))
                score += float(weight - weight / (f(1) + f(count[term]) * norm))
                matched = True
        if matched:
            ranked.append((-f(score), name.encode(), name))
    return [name for *_, name in sorted(ranked)[:limit]]


def test_ranking_agrees_with_a_direct_computation():
    rng = random.Random(0)
    vocabulary = [f"w{i}" for i in range(30)]
    documents = {
        f"{rng.randrange(36**3):x}{i}": " ".join(rng.choices(vocabulary, k=rng.randint(1, 90))) for i in range(60)
    }
    documents |= {"zwin": "w0 w1 w2", "atwin": "w0 w1 w2"}  # ties go by id
    ranking = build_ranking(list(documents), documents.values())
    names = list(documents)
    for _ in range(60):
        query = " ".join(rng.choices([*vocabulary, "unknown"], k=rng.randint(1, 5)))
        for limit in (3, 50):
            assert [names[i] for i in ranking.search(query, limit)] == slow_search(query, documents, limit)
    assert ranking.search("unknown").size == 0


def test_a_saved_index_ranks_as_the_index_in_memory(tmp_path):
    texts = ["red lamp", "green tea tea", "red tea lamp lamp"]
    ranking = build_ranking(["c", "b", "a"], texts)
    ranking.save(tmp_path)
    mapped = load_ranking(tmp_path)
    assert [bytes(term) for term in mapped.vocabulary] == [b"green", b"lamp", b"red", b"tea"]
    for query in ("red lamp", "tea", "zebra", "aardvark"):
        assert mapped.search(query).tolist() == ranking.search(query).tolist()
    with pytest.raises(ValueError, match="a text for each of 2 documents, got 1"):
        build_ranking(["a", "b"], ["x"])
