"""Words of a command line → options → configs, and the name that a run gets from what was changed."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from aem_jax.launch.config import RunConfig, is_harmless
from aem_jax.launch.overrides import ConfigError, annotations, override, read, unknown
from aem_jax.launch.preset import SEPARATOR

Config = TypeVar("Config")
Options = dict[str, list[str]]

_LONGEST_NAME = 80


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
    kinds = annotations(type(config))
    values = {}
    for name, words in options.items():
        if name not in kinds:
            raise ConfigError(unknown(name, kinds, flag))
        try:
            values[name] = read(words, kinds[name])
        except ValueError as error:
            raise ConfigError(f"{flag(name)}: {error}") from None
    return override(config, values, flag)


def run_name(config: RunConfig, options: Mapping[str, Sequence[str]]) -> str:
    """The name of a run: as given, else its presets' and each change that makes it another run.

    `--aem.strength 0` of the preset alfworld-tiny is `alfworld-tiny-aem.strength-0`, so that it and the preset as it is
    do not meet in one folder, and the same command finds the same run.

    Raises:
        ConfigError: a name that is no plain folder name.
    """
    if config.name:
        if not re.fullmatch(r"[\w.+=-]+", config.name) or config.name.startswith("."):
            raise ConfigError(
                f"--name: expected letters, digits and -_.+=, got {config.name!r}; --runs-dir is its folder"
            )
        return config.name
    changes = [
        "-".join([name.replace("_", "-"), *words]) for name, words in sorted(options.items()) if not is_harmless(name)
    ]
    presets = [Path(each).name.removesuffix(".toml") for each in config.preset.split(SEPARATOR)]
    name = re.sub(r"[^\w.+=-]+", "_", "-".join([*presets, *changes]))
    if len(name) > _LONGEST_NAME:
        digest = hashlib.sha256(name.encode()).hexdigest()[:8]
        name = f"{name[: _LONGEST_NAME - 9]}-{digest}"
    return name
