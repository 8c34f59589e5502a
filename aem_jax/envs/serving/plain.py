"""Values of other libraries as plain JSON values: what an environment may put into its answers.

Environments compute with numpy, torch or jax, whose scalars `json` refuses although they are numbers. They count as the
values that they hold. What has no such value (an object, bytes, a complex number) is an error that names its key.
"""

import datetime
import json
import math
import numbers
import os
import reprlib
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from decimal import Decimal
from enum import Enum
from typing import Any

from aem_jax.files import valid_text

_FLOAT32_MAX = 3.4028234663852886e38
_NUMBERS = (numbers.Real, Decimal)
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 100


class _ForeignError(Exception):
    """A value without a plain one.

    Attributes:
        value: the value.
        path: keys and indices that lead to it, the innermost first.
    """

    def __init__(self, value: Any):
        self.value, self.path = value, list[str]()


def plain(value: Any, name: str) -> Any:
    """The value as None, booleans, numbers, valid texts, lists, and mappings with text keys.

    Scalars and arrays (all that has `tolist`), decimals and enums count as the values that they hold; paths, dates and
    UUIDs are texts, tuples and sets lists. NaN and infinity, for which JSON has no word, are None.

    Args:
        value: anything.
        name: how it is called, for the error.

    Raises:
        ValueError: a value in it has no plain one; names it.
    """
    try:
        return _plain(value)
    except _ForeignError as error:
        place = name + "".join(reversed(error.path))
        raise ValueError(
            f"expected values that JSON can hold, got {described(error.value)} in {place}; convert it or leave it out"
        ) from None
    except RecursionError:
        raise ValueError(
            f"expected values that JSON can hold in {name}, got some nested too deeply or inside themselves"
        ) from None


def number(value: Any) -> float | None:
    """The value as a float where it is a number that is finite in float32, which rewards are learnt in; else None."""
    value = _held(value)
    if not isinstance(value, _NUMBERS):
        return None
    try:
        found = float(value)
    except OverflowError:  # an integer beyond all floats
        return None
    return found if abs(found) <= _FLOAT32_MAX else None  # NaN compares as false


def flag(value: Any) -> bool | None:
    """The value as a boolean where it is one, or the number 0 or 1; else None."""
    value = _held(value)
    if isinstance(value, bool):
        return value
    return bool(value) if isinstance(value, _NUMBERS) and value in (0, 1) else None


def described(value: Any) -> str:
    """A value's type and the beginning of its text, in one line."""
    return f"{type(value).__name__} {' '.join(_SHORT.repr(value).split())}"


def _held(value: Any) -> Any:
    """What a scalar or an array of numpy, torch or jax holds, an enum stands for; all else as it is."""
    if isinstance(value, Enum):
        return value.value
    return value.tolist() if hasattr(value, "tolist") and not isinstance(value, _NUMBERS) else value


def _plain(value: Any) -> Any:
    if type(value) is str:
        return value if value.isascii() else valid_text(value)
    if type(value) in (int, bool, type(None)):
        return value
    if isinstance(value, Enum):
        return _plain(value.value)
    if isinstance(value, str):
        return valid_text(str(value))
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, _NUMBERS):
        found = float(value)
        return found if math.isfinite(found) else None
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, Mapping):
        return {_key(key): item for key, item in zip(value, _each(value.items()), strict=True)}
    if isinstance(value, Set):
        return sorted(_each(enumerate(value)), key=repr)  # in an order that does not depend on the process
    if isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray)):
        return list(_each(enumerate(value)))
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    if isinstance(value, (os.PathLike, uuid.UUID)):
        return valid_text(str(value))
    raise _ForeignError(value)


def _each(items: Iterable[tuple[Any, Any]]) -> Iterator[Any]:
    for key, item in items:
        try:
            found = _plain(item)
        except _ForeignError as error:
            error.path.append(f"[{key!r:.80}]")
            raise
        yield found


def _key(key: Any) -> str:
    """A key of a mapping as a text; numbers become those that `json` writes."""
    found = _plain(key)
    if isinstance(found, (dict, list)):
        raise _ForeignError(key)
    return found if isinstance(found, str) else json.dumps(found)
