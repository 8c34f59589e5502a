"""Conversion of text to search terms, as in Lucene's English analyzer.

The steps are: words, possessives, lower case, stop words, stems.
Words are split at Unicode's word boundaries (UAX #29), expressed with the Word_Break properties of the package `regex`.
Two rules of the annex are omitted, because no product text needs them: quotes inside Hebrew words, and emoji that are
joined to one sign.
"""

import regex

from aem_jax.envs.webshop.stemmer import stem

_STOP_WORDS_TEXT = (
    "a an and are as at be but by for if in into is it no not of on or such that the their then there these they "
    "this to was will with"
)
STOP_WORDS = frozenset(_STOP_WORDS_TEXT.split())
MAX_WORD = 255
"""Longer words are split into pieces of this many characters."""

_X = r"[\p{WB=Format}\p{WB=Extend}\p{WB=ZWJ}]*+"
_LETTER = rf"(?:[\p{{WB=ALetter}}\p{{WB=Hebrew_Letter}}]{_X})"
_DIGIT = rf"(?:\p{{WB=Numeric}}{_X})"
_KATAKANA = rf"(?:\p{{WB=Katakana}}{_X})"
_JOINER = rf"(?:\p{{WB=ExtendNumLet}}{_X})"
_IN_WORD = rf"(?:[\p{{WB=MidLetter}}\p{{WB=MidNumLet}}\p{{WB=Single_Quote}}]{_X})"
_IN_NUMBER = rf"(?:[\p{{WB=MidNum}}\p{{WB=MidNumLet}}\p{{WB=Single_Quote}}]{_X})"
_RUN = (
    rf"(?:{_KATAKANA}+|(?:{_DIGIT}+(?:{_IN_NUMBER}{_DIGIT}+)*|{_LETTER}+(?:{_IN_WORD}{_LETTER}+)*)+)"  # without joiners
)
_WORD = regex.compile(
    rf"{_JOINER}*{_RUN}(?:{_JOINER}+{_RUN})*{_JOINER}*"
    rf"|(?:\p{{LB=SA}}{_X})+"  # scripts without spaces (Thai, Lao, …): a run is one word
    rf"|[\p{{Script=Han}}\p{{Script=Hiragana}}]{_X}"
    rf"|(?![©®™〰〽])\p{{Extended_Pictographic}}{_X}"
)
_POSSESSIVE = ("'s", "’s", "＇s", "'S", "’S", "＇S")


def words(text: str) -> list[str]:
    """Splits a text into its words, unchanged.

    >>> words("Men's T-Shirt, 2.5 oz (pack of 12)")
    ["Men's", 'T', 'Shirt', '2.5', 'oz', 'pack', 'of', '12']
    """
    parts = _WORD.findall(text)
    if any(len(word) > MAX_WORD for word in parts):
        return [word[i : i + MAX_WORD] for word in parts for i in range(0, len(word), MAX_WORD)]
    return parts


def terms(text: str) -> list[str]:
    """Returns the search terms of a text, in order.

    >>> terms("The men's running shoes")
    ['men', 'run', 'shoe']
    """
    stems = []
    for word in words(text):
        word = (word[:-2] if word.endswith(_POSSESSIVE) else word).lower()
        if word and word not in STOP_WORDS:
            stems.append(stem(word))
    return stems
