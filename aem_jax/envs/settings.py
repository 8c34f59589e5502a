"""JSON settings of an environment -> its config."""

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from aem_jax.files import parse_json

Config = TypeVar("Config")


def config_from(cls: type[Config], settings: Mapping[str, Any]) -> Config:
    """Builds a frozen config dataclass from JSON settings (lists become tuples, mappings nested dataclasses).

    Raises:
        ValueError: a name that the config does not have, or a value that it refuses.
    """
    fields = {f.name: f for f in dataclasses.fields(cls)}  # pyright: ignore[reportArgumentType]
    values = {}
    for name, value in settings.items():
        if name not in fields:
            raise ValueError(
                f"expected settings of {cls.__name__} among {', '.join(fields)}, got {name!r}{nearest(name, fields)}"
            )
        nested = fields[name].type
        if isinstance(value, Mapping) and isinstance(nested, type) and dataclasses.is_dataclass(nested):
            value = config_from(nested, value)
        values[name] = tuple(value) if isinstance(value, list) else value
    return cls(**values)


def settings_from_json(text: str) -> dict[str, Any]:
    """Reads settings given on a command line.

    Raises:
        ValueError: not a JSON mapping.
    """
    try:
        settings = parse_json(text, "settings")
    except ValueError as error:
        raise ValueError(f"expected settings as a JSON mapping, got {text!r:.200}: {error}") from None
    if not isinstance(settings, dict):
        raise ValueError(f"expected settings as a JSON mapping, got {text!r}")
    return settings


def nearest(name: str, names: Iterable[str]) -> str:
    """`; did you mean …?` for the closest of `names`; empty when none is close."""
    matches = difflib.get_close_matches(name, list(names), n=1)
    return f"; did you mean {matches[0]!r}?" if matches else ""
