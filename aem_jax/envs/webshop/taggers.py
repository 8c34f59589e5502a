"""Taggers, which find the nouns of a title. The reward compares the nouns of two titles. The original uses spaCy.

Taggers are functions `text -> nouns, lower case`. A run logs the name of its tagger, because rewards depend on it.
"""

import importlib.util
import re
from collections.abc import Callable, Mapping
from functools import lru_cache

Tagger = Callable[[str], tuple[str, ...]]

SPACY_MODEL = "en_core_web_sm"
_NOUNS = ("PNOUN", "NOUN", "PROPN")  # as in the original, where the first is not a valid tag
_RECORDED_OTHERS_TEXT = (
    "a an the for and or of with to in on by from at is are that this it its not no premium classic everyday ultra "
    "soft compact deluxe modern free"
)
_RECORDED_OTHERS = frozenset(_RECORDED_OTHERS_TEXT.split())
_FUNCTION_WORDS_TEXT = (
    "a an the for and or nor but of with without to in into on onto off by from at as is are was be been being that "
    "this these those it its not no so if than then when while where which who whose what how all any both each "
    "every few more most other some such only own same too very can will just you your yours we our us i my me he "
    "him his she her they them their up down out over under above below between through per via has have had do "
    "does did"
)
_FUNCTION_WORDS = frozenset(_FUNCTION_WORDS_TEXT.split())
_ADJECTIVES_TEXT = (
    "new old big small large medium mini tiny long short high low wide narrow thin thick heavy light lightweight "
    "soft hard warm cool cold hot dry wet fresh clean clear dark bright black white red blue green yellow orange "
    "purple pink brown gray grey beige golden natural organic modern classic vintage rustic premium deluxe ultra "
    "super extra heavy free safe easy quick fast slim loose round square flat fine pure real good great best "
    "perfect ideal nice cute sexy casual formal plus double single dual full half multi portable compact durable "
    "sturdy elegant smart strong gentle daily everyday own outdoor indoor electric electronic digital automatic "
    "manual wireless wired adult senior junior sweet salty sour spicy raw vegan halal kosher dairy gluten"
)
_ADJECTIVES = frozenset(_ADJECTIVES_TEXT.split())
_ADJECTIVE_ENDINGS = ("ful", "less", "able", "ible", "ous", "ive", "proof", "resistant", "ly", "ish", "ed", "est")


def recorded(text: str) -> tuple[str, ...]:
    """The substitute tagger of the golden recordings: every alphabetic word except a few."""
    return tuple(word for word in _words(text) if word not in _RECORDED_OTHERS)


def small(text: str) -> tuple[str, ...]:
    """Simple rules without a model: alphabetic words that are not function words and do not look like adjectives."""
    others = _FUNCTION_WORDS | _ADJECTIVES
    return tuple(w for w in _words(text) if w not in others and not (len(w) > 5 and w.endswith(_ADJECTIVE_ENDINGS)))


def spacy_tagger() -> Tagger:
    """Loads the original's tagger.

    Raises:
        ValueError: spaCy or its model is not installed.
    """
    if not has_spacy():
        raise ValueError(
            f"expected spaCy and its model {SPACY_MODEL} for the tagger 'spacy', found them not; "
            "pip install spacy && python -m spacy download en_core_web_sm, or choose the tagger 'small'"
        )
    import spacy  # pyright: ignore[reportMissingImports]

    model = spacy.load(SPACY_MODEL, disable=["ner", "lemmatizer"])
    return lambda text: tuple(token.text.lower() for token in model(text) if token.pos_ in _NOUNS)


def has_spacy() -> bool:
    """Whether spaCy and the original's model are installed."""
    return all(importlib.util.find_spec(name) is not None for name in ("spacy", SPACY_MODEL))


TAGGERS: Mapping[str, Callable[[], Tagger]] = {
    "spacy": spacy_tagger,
    "small": lambda: small,
    "recorded": lambda: recorded,
}


def resolve(name: str) -> str:
    """Resolves `auto` to `spacy` if spaCy is installed on this machine, else to `small`. Other names stay unchanged.

    Raises:
        ValueError: the tagger does not exist.
    """
    if name == "auto":
        return "spacy" if has_spacy() else "small"
    if name not in TAGGERS:
        raise ValueError(f"expected a tagger of auto, {', '.join(TAGGERS)}, got {name!r}")
    return name


def tagger(name: str) -> Tagger:
    """Returns a tagger by name, with a cache of the latest titles.

    Raises:
        ValueError: the tagger does not exist or is not installed.
    """
    return lru_cache(maxsize=4096)(TAGGERS[resolve(name)]())


def _words(text: str) -> list[str]:
    """Returns alphabetic words in lower case. Words with a digit are dropped; hyphens and slashes separate words."""
    return [word.lower() for word in re.findall(r"\w+", text.replace("_", " ")) if word.isalpha()]
