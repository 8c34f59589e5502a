"""Checks the results of an environment, and converts values of other libraries to plain JSON values.

Environments compute with numpy, torch or jax. The `json` module refuses the scalars of these libraries, so they are
converted to Python numbers. A value without a JSON equivalent (an object, bytes, a complex number) is an error that
names its key.
"""

import datetime
import json
import math
import numbers
import os
import reprlib
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from decimal import Decimal
from enum import Enum
from typing import Any

from aem_jax.envs.protocol import Environment, StepResult
from aem_jax.files import valid_text

_FLOAT32_MAX = 3.4028234663852886e38
_NUMBERS = (numbers.Real, Decimal)
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 100


class _ForeignError(Exception):
    """A value has no plain equivalent.

    Attributes:
        value: the value.
        path: keys and indices of the value, innermost first.
    """

    def __init__(self, value: Any):
        self.value, self.path = value, list[str]()


def checked_result(env: Environment, call: str, result: Any) -> StepResult:
    """Validates the result of an environment, and converts it to plain values.

    Numbers of numpy, torch and jax become Python numbers. Values in `info` are converted to JSON values
    (`plain`), and NaN becomes null.

    Args:
        env: the environment.
        call: reset or step.
        result: the returned object.

    Raises:
        ValueError: the object is not a `StepResult` with a text observation, a finite reward, true or false as flags,
            and a mapping of JSON values as info; the message names the wrong part.
    """
    where = f"{type(env).__qualname__}.{call}"
    if not isinstance(result, StepResult):
        raise _no_result(where, described(result))
    if not isinstance(result.observation, str):
        raise _no_result(where, f"{described(result.observation)} as observation")
    if not isinstance(result.info, Mapping):
        raise _no_result(where, f"{described(result.info)} as info")
    reward = number(result.reward)
    if reward is None:
        raise ValueError(
            f"expected a number, finite in float32, as reward from {where}, got {described(result.reward)}"
        )
    info = plain(result.info, f"{where}'s info")
    for name, (read, what) in _FACTS.items():
        if (value := info.pop(name, None)) is not None:
            info[name] = _read(read, value, what, f"info[{name!r}] from {where}")
    return StepResult(
        plain(result.observation, "observation"),
        reward,
        _read(flag, result.terminated, "true or false", f"terminated from {where}"),
        _read(flag, result.truncated, "true or false", f"truncated from {where}"),
        info,
    )


def plain(value: Any, name: str) -> Any:
    """Converts a value to None, booleans, numbers, valid texts, lists, and mappings with text keys.

    Scalars and arrays (any object with `tolist`), decimals and enums become the values that they contain. Paths, dates
    and UUIDs become texts; tuples and sets become lists. NaN and infinity become None, because JSON cannot express
    them.

    Args:
        value: any value.
        name: name of the value, for the error.

    Raises:
        ValueError: a value in it has no plain equivalent; the message names it.
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
    """Returns a number as a float if it is finite in float32, the dtype of rewards; else None."""
    value = _held(value)
    if not isinstance(value, _NUMBERS):
        return None
    try:
        result = float(value)
    except OverflowError:  # an integer beyond the range of floats
        return None
    return result if abs(result) <= _FLOAT32_MAX else None  # NaN compares as false


def flag(value: Any) -> bool | None:
    """Returns a boolean, or the number 0 or 1, as a boolean; None for any other value."""
    value = _held(value)
    if isinstance(value, bool):
        return value
    return bool(value) if isinstance(value, _NUMBERS) and value in (0, 1) else None


def described(value: Any) -> str:
    """Returns a value's type and the beginning of its text, in one line."""
    return f"{type(value).__name__} {' '.join(_SHORT.repr(value).split())}"


def _held(value: Any) -> Any:
    """Returns the Python value of an enum, or of a scalar or array of numpy, torch or jax; other values unchanged."""
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
        converted = float(value)
        return converted if math.isfinite(converted) else None
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, Mapping):
        return {_key(key): item for key, item in zip(value, _plain_items(value.items()), strict=True)}
    if isinstance(value, Set):
        return sorted(_plain_items(enumerate(value)), key=repr)  # the order must not depend on the process
    if isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray)):
        return list(_plain_items(enumerate(value)))
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    if isinstance(value, (os.PathLike, uuid.UUID)):
        return valid_text(str(value))
    raise _ForeignError(value)


def _plain_items(items: Iterable[tuple[Any, Any]]) -> Iterator[Any]:
    for key, item in items:
        try:
            converted = _plain(item)
        except _ForeignError as error:
            error.path.append(f"[{key!r:.80}]")
            raise
        yield converted


def _key(key: Any) -> str:
    """Converts a key of a mapping to a text. Numbers are written as `json` writes them."""
    converted = _plain(key)
    if isinstance(converted, (dict, list)):
        raise _ForeignError(key)
    return converted if isinstance(converted, str) else json.dumps(converted)


def _no_result(where: str, got: str) -> ValueError:
    return ValueError(
        f"expected a StepResult with a text observation and a mapping as info from {where}, "
        f"got {got}; return aem_jax.envs.protocol.StepResult(observation, reward, terminated, truncated, info)"
    )


def _read(read: Callable[[Any], Any], value: Any, what: str, name: str) -> Any:
    converted = read(value)
    if converted is None:
        raise ValueError(f"expected {what} as {name}, got {described(value)}")
    return converted


def _texts(value: Any) -> list[str] | None:
    return value if isinstance(value, list) and all(isinstance(item, str) for item in value) else None


_FACTS: Mapping[str, tuple[Callable[[Any], Any], str]] = {
    "won": (flag, "true or false"),
    "valid_action": (flag, "true or false"),
    "score": (number, "a finite number"),
    "admissible": (_texts, "a list of texts"),
}
"""Facts of `info` that training reads -> (converter, name of the type for errors). The converter returns None for a
value of another type. Null facts are omitted."""
