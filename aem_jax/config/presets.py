"""Presets: TOML files of the package or of the user. Several make one config; later ones override earlier ones.

There are three kinds of packaged presets, which combine: a setting (the environment, and the sizes of a run), a model
(its files, and what its size needs), and an algorithm.
"""

import tomllib
from importlib.resources import files
from importlib.resources.abc import Traversable
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


def setting_names() -> list[str]:
    """Names of the package's presets of settings."""
    return _names(_FOLDER)


def model_names() -> list[str]:
    """Names of the package's presets of models."""
    return _names(_FOLDER / "models")


def algorithm_names() -> list[str]:
    """Names of the package's presets of algorithms."""
    return _names(_FOLDER / "algorithms")


def preset_names() -> list[str]:
    """Names of all packaged presets."""
    return [*setting_names(), *model_names(), *algorithm_names()]


def describe_preset(name: str) -> str:
    """The first sentence of the comment at the top of a packaged preset."""
    lines = _packaged(name).read_text(encoding="utf-8").splitlines()
    end = next((number for number, line in enumerate(lines) if not line.startswith("#")), len(lines))
    return " ".join(line.lstrip("# ") for line in lines[:end]).partition(". ")[0].rstrip(".")


def read_preset(*names: str) -> RunConfig:
    """The config of presets: the defaults, overridden by one file after the other.

    Args:
        names: each of `preset_names()`, or the path of a TOML file (with a slash, or ending in .toml). If all are
            algorithms, the default preset comes first.

    Raises:
        ConfigError: an unknown preset, a model without a setting, a file that is not TOML, or an unknown field in it.
    """
    models, algorithms = model_names(), algorithm_names()
    if all(name in algorithms for name in names):
        names = (DEFAULT, *names)
    elif all(name in models + algorithms for name in names):
        raise ConfigError(
            f"expected a preset of a setting beside {' and '.join(names)}, got none; "
            f"as in --preset alfworld-paper {' '.join(names)}"
        )
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
            raise ConfigError(f"no preset file {name}{_known()}")
    else:
        if name not in preset_names():
            raise ConfigError(
                f"unknown preset {name!r}{_two_presets(name) or nearest(name, preset_names()) or _known()}"
            )
        source, path = f"{name}.toml", _packaged(name)
    try:
        # As bytes: TOML ends lines at \n or \r\n alone. Windows editors write a byte order mark, which TOML lacks.
        text = path.read_bytes().decode("utf-8-sig")
        return source, flatten(valid_json(tomllib.loads(text)))
    except (ValueError, OSError, RecursionError) as error:
        raise ConfigError(f"{source}: {error}") from None


def _packaged(name: str) -> Traversable:
    folders = {"models": model_names(), "algorithms": algorithm_names()}
    inner = next((folder for folder, names in folders.items() if name in names), "")
    return _FOLDER.joinpath(inner, f"{name}.toml")


def _names(folder: Traversable) -> list[str]:
    return sorted(file.name.removesuffix(".toml") for file in folder.iterdir() if file.name.endswith(".toml"))


def _two_presets(name: str) -> str:
    """The presets that a name such as alfworld-qwen2.5-7b, of a setting and a model, stands for."""
    for model in model_names():
        setting = f"{name.removesuffix(f'-{model}')}-paper"
        if name.endswith(f"-{model}") and setting in setting_names():
            return f"; setting and model are two presets: --preset {setting} {model}"
    return ""


def _known() -> str:
    return f"; presets are {', '.join(preset_names())}, or the path of your own TOML file"
