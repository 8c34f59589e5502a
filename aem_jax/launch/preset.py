"""Presets: TOML files in the package, or anybody's own."""

import tomllib
from importlib.resources import files
from pathlib import Path

from aem_jax.launch.config import RunConfig
from aem_jax.launch.overrides import ConfigError, flatten, nearest, override

DEFAULT = "alfworld-tiny"

_FOLDER = files("aem_jax.launch") / "presets"


def preset_names() -> list[str]:
    """The presets of the package."""
    return sorted(each.name.removesuffix(".toml") for each in _FOLDER.iterdir() if each.name.endswith(".toml"))


def describe_preset(name: str) -> str:
    """The comment that a packaged preset begins with, in one line."""
    lines = (_FOLDER / f"{name}.toml").read_text().splitlines()
    end = next((number for number, line in enumerate(lines) if not line.startswith("#")), len(lines))
    return " ".join(line.lstrip("# ") for line in lines[:end]).partition(". ")[0].rstrip(".")


def read_preset(name: str) -> RunConfig:
    """The run config of a preset: the defaults with the file's values in place.

    Args:
        name: one of `preset_names()`, or the path of a TOML file (with a slash, or ending in .toml).

    Raises:
        ConfigError: no such preset, or a file that is no TOML or sets what is no field.
    """
    if "/" in name or name.endswith(".toml"):
        source, path = name, Path(name)
        if not path.is_file():
            raise ConfigError(f"no preset file {name}; {_known()}")
    else:
        source, path = f"{name}.toml", _FOLDER / f"{name}.toml"
        if name not in preset_names():
            raise ConfigError(f"unknown preset {name!r}{nearest(name, preset_names()) or '; ' + _known()}")
    try:
        values = flatten(tomllib.loads(path.read_text()))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{source}: {error}") from None
    try:
        config = override(RunConfig(), values)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None
    return override(config, {"preset": name})


def _known() -> str:
    return f"presets are {', '.join(preset_names())}, or the path of your own TOML file"
