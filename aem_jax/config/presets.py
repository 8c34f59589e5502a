"""Presets: TOML files in the package, or anybody's own. Several make one config: later ones override earlier ones.

An algorithm (`preset_files/algorithms`) says what it is and nothing of the rest, so it goes with any environment.
"""

import tomllib
from importlib.resources import files
from pathlib import Path
from typing import Any

from aem_jax.config.run import RunConfig
from aem_jax.errors import ConfigError
from aem_jax.files import valid_json
from aem_jax.overrides import flatten, nearest, override

DEFAULT = "alfworld-tiny"
SEPARATOR = " + "
"""Between the names in a config's `preset`."""

_FOLDER = files("aem_jax.config") / "preset_files"


def preset_names() -> list[str]:
    """The presets of the package that are whole runs."""
    return _names(_FOLDER)


def algorithm_names() -> list[str]:
    """The presets of the package that are algorithms."""
    return _names(_FOLDER / "algorithms")


def describe_preset(name: str) -> str:
    """The comment that a packaged preset begins with, in one line."""
    lines = _packaged(name).read_text(encoding="utf-8").splitlines()
    end = next((number for number, line in enumerate(lines) if not line.startswith("#")), len(lines))
    return " ".join(line.lstrip("# ") for line in lines[:end]).partition(". ")[0].rstrip(".")


def read_preset(*names: str) -> RunConfig:
    """The run config of presets: the defaults with the files' values in place, one file after the other.

    Args:
        names: each one of `preset_names()` or `algorithm_names()`, or the path of a TOML file (with a slash, or ending
            in .toml). Where all are algorithms, the default preset comes first.

    Raises:
        ConfigError: no such preset, or a file that is no TOML or sets what is no field.
    """
    if all(name in algorithm_names() for name in names):
        names = (DEFAULT, *names)
    config = RunConfig()
    for name in names:
        source, values = _read(name)
        try:
            config = override(config, values)
        except ConfigError as error:
            raise ConfigError(f"{source}: {error}") from None
    return override(config, {"preset": SEPARATOR.join(names)})


def _read(name: str) -> tuple[str, dict[str, Any]]:
    """(file's name, its values by dotted name)."""
    if "/" in name or name.endswith(".toml"):
        source, path = name, Path(name)
        if not path.is_file():
            raise ConfigError(f"no preset file {name}; {_known()}")
    else:
        names = preset_names() + algorithm_names()
        if name not in names:
            raise ConfigError(f"unknown preset {name!r}{nearest(name, names) or '; ' + _known()}")
        source, path = f"{name}.toml", _packaged(name)
    try:
        # TOML ends lines at \n or \r\n alone; a byte order mark, which editors of Windows write, is no TOML.
        text = path.read_bytes().decode("utf-8-sig")
        return source, flatten(valid_json(tomllib.loads(text)))
    except (ValueError, OSError, RecursionError) as error:
        raise ConfigError(f"{source}: {error}") from None


def _packaged(name: str):
    return (_FOLDER / "algorithms" if name in algorithm_names() else _FOLDER) / f"{name}.toml"


def _names(folder) -> list[str]:
    return sorted(each.name.removesuffix(".toml") for each in folder.iterdir() if each.name.endswith(".toml"))


def _known() -> str:
    return f"presets are {', '.join(preset_names() + algorithm_names())}, or the path of your own TOML file"
