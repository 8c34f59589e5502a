"""Words of a command line → options → configs. No jax: `serve` starts and stays without it."""

import re
from collections.abc import Sequence
from typing import TypeVar

from aem_jax.errors import ConfigError
from aem_jax.overrides import annotations, choose, override, read, unions, unknown

Config = TypeVar("Config")
Options = dict[str, list[str]]


def flag(name: str) -> str:
    """How a field is written on the command line."""
    return f"--{name.replace('_', '-')}"


def split(words: Sequence[str]) -> tuple[list[str], Options]:
    """(words before the first option, words of each option by its field's name). Of one given twice the last counts."""
    positional: list[str] = []
    options: Options = {}
    current = positional
    for word in words:
        if re.match(r"--[A-Za-z]", word):
            name, equals, value = word[2:].partition("=")
            current = options[name.replace("-", "_")] = [value] if equals else []
        elif re.match(r"-[A-Za-z]", word) and word != "-h":
            raise ConfigError(f"unknown option {word!r}; options are written --{word.lstrip('-')}")
        elif word == "-h":
            options["help"] = []
        else:
            current.append(word)
    return positional, options


def apply(config: Config, options: Options) -> Config:
    """A copy of `config` with the options' values in place.

    Raises:
        ConfigError: an option that is no field, or a value that cannot be read or is refused.
    """
    config = choose(config, {name: " ".join(options[name]) for name in unions(type(config)) if name in options}, flag)
    kinds = annotations(config)
    values = {}
    for name, words in options.items():
        if name not in kinds:
            raise ConfigError(unknown(name, config, flag))
        try:
            values[name] = read(words, kinds[name])
        except ValueError as error:
            raise ConfigError(f"{flag(name)}: {error}") from None
    return override(config, values, flag)
