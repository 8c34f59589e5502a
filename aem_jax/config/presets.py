"""Presets: TOML files of the package or of the user. Several make one config; later ones override earlier ones.

A preset of `preset_files/algorithms` sets an algorithm alone, so it combines with any environment.
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
    """Names of the package's presets of whole runs."""
    return _names(_FOLDER)


def algorithm_names() -> list[str]:
    """Names of the package's presets of algorithms."""
    return _names(_FOLDER / "algorithms")


def describe_preset(name: str) -> str:
    """The first sentence of the comment at the top of a packaged preset."""
    lines = _packaged(name).read_text(encoding="utf-8").splitlines()
    end = next((number for number, line in enumerate(lines) if not line.startswith("#")), len(lines))
    return " ".join(line.lstrip("# ") for line in lines[:end]).partition(". ")[0].rstrip(".")


def read_preset(*names: str) -> RunConfig:
    """The config of presets: the defaults, overridden by one file after the other.

    Args:
        names: each of `preset_names()` or `algorithm_names()`, or the path of a TOML file (with a slash, or ending in
            .toml). If all are algorithms, the default preset comes first.

    Raises:
        ConfigError: an unknown preset, a file that is not TOML, or an unknown field in it.
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
    """(the file's name, its values by dotted name)."""
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
        # As bytes: TOML ends lines at \n or \r\n alone. Windows editors write a byte order mark, which TOML lacks.
        text = path.read_bytes().decode("utf-8-sig")
        return source, flatten(valid_json(tomllib.loads(text)))
    except (ValueError, OSError, RecursionError) as error:
        raise ConfigError(f"{source}: {error}") from None


def _packaged(name: str):
    return (_FOLDER / "algorithms" if name in algorithm_names() else _FOLDER) / f"{name}.toml"


def _names(folder) -> list[str]:
    return sorted(file.name.removesuffix(".toml") for file in folder.iterdir() if file.name.endswith(".toml"))


def _known() -> str:
    return f"presets are {', '.join(preset_names() + algorithm_names())}, or the path of your own TOML file"
