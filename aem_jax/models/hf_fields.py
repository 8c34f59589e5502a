"""Checks of the fields of a `config.json`: each is read with the type that it must have, or refused by its name."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from aem_jax.models.config import brief

_REQUIRED: Any = object()


class Kind(NamedTuple):
    """The required type of a value: a description and a test."""

    words: str
    holds: Callable[[Any], bool]


SIZE = Kind("a whole number from 1 to 2147483647", lambda x: type(x) is int and 0 < x < 2**31)
INDEX = Kind("a whole number from 0 to 2147483647", lambda x: type(x) is int and 0 <= x < 2**31)
POSITIVE = Kind("a number above 0", lambda x: type(x) in (int, float) and 0 < x < 1e38)
FRACTION = Kind("a fraction between 0 and 1", lambda x: type(x) is float and 0 < x < 1)
FLAG = Kind("true or false", lambda x: type(x) is bool)
OBJECT = Kind("an object or null", lambda x: x is None or isinstance(x, Mapping))
STRINGS = Kind(
    "a list of strings or null", lambda x: x is None or (isinstance(x, list) and all(type(item) is str for item in x))
)


def take(fields: Mapping[str, Any], name: str, kind: Kind, default: Any = _REQUIRED) -> Any:
    """The value of a field, checked."""
    value = fields.get(name, default)
    if value is _REQUIRED:
        raise ValueError(f"expected {name} to be {kind.words}, got no such field")
    if not kind.holds(value):
        raise ValueError(f"expected {name} to be {kind.words}, got {brief(value)}")
    return value


def one_of(fields: Mapping[str, Any], name: str, values: Sequence[Any]) -> None:
    """Checks that a field is absent or equals one of `values`, type included: true is not 1."""
    value = fields.get(name, values[0])
    if not any(type(value) is type(accepted) and value == accepted for accepted in values):
        raise ValueError(f"expected {name} = {values[0]!r}, got {brief(value)}; the decoder has no other form")
